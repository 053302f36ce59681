"""Plans a training run before it begins: its job, memory, waves, and what each rank trains."""
