"""Components of distribution matching distillation (DMD-2) for joint audio and video; `recipes/dmd2.py` combines them."""
