"""Each optimisation method side by side with its peers and with what its paper says, on real models."""
