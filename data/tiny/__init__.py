"""The tiny world: puppets, their clips and shards, and the training of its codecs."""
