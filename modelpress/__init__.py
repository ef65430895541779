"""modelpress: a trained PyTorch model in, a smaller, faster, verified one out.

Importing this package is free of effects and of heavy imports; each stage is imported from its own module
(``from modelpress.prune import prune_``).
"""

__version__ = "0.2.0"
