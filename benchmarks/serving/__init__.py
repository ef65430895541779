"""The server under load, beside the peers and raw ONNX Runtime: `python -m benchmarks.serving`; see `__main__`."""
