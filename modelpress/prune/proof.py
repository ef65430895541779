"""Proof that removing was the same as masking."""

from __future__ import annotations

import torch
from torch import Tensor, nn

EQUAL_TOLERANCE = 1e-4
"""Of the largest output: float32 sums in another order."""


def unequal(module: nn.Module, example: dict[str, Tensor], expected: Tensor) -> str:
    """How a module's outputs differ from what they should be; empty where they do not."""
    try:
        found = module(**example)
        atol = EQUAL_TOLERANCE * float(expected.abs().max())
        if torch.allclose(found, expected, rtol=EQUAL_TOLERANCE, atol=atol):
            return ""
        return f"outputs that differ by up to {float((found - expected).abs().max()):.3g}"
    except (RuntimeError, LookupError, ValueError, TypeError) as error:  # of a forward pass that counts for itself
        return f"{type(error).__name__}: {error}"
