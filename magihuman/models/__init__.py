"""Networks and their shapes: pure nn.Modules, functions and dataclasses, without files or distributed code."""
