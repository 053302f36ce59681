"""Several boxes on one machine: virtual nodes of a real Slurm, and network namespaces."""
