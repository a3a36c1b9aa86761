"""The tiny world: puppets, their clips and shards, and the fitting of its codecs."""
