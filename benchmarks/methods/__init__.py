"""Methods measured side by side with their peers: each module is one command, `python -m benchmarks.methods.NAME`."""
