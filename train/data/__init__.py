"""From a store to batches: which rows, in which order, read ahead in windows."""
