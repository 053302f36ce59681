"""Shared by the benchmarks: timing in interleaved rounds, and growth with size."""
