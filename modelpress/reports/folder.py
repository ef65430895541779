"""Report of a Hugging Face folder with weights of few bits."""

from __future__ import annotations

from modelpress.reports.base import Report
from modelpress.reports.graph import QuantizeReport
from modelpress.reports.quality import QualityReport


class FolderReport(Report):
    """What `modelpress quantize` delivered."""

    scheme: str
    """Bits of weights and activations, such as W4A16; with -asym for zero points, or -fp8."""
    quantize: QuantizeReport
    """What was rounded; agreement is with the float model, on calibration data."""
    quality: QualityReport
    """The metric on held-out data, paired with the float model's."""
    layers: list[str]
    """Linear layers whose weights are stored in few bits."""
    in_float: list[str]
    """Linear layers that are not."""
    dtype: str
    """Of the scales and of all other tensors."""
    source_bytes: int
    """Bytes of the module's parameters in that type."""
    size_bytes: int
    """Bytes of the folder's tensors."""
    compression_ratio: float
    """source ÷ size."""
