"""Evaluation: metrics with intervals and upper bounds, comparisons, tables and figures; see eval/README.md."""
