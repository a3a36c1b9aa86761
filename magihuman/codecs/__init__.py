"""Video codecs, audio codecs and text encoders, and bundles of the three."""
