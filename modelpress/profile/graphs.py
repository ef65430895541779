"""An ONNX graph by operators: ONNX Runtime's own times, with the shapes of the run itself.

ONNX Runtime fuses and re-orders a graph before it runs it, so the operators are those of the graph that its optimiser
left, which it writes down beside the times. Blocks of runs with and without its profiling take turns: what watching
costs is measured, and no figure of a whole run is one that was watched.

A time that ONNX Runtime reports ends after it has written down what ran, which takes it some microseconds. So much is
taken off each: it is measured on operators of one number, watched and not (`watching_seconds`).
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper
from torch import Tensor

from modelpress import graph
from modelpress.checkpoint import Checkpoint
from modelpress.errors import CorruptionError
from modelpress.profile.counts import INTEGER, Call, Value, flops, total_bytes
from modelpress.profile.ran import Operator, Ran, typical
from modelpress.profile.turns import SPIN_SECONDS, take_turns

MAX_EVENTS = 500_000
"""ONNX Runtime drops events beyond a million; a run has some more than one for each node."""
TICK_SECONDS = 1e-6
"""ONNX Runtime cuts times to whole microseconds: half of one is added to each, which is what is cut on the mean."""
LEAST_SECONDS = 1e-7
"""No operator is faster: what is left of a time after watching was taken off may be nothing, or less."""
CHAIN = 256
"""Operators of the graph by which calls and watching are measured."""
_ADDED_SECONDS = 1e-5
"""What watching is taken to add to a node's time until it has been measured."""
_CALIBRATION_RUNS = 50
_TYPES = {"float": "float32", "double": "float64", "float8e4m3fn": "float8", "float8e5m2": "float8"}
"""ONNX Runtime's names of types that numpy calls otherwise."""
_CONTROL = {"If", "Loop", "Scan", "SequenceMap"}
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size"}
"""ONNX Runtime gives their output the input's memory, or writes a few numbers: no bytes are moved."""
_PICKS = {"Gather", "GatherElements", "GatherND", "Slice"}
"""They read as many elements of their first input as they write."""


@dataclass(frozen=True)
class Event:
    """One call to one node, as ONNX Runtime saw it."""

    node: str
    op_type: str
    seconds: float
    outputs: tuple[Value, ...]


def run_watched(
    checkpoint: Checkpoint, inputs: Mapping[str, Tensor], provider: str, threads: int, seconds: float
) -> Ran:
    """Run a graph for about `seconds`, some runs watched, others not.

    Args:
        checkpoint: of kind `onnx`.
        inputs: of one run, by name.
        provider: ONNX Runtime execution provider that must be in use.
        threads: of one operator; 0 takes the cores that this process may use.
        seconds: time for all runs together.

    Raises:
        SetupError, CorruptionError: see `graph.session`.
        WorkloadError: an input of the graph is missing.
    """
    taken_off = watching_seconds() if provider == "CPUExecutionProvider" else 0.0
    plain = graph.session(checkpoint, provider, threads)
    with tempfile.TemporaryDirectory(prefix="modelpress-profile-") as name:
        folder = Path(name)
        watched = graph.session(checkpoint, provider, threads, watch=folder)
        optimised = onnx.load(str(folder / graph.WATCHED_GRAPH), load_external_data=False)
        nodes = max(1, len(optimised.graph.node))
        turns = take_turns(
            lambda: graph.run(plain, inputs),
            lambda: graph.run(watched, inputs),
            seconds,
            added_seconds=_ADDED_SECONDS * nodes,
            most=MAX_EVENTS // (2 * nodes),
            settle_seconds=0.0 if threads == 1 else SPIN_SECONDS,
        )
        events = read_events(Path(watched.end_profiling()).read_bytes())
    whole = _by_node(events, optimised, len(turns.kept))
    runs = [run for run, kept in zip(whole, turns.kept, strict=True) if kept]
    values = _values(optimised, inputs, runs[-1])
    ordered = _in_order(optimised, runs[-1])
    names = _Names(
        initializers={one.name for one in optimised.graph.initializer},
        given={one.name for one in graph.parse(checkpoint).graph.initializer},
    )
    return Ran(
        operators=[_operator(node, values, names, _times(node, runs, provider), taken_off) for node in ordered],
        run_seconds=typical(turns.plain),
        watched_seconds=typical(turns.watched),
        watched_share=turns.watched_share,
        activations_bytes=alive_bytes(optimised, ordered, values),
    )


@dataclass(frozen=True)
class _Names:
    """Names of constant tensors."""

    initializers: set[str]
    """In the graph that ran; its optimiser folds and re-orders some, under new names."""
    given: set[str]
    """In the graph that was given."""


@functools.cache
def watching_seconds() -> float:
    """What watching adds to the time of an operator on this machine, measured once per process."""
    inputs = {"x0": torch.zeros(1)}
    with tempfile.TemporaryDirectory(prefix="modelpress-profile-") as name:
        watched = graph.session(chain(), threads=1, watch=Path(name))
        for _ in range(_CALIBRATION_RUNS):
            graph.run(watched, inputs)
        runs = read_events(Path(watched.end_profiling()).read_bytes())
    seen = min(sum(event.seconds for event in run) / len(run) for run in runs)
    return max(0.0, seen - call_seconds(_CALIBRATION_RUNS))


def call_seconds(runs: int) -> float:
    """Least time of an operator on one number in so many runs of a chain of them, unwatched."""
    inputs = {"x0": torch.zeros(1)}
    session = graph.session(chain(), threads=1)
    times = []
    for _ in range(runs):
        before = time.perf_counter()
        graph.run(session, inputs)
        times.append(time.perf_counter() - before)
    return min(times) / CHAIN


def chain() -> Checkpoint:
    """A graph of `CHAIN` operators, one after the other, each on one number."""
    nodes = [helper.make_node("Sin", [f"x{n}"], [f"x{n + 1}"], name=f"sin{n}") for n in range(CHAIN)]
    ends = [helper.make_tensor_value_info(f"x{n}", TensorProto.FLOAT, [1]) for n in (0, CHAIN)]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    return graph.split(helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def read_events(data: bytes) -> list[list[Event]]:
    """The calls to nodes in ONNX Runtime's profile (Chrome's trace format), run by run, in order.

    Raises:
        CorruptionError: it is no such profile.
    """
    runs: list[list[Event]] = []
    try:
        timed = [entry for entry in json.loads(data) if "ts" in entry]
        # A run's own entry has the time of its begin, and is written after those of its nodes.
        for entry in sorted(timed, key=lambda one: (float(one["ts"]), one.get("name") != "model_run")):
            name, facts = str(entry["name"]), entry.get("args") or {}
            if entry.get("cat") == "Session" and name == "model_run":
                runs.append([])
            elif entry.get("cat") == "Node" and name.endswith("_kernel_time") and runs:
                outputs = tuple(_value(one) for one in facts.get("output_type_shape", ()))
                taken = float(entry["dur"]) / 1e6 + TICK_SECONDS / 2
                runs[-1].append(Event(name.removesuffix("_kernel_time"), str(facts["op_name"]), taken, outputs))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptionError(
            "reading ONNX Runtime's profile",
            found=f"{type(error).__name__}: {error}",
            expected="events with ts, dur, name and args, as ONNX Runtime 1.23 and later write them",
        ) from error
    return runs


def _value(described: Mapping[str, Sequence[int]]) -> Value:
    ((dtype, shape),) = described.items()
    return Value(_TYPES.get(dtype, dtype), tuple(int(size) for size in shape))


def _by_node(runs: list[list[Event]], optimised: ModelProto, expected: int) -> list[dict[str, Event]]:
    """Each run's events by node; of nodes inside of others none, as their time is in the outer one's.

    Raises:
        CorruptionError: runs are missing in the profile.
    """
    known = Counter(node.name for node in optimised.graph.node)
    if len(runs) != expected:
        raise CorruptionError(
            "reading ONNX Runtime's profile", found=f"{len(runs)} runs", expected=f"{expected}, as many as there were"
        )
    return [{event.node: event for event in run if known[event.node] == 1} for run in runs]


def _in_order(optimised: ModelProto, run: Mapping[str, Event]) -> list[NodeProto]:
    """The nodes in the order in which they ran; those without an event at the end."""
    place = {name: number for number, name in enumerate(run)}
    return sorted(optimised.graph.node, key=lambda node: place.get(node.name, len(place)))


def _times(node: NodeProto, runs: Sequence[Mapping[str, Event]], provider: str) -> list[float] | str:
    """A node's seconds in each run, or why there are none."""
    if provider != "CPUExecutionProvider":
        return f"ONNX Runtime times only the launch of a kernel on {provider}"
    found = [run[node.name].seconds for run in runs if node.name in run]
    return found or "ONNX Runtime reports no time of this node alone"


def _values(optimised: ModelProto, inputs: Mapping[str, Tensor], run: Mapping[str, Event]) -> dict[str, Value]:
    """Type and shape of every value of a run: of inputs, of weights, and of what nodes wrote."""
    values = {
        name: Value(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in inputs.items()
    }
    values |= {one.name: Value(_element_type(one), tuple(one.dims)) for one in optimised.graph.initializer}
    for node in optimised.graph.node:
        event, present = run.get(node.name), [name for name in node.output if name]
        if event is not None and present:
            # An output that nobody reads may be left out of the event; the first one never is.
            whole = len(present) == len(event.outputs)
            values |= dict(zip(present if whole else present[:1], event.outputs, strict=False))
    return values


def _element_type(tensor: TensorProto) -> str:
    name: str = TensorProto.DataType.Name(tensor.data_type).lower()
    return _TYPES.get(name, name)


def _operator(
    node: NodeProto, values: Mapping[str, Value], names: _Names, seconds: list[float] | str, taken_off: float
) -> Operator:
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute} | {"domain": node.domain}
    read = [name for name in dict.fromkeys(node.input) if name]
    written = [values.get(name) for name in node.output if name and (name in values or name == node.output[0])]
    inputs = [values.get(name) if name else None for name in node.input]
    constant = [name for name in read if name in names.initializers]
    call = Call(node.op_type, inputs, written, attributes)
    return Operator(
        name=node.name,
        op_type=node.op_type,
        dtype=_computes_in(call),
        weights=[name for name in constant if name in names.given],
        weight_bytes=total_bytes([values[name] for name in constant]) or 0,
        flops=None if node.op_type in _CONTROL else flops(call),
        read_bytes=_read_bytes(node, [values.get(name) for name in read], written),
        written_bytes=0 if node.op_type in _VIEWS else total_bytes(written),
        seconds=None if isinstance(seconds, str) else max(LEAST_SECONDS, typical(seconds) - taken_off),
        untimed=seconds if isinstance(seconds, str) else "",
    )


def _read_bytes(node: NodeProto, read: Sequence[Value | None], written: Sequence[Value | None]) -> int | None:
    """Bytes of all inputs; of what picks some of a tensor's elements, those that it picks."""
    if node.op_type in _VIEWS:
        return 0
    if node.op_type in _PICKS:
        read = [*written[:1], *read[1:]]
    return total_bytes(read)


def _computes_in(call: Call) -> str:
    """The type of an operator's arithmetic: integers where its products are, else that of its result."""
    few_bits_as_int8 = call.op_type == "MatMulNBits" and call.attributes.get("accuracy_level") == 4
    if call.op_type in INTEGER or few_bits_as_int8:
        return "int8"
    made = call.outputs[0] if call.outputs else None
    return made.dtype if made is not None else "unknown"


def alive_bytes(optimised: ModelProto, nodes: Sequence[NodeProto], values: Mapping[str, Value]) -> int | None:
    """Most bytes of inputs, intermediate values and outputs that are needed at once, in this order of nodes.

    A value is needed from the node that writes it (an input: from the start) to the last one that reads it (an output:
    to the end). None where a shape is not known.
    """
    initializers = {one.name for one in optimised.graph.initializer}
    last = {name: place for place, node in enumerate(nodes) for name in node.input}
    last |= {one.name: len(nodes) for one in optimised.graph.output}
    alive = {one.name: _bytes_of(one.name, values) for one in optimised.graph.input if one.name not in initializers}
    most = 0
    for place, node in enumerate(nodes):
        alive |= {name: _bytes_of(name, values) for name in node.output if name in last}
        sizes = [size for size in alive.values() if size is not None]
        if len(sizes) < len(alive):
            return None
        most = max(most, sum(sizes))
        alive = {name: size for name, size in alive.items() if last.get(name, -1) > place}
    return most


def _bytes_of(name: str, values: Mapping[str, Value]) -> int | None:
    value = values.get(name)
    return None if value is None else value.nbytes
