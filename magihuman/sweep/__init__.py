"""Sweeps: several trainings from one file, here, as a Slurm array or under a W&B sweep."""
