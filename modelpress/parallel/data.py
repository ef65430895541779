"""Which samples of a batch each rank takes, and how they come to it.

The order of the data is the workload's, decided by the seed alone. A batch is cut into as many pieces as there are
ranks and parts: piece p · ranks + r is part p of rank r. So each sample is taken once, whatever the number of ranks,
and a training that was cut off goes on behind the same sample with another number.

`slice`: each rank makes all batches and takes its pieces; nothing is sent. `stream`: the first rank makes them and
sends each rank its pieces, so that the data need be at one place only. `replicate`: each rank gets all of every batch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from modelpress.errors import StageError
from modelpress.parallel.ranks import Ranks
from modelpress.workload import Batch

Distribution = Literal["slice", "stream", "replicate"]
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool)} | {
    str(dtype): dtype for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
}


@dataclass(frozen=True)
class Piece:
    """Samples that are computed at once."""

    batch: Batch
    share: float
    """Its samples among the whole batch's. 0: there were fewer samples than pieces, and this is a stand-in (the first
    sample), computed to keep step with the others and counted as nothing."""


@dataclass(frozen=True)
class Hand:
    """What one rank computes of one batch."""

    pieces: list[Piece]
    samples: int
    """Of the whole batch, over all ranks."""


def cut(batch: Batch, ranks: int, parts: int) -> list[Hand]:
    """A batch's hands, by the number of the rank: each of `parts` pieces, together every sample once."""
    found = [Piece(piece, len(piece) / len(batch)) for piece in batch.cut(ranks * parts)]
    first = Batch(
        {name: tensor[:1] for name, tensor in batch.inputs.items()},
        None if batch.targets is None else batch.targets[:1],
    )
    found += [Piece(first, 0.0)] * (ranks * parts - len(found))
    return [Hand(found[rank::ranks], len(batch)) for rank in range(ranks)]


def hands(
    batches: Iterator[Batch] | None, ranks: Ranks | None, parts: int, how: Distribution, doing: str
) -> Iterator[Hand]:
    """This rank's part of each batch, in order.

    Args:
        batches: whole batches; with `stream` only the first rank's are asked for.
        ranks: None computes alone.
        parts: pieces that each rank gets of a batch.
        how: see above.
        doing: for an error.

    Raises:
        StageError: with `slice`, the ranks' data differ.
    """
    if ranks is None or ranks.size == 1:
        assert batches is not None
        for batch in batches:
            yield cut(batch, 1, parts)[0]
    elif how == "stream":
        yield from _streamed(batches, ranks, parts)
    else:
        assert batches is not None
        for batch in _agreed(batches, ranks, doing):
            yield cut(batch, 1, parts)[0] if how == "replicate" else cut(batch, ranks.size, parts)[ranks.rank]


def check_equal(ranks: Ranks, value: float, doing: str, what: str, fix: str) -> None:
    """Refuse ranks that go on from different numbers; all of them raise.

    Raises:
        StageError: they differ.
    """
    found = [one[0] for one in ranks.gather([value])]
    if len(set(found)) > 1:
        raise StageError(
            doing,
            found=", ".join(f"{what} {one:.12g} at rank {rank}" for rank, one in enumerate(found)),
            expected="the same at each rank",
            fix=fix,
        )


SAME_DATA = (
    "`Workload.batches` must give the same batches for the same seed on each rank: let nothing in it hang on the "
    "process, the machine or the global random state; or set parallel.data to stream, where the first rank alone reads"
)


def _agreed(batches: Iterator[Batch], ranks: Ranks, doing: str) -> Iterator[Batch]:
    """The batches; each is compared before it is used, so that none waits for a rank that has run out of data."""
    number = 0
    while True:
        number += 1
        batch = next(batches, None)
        mark = -1.0 if batch is None else float(_mark(batch))
        check_equal(ranks, mark, f"{doing}, batch {number}", "data (checksum; -1 is none)", SAME_DATA)
        if batch is None:
            return
        yield batch


def _mark(batch: Batch) -> int:
    """Checksum of a batch's length and of its first and last sample: made for each update, it has to be quick."""
    found = len(batch)
    tensors = dict(batch.inputs) if batch.targets is None else {**batch.inputs, "": batch.targets}
    for name, tensor in sorted(tensors.items()):
        ends = torch.stack([tensor[0], tensor[-1]]).contiguous()
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(ends.flatten().view(torch.uint8).numpy().data, found)
    return found


def _streamed(batches: Iterator[Batch] | None, ranks: Ranks, parts: int) -> Iterator[Hand]:
    while True:
        if not ranks.first:
            hand = _receive()
        else:
            assert batches is not None
            batch = next(batches, None)
            dealt = None if batch is None else cut(batch, ranks.size, parts)
            for other in range(1, ranks.size):
                _send(None if dealt is None else dealt[other], other, ranks)
            hand = None if dealt is None else dealt[0]
        if hand is None:
            return
        yield hand


def _send(hand: Hand | None, to: int, ranks: Ranks) -> None:
    tensors: list[Tensor] = []
    rows: list[dict[str, object]] = []
    for piece in [] if hand is None else hand.pieces:
        held = dict(piece.batch.inputs)
        if piece.batch.targets is not None:
            held[""] = piece.batch.targets
        rows.append(
            {
                "share": piece.share,
                "tensors": [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in held.items()],
            }
        )
        tensors += held.values()
    text = json.dumps({"samples": 0 if hand is None else hand.samples, "pieces": rows}).encode()
    for tensor in (torch.tensor([len(text)]), torch.frombuffer(bytearray(text), dtype=torch.uint8)):
        ranks.traffic.sent("control", tensor.nbytes)
        dist.send(tensor, to)
    for tensor in tensors:
        ranks.traffic.sent("data", tensor.nbytes)
        dist.send(_bytes(tensor.contiguous()), to)


def _receive() -> Hand | None:
    length = torch.empty(1, dtype=torch.int64)
    dist.recv(length, 0)
    text = torch.empty(int(length), dtype=torch.uint8)
    dist.recv(text, 0)
    told = json.loads(text.numpy().tobytes())
    pieces = []
    for row in told["pieces"]:
        held: dict[str, Tensor] = {}
        for name, dtype, shape in row["tensors"]:
            held[name] = torch.empty(shape, dtype=_DTYPES[dtype])
            dist.recv(_bytes(held[name]), 0)
        targets = held.pop("", None)
        pieces.append(Piece(Batch(held, targets), row["share"]))
    return Hand(pieces, told["samples"]) if pieces else None


def _bytes(tensor: Tensor) -> Tensor:
    """A tensor's memory; gloo sends few kinds of numbers, and every kind of bytes."""
    return tensor.flatten().view(torch.uint8)
