"""Methods measured side by side: each module is one command, `python -m benchmarks.methods.NAME`."""
