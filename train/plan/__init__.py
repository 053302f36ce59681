"""What a training run will do, worked out before it begins: its job, memory, waves, ranks."""
