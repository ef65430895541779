"""What graphs for processors that are not here cost in quality, on the CPU: `python -m benchmarks.processors`.

The digits classifier in int8 with scales of any value, by channel and by tensor, and with powers of two as a DPU takes
them (`quantize.scales`), each by every calibration. `disagreement` is 1 − agreement with the float graph on calibration
data, `accuracy` is that of the held-out samples. With `pip install 'modelpress[xla]'`, the classifier and the sentence
encoder as StableHLO as well: how far OpenXLA's CPU is from torch.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from torch import nn

from benchmarks._encoder import encoder_config
from benchmarks._report import Row, main
from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.config import ExportConfig, QuantizeConfig, WorkloadConfig
from modelpress.export import export
from modelpress.quantize import quantize
from modelpress.workload import Workload, load_workload

CALIBRATIONS = ("mse", "minmax", "percentile", "entropy")
FORMS: dict[str, dict[str, object]] = {
    "float scales, by channel": {},
    "float scales, by tensor": {"per_channel": False},
    "powers of two, by tensor": {"per_channel": False, "scales": "power-of-two"},
}


def measure(quick: bool) -> Iterator[Row]:
    """Rows of each form of int8, and of StableHLO."""
    digits = load_workload(WorkloadConfig(kind="image-classification", model="digits-cnn", data="digits"))
    module = digits.skeleton({}) if quick else digits.source()
    float_graph = export(module, digits, ExportConfig())[0]
    yield Row("digits", "float", "accuracy", "share", _accuracy(float_graph, digits))
    for calibration in CALIBRATIONS[: 1 if quick else None]:
        for form, options in FORMS.items():
            # Every layer in integers, whatever it costs: that is the question.
            asked: dict[str, object] = {"calibration": calibration, "max_quality_drop": 1.0, **options}
            made, report = quantize(float_graph, digits, QuantizeConfig.model_validate(asked))
            yield Row("digits", f"{form}, {calibration}", "accuracy", "share", _accuracy(made, digits))
            yield Row("digits", f"{form}, {calibration}", "disagreement", "1 − cosine", 1 - report.agreement)
    if importlib.util.find_spec("torchax") is None:
        return
    yield from _stablehlo("digits", module, digits)
    if not quick:
        texts = load_workload(encoder_config(calibration=64, evaluation=32))
        yield from _stablehlo("encoder", texts.source(), texts)


def _accuracy(checkpoint: Checkpoint, workload: Workload) -> float:
    session = graph.session(checkpoint)
    batches = workload.batches("evaluation", workload.evaluation_batch_size)
    return float(workload.score(np.concatenate([graph.run(session, batch.inputs) for batch in batches])).mean())


def _stablehlo(case: str, module: nn.Module, workload: Workload) -> Iterator[Row]:
    from modelpress.stablehlo import export_stablehlo

    with tempfile.TemporaryDirectory() as folder:
        report = export_stablehlo(module, workload, ExportConfig(), Path(folder, "out"))
    yield Row(case, "StableHLO", "difference to torch", "largest", report.max_difference)
    yield Row(case, "StableHLO", "program without weights", "bytes", report.program_bytes)


if __name__ == "__main__":
    main("processors", measure)
