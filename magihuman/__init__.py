"""magihuman: training, distillation and inference for the daVinci-MagiHuman audio-video transformer."""
