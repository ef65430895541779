"""Benchmarks of the methods that change a model: each against the published algorithms, in the same run."""
