"""The model zoo: names to configs, networks and weights."""
