"""Recipes: one file is one LightningModule, read top to bottom as its algorithm."""
