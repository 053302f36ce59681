"""One training step and what it changes: weights, optimiser, sparsity control, thresholds."""
