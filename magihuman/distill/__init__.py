"""Distribution matching distillation of joint audio and video: pieces that `recipes/dmd2.py` puts together."""
