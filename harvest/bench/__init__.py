"""The benchmarks of harvesting, and the writing halves of those that need a store."""
