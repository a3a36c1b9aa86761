"""Media files to shards of latents, and shards to training batches."""
