"""Benchmark suites: prompts with pictures, spoken text and references, read from local copies in their published layouts."""
