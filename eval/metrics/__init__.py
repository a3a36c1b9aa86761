"""Metrics: a file per measurement, found by `eval.metrics.registry`; eval/README.md says how to add one."""
