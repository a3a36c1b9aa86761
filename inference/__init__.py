"""Sampling: from a prompt to a playable clip."""
