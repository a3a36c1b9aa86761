"""Measures, each shown beside its upper bound."""
