"""A training run on disk and on screen: its folder, checkpoints, trackers and live table."""
