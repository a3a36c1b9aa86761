"""Comparison of trainings: a page, a table and curves of many run folders; `python -m eval.compare_runs --help`."""
