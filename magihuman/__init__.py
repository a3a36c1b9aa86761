"""magihuman: training, distillation and inference for the daVinci-MagiHuman audio-video transformer."""

__version__ = "0.2.0"
