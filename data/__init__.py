"""From media files to latent shards to batches."""
