"""The gated families' step from open entries alone: on a CPU, and as Triton kernels on a GPU."""
