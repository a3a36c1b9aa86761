"""Networks: pure `nn.Module`s without I/O or distributed code."""
