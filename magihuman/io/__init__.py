"""Files: atomic writes, exports, safetensors, provenance."""
