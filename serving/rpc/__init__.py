"""The Open Inference Protocol v2 over gRPC: the same answers as over REST, by the same `Inference`."""
