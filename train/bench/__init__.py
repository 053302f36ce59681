"""The benchmarks of reading and training, beside other tools."""
