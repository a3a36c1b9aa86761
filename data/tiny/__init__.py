"""Puppets, their clips and shards, and the training of their codecs."""
