"""Puppets, their clips and shards, and the training of its codecs."""
