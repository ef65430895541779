"""Whether an optimised model looks at the same things as the original: the rank correlation of their attributions.

A model may keep its accuracy and give other reasons for it; users of explanations, and who must account for decisions,
notice. Torch modules are compared by integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365; captum's),
graphs, which have no gradients, by occlusion (Zeiler and Fergus 2014, arXiv:1311.2901): how much the answer falls when
one part of the input is taken away. What is attributed is the original's answer: the logit of its class, or the
likeness to its embedding. Per sample, Spearman's correlation over the parts that both have an opinion on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from scipy.stats import rankdata
from torch import Tensor, nn

from modelpress import graph, intervals
from modelpress.checkpoint import Checkpoint, to_module
from modelpress.config import EvaluateConfig
from modelpress.distill import frozen
from modelpress.errors import WorkloadError
from modelpress.reports import AttributionExample, AttributionReport
from modelpress.workload import Workload

Inputs = dict[str, Tensor]

STEPS = 32
"""Points on the path of integrated gradients."""
GRID = 8
"""Parts of an image along each side, and at most GRID² parts of a flat input."""
LEAST_PARTS = 3
"""Parts of a sample under which a rank correlation says nothing."""
MOST_PARTS = 256
"""Parts of a sample that an example keeps."""


def compare(
    reference: Checkpoint, candidate: Checkpoint, workload: Workload, config: EvaluateConfig
) -> AttributionReport:
    """Agreement of a candidate with the original, on the first `attribution_samples` samples of the evaluation split.

    Args:
        reference: the original; `torch` or `onnx`, as the candidate.
        candidate: what became of it.
        workload: gives the samples, and what an empty input is (`Workload.blank`).
        config: `attribution_samples`, `confidence`, and for graphs `provider` and `threads`.

    Raises:
        WorkloadError: the checkpoints are of two kinds, the input has no blank, or no sample has parts enough.
    """
    if reference.kind != candidate.kind:
        found = f"a {candidate.kind} checkpoint and a {reference.kind} original"
        raise WorkloadError("comparing attributions", found=found, expected="two of one kind")
    explain = _by_gradients if candidate.kind == "torch" else _by_occlusion
    correlations, seen = list[float](), list[_Seen]()
    original, changed = explain(reference, workload, config), explain(candidate, workload, config)
    for sample, inputs in enumerate(itertools.islice(_samples(workload), config.attribution_samples)):
        parts = _parts(workload, inputs)
        if int(parts.max()) + 1 < LEAST_PARTS:
            continue
        goal, expected = original(inputs, parts, None)
        after = changed(inputs, parts, goal)[1]
        correlations.append(spearman(expected, after))
        seen.append(_Seen(sample, *_places(workload, inputs), expected, after))
    if not correlations:
        raise WorkloadError(
            "comparing attributions",
            found=f"no sample in which {LEAST_PARTS} parts differ from the blank input",
            expected="inputs with something in them",
            fix="override Workload.blank, or set evaluate.attribution_samples to 0",
        )
    # Intervals of a mean are made for scores from 0 to 1.
    shares = intervals.mean((1 + np.array(correlations)) / 2, config.confidence)
    return AttributionReport(
        method="integrated-gradients" if candidate.kind == "torch" else "occlusion",
        samples=len(correlations),
        agreement=2 * shares.value - 1,
        low=2 * shares.low - 1,
        high=2 * shares.high - 1,
        confidence=config.confidence,
        examples=_examples(correlations, seen),
    )


class _Seen(NamedTuple):
    """What the two models looked at in one sample."""

    sample: int
    places: list[int]
    grid: tuple[int, int] | None
    before: np.ndarray
    after: np.ndarray


def _examples(correlations: list[float], seen: list[_Seen]) -> list[AttributionExample]:
    """The samples of least, of median and of most agreement; fewer where there are fewer."""
    order = sorted(range(len(seen)), key=lambda place: (correlations[place], place))
    chosen = dict.fromkeys([order[0], order[len(order) // 2], order[-1]])
    return [_example(correlations[place], seen[place]) for place in chosen]


def _example(agreement: float, one: _Seen) -> AttributionExample:
    rows, columns = one.grid or (None, None)
    before, after = (
        [float(f"{value:.4g}") for value in values[:MOST_PARTS].tolist()] for values in (one.before, one.after)
    )
    return AttributionExample(
        sample=one.sample,
        agreement=agreement,
        places=one.places[:MOST_PARTS],
        before=before,
        after=after,
        rows=rows,
        columns=columns,
    )


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two (parts,) vectors, −1 to 1; ties share their rank. Two constants agree, one does not."""
    ranks = [rankdata(values) - (values.size + 1) / 2 for values in (first, second)]
    norms = [float(np.linalg.norm(rank)) for rank in ranks]
    if min(norms) == 0:
        return float(max(norms) == 0)
    return float(np.clip(ranks[0] @ ranks[1] / (norms[0] * norms[1]), -1.0, 1.0))


Explain = Callable[[Inputs, Tensor, Tensor | None], tuple[Tensor, np.ndarray]]
"""A sample's inputs, its parts and what to explain (None: the model's own answer) to that and (parts,) float64."""


def _by_gradients(checkpoint: Checkpoint, workload: Workload, config: EvaluateConfig) -> Explain:  # noqa: ARG001
    module = to_module(checkpoint, workload)

    def explain(inputs: Inputs, parts: Tensor, goal: Tensor | None) -> tuple[Tensor, np.ndarray]:
        name, blank = _blank(workload, inputs)
        others = [key for key in inputs if key != name]

        def forward(values: Tensor, goals: Tensor, *rest: Tensor) -> Tensor:
            return _answer(module(**{name: values}, **dict(zip(others, rest, strict=True))), goals)

        with frozen(module):
            if goal is None:
                with torch.no_grad():
                    goal = _goal(module(**inputs), workload)
            by_layer = not inputs[name].is_floating_point()
            method = (
                LayerIntegratedGradients(forward, _embedding_of(module, inputs, name))
                if by_layer
                else IntegratedGradients(forward)
            )
            found = method.attribute(
                inputs[name],
                baselines=blank,
                additional_forward_args=(goal, *(inputs[key] for key in others)),
                n_steps=STEPS,
                internal_batch_size=STEPS,
            )
        values = found.detach()[0].sum(-1) if by_layer else found.detach()[0]
        inside = parts >= 0
        return goal, np.bincount(parts[inside].numpy(), weights=values[inside].double().numpy())

    return explain


def _by_occlusion(checkpoint: Checkpoint, workload: Workload, config: EvaluateConfig) -> Explain:
    session = graph.session(checkpoint, config.provider, config.threads)

    def explain(inputs: Inputs, parts: Tensor, goal: Tensor | None) -> tuple[Tensor, np.ndarray]:
        name, blank = _blank(workload, inputs)
        whole = inputs[name]
        taken = [torch.where((parts == part)[None], blank, whole) for part in range(int(parts.max()) + 1)]
        if goal is None:
            goal = _goal(torch.from_numpy(graph.run(session, inputs)), workload)
        answers = []
        for some in torch.split(torch.cat([whole, *taken]), workload.evaluation_batch_size):
            batch = {key: tensor.expand(len(some), *tensor.shape[1:]) for key, tensor in inputs.items()}
            outputs = torch.from_numpy(graph.run(session, batch | {name: some}))
            answers.append(_answer(outputs, goal.expand(len(some), *goal.shape[1:])).double())
        whole_answer, *rest = torch.cat(answers).tolist()
        return goal, whole_answer - np.array(rest)

    return explain


def _goal(output: Tensor, workload: Workload) -> Tensor:
    """What is explained: the class, (1,) int64, or the embedding, (1, dim), that the original answers."""
    return output if workload.outputs == "embeddings" else _last(output).argmax(-1)


def _answer(outputs: Tensor, goals: Tensor) -> Tensor:
    """How much each output says of its goal: (batch,)."""
    if goals.is_floating_point():
        return (outputs * goals).flatten(1).sum(-1)
    return _last(outputs).gather(-1, goals[:, None])[:, 0]


def _last(logits: Tensor) -> Tensor:
    """(batch, classes): of a sequence, the logits at its end."""
    return logits[:, -1] if logits.dim() == 3 else logits


def _samples(workload: Workload) -> Iterator[Inputs]:
    """The evaluation split, one sample at a time and without padding."""
    for batch in workload.batches("evaluation", 1):
        yield batch.inputs


def _blank(workload: Workload, inputs: Inputs) -> tuple[str, Tensor]:
    blanks = workload.blank(inputs)
    fits = [name for name, blank in blanks.items() if name in inputs and blank.shape == inputs[name].shape]
    if len(blanks) != 1 or len(fits) != 1:
        raise WorkloadError(
            f"asking {type(workload).__name__} for a blank input",
            found=", ".join(f"{name} {list(blank.shape)}" for name, blank in blanks.items()) or "nothing",
            expected=f"one of {', '.join(inputs)}, in its shape",
            fix="override Workload.blank",
        )
    return fits[0], blanks[fits[0]]


def _parts(workload: Workload, inputs: Inputs) -> Tensor:
    """Number of the part that each element of the explained input belongs to, −1 where it is blank; without the batch.

    Of whole numbers each is a part; of an image, the fields of a grid; of other floats, runs of neighbours.
    """
    fields, seen = _fields(workload, inputs)
    return torch.where(seen, seen.cumsum(0) - 1, -1)[fields]


def _places(workload: Workload, inputs: Inputs) -> tuple[list[int], tuple[int, int] | None]:
    """The field of each part, and rows and columns of the grid that an image has."""
    name, _ = _blank(workload, inputs)
    whole = inputs[name][0]
    is_image = whole.is_floating_point() and whole.dim() == 3
    grid = (min(GRID, whole.shape[1]), min(GRID, whole.shape[2])) if is_image else None
    found: list[int] = _fields(workload, inputs)[1].nonzero()[:, 0].tolist()
    if grid is not None:  # fields are counted in a grid that is always GRID wide
        found = [place // GRID * grid[1] + place % GRID for place in found]
    return found, grid


def _fields(workload: Workload, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Field of each element of the explained input, and which fields are not blank."""
    name, blank = _blank(workload, inputs)
    whole = inputs[name][0]
    if not whole.is_floating_point():
        parts = torch.arange(whole.numel()).reshape(whole.shape)
    elif whole.dim() == 3:
        rows, columns = (torch.arange(size) * min(GRID, size) // size for size in whole.shape[1:])
        parts = (rows[:, None] * GRID + columns).expand(whole.shape)
    else:
        parts = (torch.arange(whole.numel()) * min(GRID**2, whole.numel()) // whole.numel()).reshape(whole.shape)
    return parts, torch.bincount(parts[whole != blank[0]], minlength=int(parts.max()) + 1) > 0


def _embedding_of(module: nn.Module, inputs: Inputs, name: str) -> nn.Embedding:
    """The embedding that looks this input up."""
    found: list[nn.Embedding] = []

    def note(layer: nn.Module, arguments: tuple[object, ...]) -> None:
        ids = arguments[0]
        fits = isinstance(ids, Tensor) and ids.shape == inputs[name].shape and torch.equal(ids, inputs[name])
        if fits and isinstance(layer, nn.Embedding):
            found.append(layer)

    layers = [layer for layer in module.modules() if isinstance(layer, nn.Embedding)]
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise WorkloadError(
            f"looking for the embedding of {name}",
            found=f"none of {len(layers)} embeddings looks it up",
            expected="a torch.nn.Embedding that takes it as it is",
            fix="set evaluate.attribution_samples to 0",
        )
    return found[0]
