"""Benchmarks of reading and training, compared with other tools."""
