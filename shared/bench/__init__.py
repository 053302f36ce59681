"""What the benchmarks share: timing in interleaved rounds, and growth with size."""
