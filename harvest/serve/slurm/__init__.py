"""`sagsae serve --launch slurm`: one Slurm job for each job of the queue."""
