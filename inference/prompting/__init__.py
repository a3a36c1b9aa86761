"""Prompts: format checker and rewriting by a chat model."""
