"""A description, set up over a graph: from what a client sends to what the graph takes, and the way back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from modelpress.errors import WorkloadError
from modelpress.process import steps
from modelpress.process.image import ImageReader
from modelpress.process.spec import PROCESSING_FILE, MeanPool, Processing, TextInput, TopK
from modelpress.process.steps import FLOAT, TEXT, Arrays, Feature
from modelpress.process.text import TextReader

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

INT = np.dtype(np.int64)


class Pipeline:
    """Safe to call from threads.

    Args:
        spec: the description.
        files: of the pack, by name.
        inputs: what the graph takes.
        outputs: what it gives.

    Raises:
        WorkloadError: the description does not fit the graph, or names a file that is not there.
        CorruptionError: a file that it names is not what it should be.
        SetupError: a library that it needs is missing.
    """

    def __init__(
        self, spec: Processing, files: Mapping[str, bytes], inputs: Sequence[Feature], outputs: Sequence[Feature]
    ) -> None:
        missing = sorted(spec.files - set(files))
        if missing:
            raise WorkloadError(
                f"setting up {PROCESSING_FILE}",
                found=f"no file {missing[0]!r}",
                expected="each that it names in the pack",
            )
        self.spec = spec
        _check_inputs(spec, {one.name: one for one in inputs})
        names = [step.labels for step in spec.steps if isinstance(step, TopK) and step.labels is not None]
        self._labels = {name: steps.read_labels(files[name], name) for name in names}
        features = steps.check_names(spec, {one.name: one for one in outputs}, self._labels)
        self.input = Feature(spec.input.name, TEXT, ("batch",))
        """What a client sends: texts or encoded images, an axis of `bytes`."""
        self.outputs = list(features.values())
        """What a client gets, by name."""
        self._reader: TextReader | ImageReader
        if isinstance(spec.input, TextInput):
            self._reader = TextReader(spec.input, files[spec.input.tokenizer])
        else:
            self._reader = ImageReader(spec.input)

    @classmethod
    def of_files(
        cls, files: Mapping[str, bytes], inputs: Sequence[Feature], outputs: Sequence[Feature]
    ) -> Pipeline | None:
        """The pipeline of a pack; None where it has none.

        Raises:
            CorruptionError, UnsupportedFormatError: see `Processing.parse`.
            WorkloadError, SetupError: see the class.
        """
        data = files.get(PROCESSING_FILE)
        return None if data is None else cls(Processing.parse(data), files, inputs, outputs)

    def prepare(self, given: Sequence[bytes]) -> Arrays:
        """The graph's inputs by name.

        Raises:
            InputError: what is given is not what it should be; the message is for who sent it.
        """
        return self._reader.read(given)

    def finish(self, found: Mapping[str, np.ndarray], prepared: Mapping[str, np.ndarray]) -> Arrays:
        """What a client gets, by name, of what the graph gave to `prepared`.

        Raises:
            WorkloadError: it gave what the description does not foresee.
        """
        arrays, given = dict(found), self.spec.input
        mask = prepared.get(given.mask) if isinstance(given, TextInput) and given.mask is not None else None
        for step in self.spec.steps:
            labels = self._labels.get(step.labels) if isinstance(step, TopK) and step.labels is not None else None
            steps.run(arrays, step, mask if isinstance(step, MeanPool) else None, labels)
        return arrays


def features_of(model: ModelProto) -> tuple[list[Feature], list[Feature]]:
    """What an ONNX graph takes and what it gives.

    Raises:
        WorkloadError: something that is no tensor of numbers.
    """
    weights = {one.name for one in model.graph.initializer}
    inputs = [_feature(one) for one in model.graph.input if one.name not in weights]
    return inputs, [_feature(one) for one in model.graph.output]


def _feature(value: ValueInfoProto) -> Feature:
    from onnx import TensorProto
    from onnx.helper import tensor_dtype_to_np_dtype

    kind = value.type.tensor_type.elem_type
    if kind in (TensorProto.UNDEFINED, TensorProto.STRING):
        raise WorkloadError(f"setting up {PROCESSING_FILE}", found=f"{value.name!r}", expected="a tensor of numbers")
    axes = value.type.tensor_type.shape.dim
    shape = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None for axis in axes)
    return Feature(value.name, np.dtype(tensor_dtype_to_np_dtype(kind)), shape)


def _check_inputs(spec: Processing, inputs: Mapping[str, Feature]) -> None:
    """Hold what the description makes against what the graph takes."""
    given = spec.input
    if isinstance(given, TextInput):
        names = [name for name in (given.ids, given.mask, given.types) if name is not None]
        made = {name: Feature(name, INT, ("batch", "length")) for name in names}
    else:
        size = (given.height, given.width)
        shape = (given.channels, *size) if given.layout == "CHW" else (*size, given.channels)
        made = {given.pixels: Feature(given.pixels, FLOAT, ("batch", *shape))}
    problems = [
        f"{name!r} {_shown(one)} and not {_shown(inputs[name])}"
        for name, one in made.items()
        if name in inputs and not _fits(one, inputs[name])
    ]
    if set(made) != set(inputs) or problems:
        found = "; ".join(problems) or f"a description that makes {sorted(made)}"
        raise WorkloadError(
            f"setting up {PROCESSING_FILE}", found=found, expected=f"what the graph takes: {sorted(inputs)}"
        )


def _fits(made: Feature, taken: Feature) -> bool:
    sizes = zip(made.shape, taken.shape, strict=False)
    return (
        made.dtype == taken.dtype
        and len(made.shape) == len(taken.shape)
        and all(one == other for one, other in sizes if isinstance(one, int) and isinstance(other, int))
        and not isinstance(taken.shape[0], int)
    )


def _shown(feature: Feature) -> str:
    return f"{feature.dtype} {list(feature.shape)}"
