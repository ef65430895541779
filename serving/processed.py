"""A pack that brings its pre- and post-processing, as a second model: texts or images in, embeddings or classes out.

`NAME:processed` takes one tensor of BYTES, which every client of the protocol can send, and answers with what the
pack's description makes of the graph's outputs (`modelpress.process`). No pack's name has a colon, so none is hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modelpress.errors import InputError
from modelpress.process import Feature, Pipeline
from serving.refusals import NotServedError, RequestError
from serving.rows import Rows
from serving.tensors import DATATYPES, TensorSpec, datatype_of

if TYPE_CHECKING:
    from datetime import datetime

    from modelpress.golden import Outcome
    from modelpress.pointer import Pointer
    from serving.engine import Engine
    from serving.models import Failure, ServedModel

SUFFIX = ":processed"
APART = Rows(False, "texts and images of several requests are prepared, and answered, apart")


@dataclass(frozen=True)
class Front:
    """What a client sees of a pack's processing."""

    pipeline: Pipeline
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]

    @classmethod
    def of_files(
        cls, files: Mapping[str, bytes], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
    ) -> Front | None:
        """The processing that stands in a pack's files, set up over its graph; None where there is none.

        Raises:
            ModelpressError: it can't be; see `Pipeline`.
        """
        pipeline = Pipeline.of_files(files, [_feature(one) for one in inputs], [_feature(one) for one in outputs])
        if pipeline is None:
            return None
        return cls(pipeline, [_spec(pipeline.input)], [_spec(one) for one in pipeline.outputs])


class ProcessedEngine:
    """An engine behind its front. It takes what clients send, and is otherwise the engine."""

    rows = APART

    def __init__(self, engine: Engine, front: Front) -> None:
        self._engine, self._front = engine, front
        self.inputs, self.outputs = front.inputs, front.outputs
        self.row_seconds = 0.0
        self.pack, self.provider, self.lineage = engine.pack, engine.provider, engine.lineage
        self.tested: Outcome | None = engine.tested

    @property
    def broken(self) -> bool:
        """Whether the engine is."""
        return self._engine.broken

    @property
    def front(self) -> Front | None:
        """It has none of its own."""
        return None

    def infer(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str]) -> dict[str, np.ndarray]:
        """Prepare, run and finish, on checked inputs.

        Raises:
            RequestError: what was sent is no text or image that the model takes, or it can't run on it.
            NotReadyError: see `Engine.infer`.
            WorkloadError: the graph gave what the pack's description does not foresee.
        """
        pipeline = self._front.pipeline
        try:
            prepared = pipeline.prepare(inputs[pipeline.input.name].tolist())
        except InputError as error:
            raise RequestError(error.doing, found=error.found, expected=error.expected) from error
        found = self._engine.infer(prepared, [spec.name for spec in self._engine.outputs])
        finished = pipeline.finish(found, prepared)
        return {name: finished[name] for name in outputs}


@dataclass(frozen=True)
class Processed:
    """What answers now, behind its front; like `models.Loaded`."""

    engine: ProcessedEngine
    pointer: Pointer | None
    """The entry that says so; None for a pack that is held beside what the pointer names."""


class ProcessedModel:
    """A served model, as who sends texts or images sees it."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self.name, self.alias = f"{model.name}{SUFFIX}", model.alias

    @property
    def failure(self) -> Failure | None:
        """The model's."""
        return self._model.failure

    @property
    def lost(self) -> datetime | None:
        """The model's."""
        return self._model.lost

    def versions(self) -> list[str]:
        """The model's."""
        return self._model.versions()

    def answering(self, version: str | None = None) -> Processed:
        """What answers now.

        Raises:
            NotReadyError, NotServedError: see `ServedModel.answering`; or the pack brings no processing.
        """
        loaded = self._model.answering(version)
        engine = loaded.engine
        if engine.front is None:
            raise NotServedError(
                f"model {self.name!r}",
                found=f"a pack without processing ({engine.pack[:12]})",
                expected=f"tensors, for {self._model.name!r}",
            )
        return Processed(ProcessedEngine(engine, engine.front), loaded.pointer)


def _feature(spec: TensorSpec) -> Feature:
    return Feature(spec.name, DATATYPES[spec.datatype], spec.shape)


def _spec(feature: Feature) -> TensorSpec:
    return TensorSpec(feature.name, datatype_of(feature.dtype), feature.shape)
