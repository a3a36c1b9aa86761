"""Files: atomic writing, exported checkpoints, released weights, large safetensors, provenance."""
