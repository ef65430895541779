"""Report of a Hugging Face folder with weights of few bits."""

from __future__ import annotations

from modelpress.reports.base import Report
from modelpress.reports.graph import LayersReport
from modelpress.reports.quality import QualityReport


class FolderReport(Report):
    """What `modelpress quantize` delivered."""

    scheme: str
    """Bits of weights and activations, such as W4A16; with -asym for zero points, or -fp8."""
    quantize: LayersReport
    """What was rounded."""
    agreement: float
    """Agreement with the float model on calibration data (mean cosine of the outputs)."""
    quality: QualityReport
    """The metric on held-out data, paired with the float model's."""
    in_float: list[str]
    """Linear layers that are not rounded."""
    dtype: str
    """Of the scales and of all other tensors."""
    source_bytes: int
    """Bytes of the folder's tensors, were none rounded."""
    size_bytes: int
    """Bytes of the folder's tensors."""
    compression_ratio: float
    """source ÷ size."""

    def summary(self) -> str:
        """A few lines for people."""
        done, found = self.quantize, self.quality
        lines = [
            f"{self.scheme} ({done.method}): {len(done.layers)} linear layers, {len(self.in_float)} in float; "
            f"coverage {done.coverage:.1%}, agreement {self.agreement:.4f}",
            f"{found.metric} {found.value:.4f} on {found.samples} held-out samples",
            f"{self.source_bytes:,} → {self.size_bytes:,} bytes of tensors, {self.dtype} where not rounded",
        ]
        if found.difference is not None:
            lines[1] += (
                f", {found.difference:+.4f} to the float model "
                f"({found.confidence:.0%} interval {found.difference_low:+.4f} to {found.difference_high:+.4f})"
            )
        return "\n".join(lines)
