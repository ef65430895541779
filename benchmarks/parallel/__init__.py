"""Parallel training, models and tasks: `python -m benchmarks.parallel.NAME [--quick] [--json PATH] [--write]`."""
