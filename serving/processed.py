"""A pack that brings its pre- and post-processing, as a second model: texts or images in, embeddings or classes out.

`NAME:processed` takes one tensor of BYTES, which every client of the protocol can send, and answers with what the
pack's description makes of the graph's outputs (`modelpress.process`). No pack's name has a colon, so none is hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modelpress.errors import InputError
from modelpress.process import PROCESSING_FILE, Feature, Pipeline
from serving.refusals import NotServedError, RequestError
from serving.tensors import DATATYPES, TensorSpec, datatype_of

if TYPE_CHECKING:
    from datetime import datetime

    from modelpress.golden import Outcome
    from modelpress.pointer import Pointer
    from serving.engine import Engine
    from serving.models import Failure, Loaded, ServedModel

SUFFIX = ":processed"


@dataclass(frozen=True)
class Front:
    """What a client sees of a pack's processing."""

    pipeline: Pipeline
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    fingerprint: str
    """sha256 (hex) of the description and of the files that it names."""

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
        digest = hashlib.sha256()
        for name in [PROCESSING_FILE, *sorted(pipeline.spec.files)]:
            digest.update(hashlib.sha256(files[name]).digest())
        specs = [_spec(one) for one in pipeline.outputs]
        return cls(pipeline, [_spec(pipeline.input)], specs, digest.hexdigest())


class ProcessedEngine:
    """An engine as its front shows it: what goes in is prepared for it, and what comes out finished.

    The tensors between the two run as everybody's do: joined with others', and in canaries.
    """

    def __init__(self, engine: Engine, front: Front) -> None:
        self._front = front
        self.inputs, self.outputs = front.inputs, front.outputs
        self.graph_outputs = [spec.name for spec in engine.outputs]
        """What the graph must be asked for."""
        self.pack, self.provider, self.lineage, self.rows = engine.pack, engine.provider, engine.lineage, engine.rows
        self.tested: Outcome | None = engine.tested

    @property
    def front(self) -> Front | None:
        """It has none of its own."""
        return None

    def serves(self, engine: Engine) -> bool:
        """Whether what is prepared here is what another pack's processing would prepare, and finish, too."""
        return engine.front is not None and engine.front.fingerprint == self._front.fingerprint

    def prepare(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The graph's inputs, of checked ones.

        Raises:
            RequestError: what was sent is no text or image that the model takes.
        """
        pipeline = self._front.pipeline
        try:
            return pipeline.prepare(inputs[pipeline.input.name].tolist())
        except InputError as error:
            raise RequestError(error.doing, found=error.found, expected=error.expected) from error

    def finish(
        self, found: Mapping[str, np.ndarray], prepared: Mapping[str, np.ndarray], outputs: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """The outputs that a client asked for, of what the graph gave.

        Raises:
            WorkloadError: it gave what the pack's description does not foresee.
        """
        finished = self._front.pipeline.finish(found, prepared)
        return {name: finished[name] for name in outputs}


@dataclass(frozen=True)
class Processed:
    """What answers now, behind its front."""

    engine: ProcessedEngine
    behind: Loaded

    @property
    def pointer(self) -> Pointer | None:
        """The entry that says so; None for a pack that is held beside what the pointer names."""
        return self.behind.pointer


class ProcessedModel:
    """A served model, as who sends texts or images sees it."""

    def __init__(self, model: ServedModel) -> None:
        self.behind = model
        """Which takes tensors."""
        self.name, self.alias = f"{model.name}{SUFFIX}", model.alias

    @property
    def failure(self) -> Failure | None:
        """The model's."""
        return self.behind.failure

    @property
    def lost(self) -> datetime | None:
        """The model's."""
        return self.behind.lost

    def versions(self) -> list[str]:
        """The model's."""
        return self.behind.versions()

    def answering(self, version: str | None = None) -> Processed:
        """What answers now.

        Raises:
            NotReadyError, NotServedError: see `ServedModel.answering`; or the pack brings no processing.
        """
        loaded = self.behind.answering(version)
        engine = loaded.engine
        if engine.front is None:
            raise NotServedError(
                f"model {self.name!r}",
                found=f"a pack without processing ({engine.pack[:12]})",
                expected=f"tensors, for {self.behind.name!r}",
            )
        return Processed(ProcessedEngine(engine, engine.front), loaded)


def _feature(spec: TensorSpec) -> Feature:
    return Feature(spec.name, DATATYPES[spec.datatype], spec.shape)


def _spec(feature: Feature) -> TensorSpec:
    return TensorSpec(feature.name, datatype_of(feature.dtype), feature.shape)
