"""Video and audio codecs, text encoders, and the bundles of them that a model is trained in."""
