"""Heads, adapters and experts as modules of their own: a model is split into a trunk and parts, and joined again.

Each piece is a folder of its own, which is published, pulled, loaded and changed by itself. A sheet in it
(`submodel.json`) says which tensors it holds, and of which trunk it is a part: by the digest of the trunk's tensors as
they were at the split. So a head that was trained on the same frozen trunk takes the place of another, and one of
another trunk is refused. What nobody changed comes back bit for bit.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationError

from modelpress.blockwise.tensors import Stored, open_folder
from modelpress.compress import natural_key
from modelpress.container.tensors import to_bytes
from modelpress.errors import ConfigError, CorruptionError, WorkloadError
from modelpress.folder.inventory import take_inventory
from modelpress.hf_writer import INDEX, SHARD_BYTES, SINGLE, FolderWriter, check_folder, new_folder
from modelpress.progress import Progress, silent
from modelpress.reports.base import Report
from modelpress.store.local import local_errors
from modelpress.workloads.hf_folder import read_object

SHEET = "submodel.json"
"""Name of the sheet in a piece's folder."""
TRUNK = "trunk"
"""Name of the piece that holds what is in no part, and all files."""
MAX_SHEET_BYTES = 2**28

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_PIECE = r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$"
PieceName = Annotated[str, StringConstraints(pattern=_PIECE)]


class Held(Report):
    """A tensor as it was when the model was split."""

    dtype: str
    """safetensors dtype name."""
    shape: list[int]
    """Its shape."""
    sha256: Sha256
    """Of its bytes, little-endian, row-major."""


class Sheet(Report):
    """What a piece is."""

    piece: PieceName
    """`trunk`, or the part's name."""
    trunk: Sha256
    """Digest of the trunk's tensors at the split: to which a part belongs."""
    tensors: dict[str, Held]
    """What the piece holds, by name."""
    parts: dict[PieceName, dict[str, Held]] = Field(default_factory=dict)
    """Of the trunk: what each part held at the split."""


class PieceRow(Report):
    """A piece that was written."""

    piece: str
    """Its name."""
    folder: str
    """Where it lies."""
    tensors: int
    """Tensors in it."""
    size_bytes: int
    """Their bytes."""


class SplitReport(Report):
    """How a model was split."""

    trunk: Sha256
    """Digest of the trunk's tensors."""
    pieces: list[PieceRow]
    """The trunk first."""


class JoinReport(Report):
    """What a model was joined from."""

    trunk: Sha256
    """Digest of the trunk's tensors at the split."""
    parts: list[str]
    """Names."""
    tensors: int
    """Of the whole model."""
    size_bytes: int
    """Their bytes."""
    changed: list[str]
    """Tensors that are not the bits that were split off; of a part, those of the model that the trunk comes from."""


def split(folder: Path, parts: Mapping[str, Sequence[str]], to: Path, progress: Progress = silent) -> SplitReport:
    """Split a model's folder into `to/trunk` and `to/PART` for each part. In memory is one tensor at a time.

    Args:
        folder: a Hugging Face folder (safetensors, config, tokenizer); it is left as it is.
        parts: by name, the modules or tensors that belong to it: names or globs, such as `classifier` or
            `*.experts.3`; a module stands for all that is in it.
        to: a folder whose sub-folders are new.
        progress: told of each tensor.

    Raises:
        ConfigError: a name that is no piece's, a pattern that matches nothing, a tensor in two parts, nothing left for
            the trunk, or a folder that is there already.
        WorkloadError, CorruptionError: the folder's tensors cannot be read, or it is a piece itself.
    """
    doing = f"splitting {folder}"
    if (folder / SHEET).exists():
        raise WorkloadError(doing, found=f"a {SHEET}", expected="a whole model", fix="join its pieces first")
    tensors = open_folder(folder)
    owners = _owners(doing, tensors, parts)
    for piece in (TRUNK, *parts):
        check_folder(to / piece)
    others = _files(folder)
    names: dict[str, list[str]] = {TRUNK: [], **{part: [] for part in parts}}
    held: dict[str, Held] = {}
    for done, name in enumerate(sorted(tensors, key=natural_key)):
        progress(done, 2 * len(tensors), f"reading {name}")
        names[owners.get(name, TRUNK)].append(name)
        held[name] = _held(tensors[name])
    if not names[TRUNK]:
        raise ConfigError(doing, found="every tensor in a part", expected="some left for the trunk")
    trunk = _digest({name: held[name] for name in names[TRUNK]})
    rows = []
    for piece, members in names.items():
        split_off = {part: {name: held[name] for name in names[part]} for part in parts} if piece == TRUNK else {}
        sheet = Sheet(piece=piece, trunk=trunk, tensors={name: held[name] for name in members}, parts=split_off)
        files = {SHEET: _spelled(sheet)} | (others if piece == TRUNK else {})
        with new_folder(to / piece) as writer:
            size = _write(writer, ((name, tensors[name]) for name in members))
            writer.finish(files)
        progress(len(tensors) + len(members), 2 * len(tensors), f"wrote {piece}")
        rows.append(PieceRow(piece=piece, folder=str(to / piece), tensors=len(members), size_bytes=size))
    return SplitReport(trunk=trunk, pieces=rows)


def join(pieces: Sequence[Path], to: Path, progress: Progress = silent) -> JoinReport:
    """Write the model that a trunk and its parts make. In memory are one file's tensors at a time.

    Args:
        pieces: folders that `split` wrote, whatever became of the values in them; one trunk, and each of its parts.
        to: new.
        progress: told of each tensor.

    Raises:
        WorkloadError: a part of another trunk, a part that is missing, given twice or unknown, tensors of other names,
            shapes or types than those that were split off, or a folder that is no piece.
        ConfigError: `to` is there already.
    """
    sheets = {folder: read_sheet(folder) for folder in pieces}
    trunk = _check_together(sheets)
    expected = {trunk.piece: trunk.tensors, **trunk.parts}
    found: dict[str, Stored] = {}
    for folder, sheet in sheets.items():
        own = open_folder(folder)
        _check_tensors(folder, sheet, own, expected[sheet.piece])
        found |= own
    before = {name: one for members in expected.values() for name, one in members.items()}
    changed = []
    order = sorted(found, key=natural_key)
    for done, name in enumerate(order):
        progress(done, 2 * len(order), f"reading {name}")
        if _held(found[name]) != before[name]:
            changed.append(name)
    place = next(folder for folder, sheet in sheets.items() if sheet.piece == TRUNK)
    with new_folder(to) as writer:
        size = _write(writer, ((name, found[name]) for name in order))
        writer.finish({name: data for name, data in _files(place).items() if name != SHEET})
    progress(2 * len(order), 2 * len(order), f"{len(order)} tensors")
    return JoinReport(
        trunk=trunk.trunk, parts=sorted(trunk.parts), tensors=len(order), size_bytes=size, changed=changed
    )


def read_sheet(folder: Path) -> Sheet:
    """The sheet of a piece.

    Raises:
        WorkloadError: the folder has none.
        CorruptionError: it is none, or its digest is not that of the tensors that it names.
    """
    path = folder / SHEET
    doing = f"reading {path}"
    with local_errors(doing):
        if not path.is_file():
            raise WorkloadError(doing, found="none", expected="a folder that `modelpress split` wrote")
        if path.stat().st_size > MAX_SHEET_BYTES:
            raise CorruptionError(doing, found=f"{path.stat().st_size} bytes", expected=f"at most {MAX_SHEET_BYTES}")
        data = path.read_bytes()
    try:
        sheet = Sheet.model_validate_json(data)
    except ValidationError as error:
        raise CorruptionError(doing, found=str(error)[:500], expected="a sheet of `modelpress split`") from error
    if sheet.piece == TRUNK and _digest(sheet.tensors) != sheet.trunk:
        raise CorruptionError(
            doing, found=f"tensors with digest {_digest(sheet.tensors)}", expected=f"digest {sheet.trunk}"
        )
    return sheet


def lineage(folder: Path) -> dict[str, dict[str, str]]:
    """What a manifest says of a piece; nothing of a folder that is none."""
    if not (folder / SHEET).is_file():
        return {}
    sheet = read_sheet(folder)
    return {"submodel": {"piece": sheet.piece, "trunk": sheet.trunk}}


def _owners(doing: str, tensors: Mapping[str, Stored], parts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The part of each tensor that is in one."""
    owners: dict[str, str] = {}
    for part, patterns in parts.items():
        if not re.fullmatch(_PIECE, part):
            raise ConfigError(doing, found=f"a part named {part!r}", expected="lower-case letters, digits, . _ and -")
        if part == TRUNK:
            raise ConfigError(doing, found=f"a part named {TRUNK}", expected="another name: what is left is called so")
        for pattern in patterns:
            members = [name for name in tensors if _matches(name, pattern)]
            if not members:
                raise ConfigError(
                    doing,
                    found=f"no module or tensor that {pattern!r} of part {part!r} matches",
                    expected="one at least",
                    fix=f"look at the names, such as {min(tensors, key=natural_key)}",
                )
            for name in members:
                if owners.setdefault(name, part) != part:
                    raise ConfigError(
                        doing, found=f"{name} in {owners[name]!r} and {part!r}", expected="each tensor in one part"
                    )
    if not owners:
        raise ConfigError(doing, found="no parts", expected="one at least, such as head=classifier")
    return owners


def _matches(name: str, pattern: str) -> bool:
    """Whether a tensor, or a module that it is in, has such a name."""
    steps = name.split(".")
    return any(fnmatchcase(".".join(steps[:end]), pattern) for end in range(1, len(steps) + 1))


def _check_together(sheets: Mapping[Path, Sheet]) -> Sheet:
    """The trunk's sheet, if the pieces are those that it needs."""
    doing = f"joining {', '.join(str(folder) for folder in sheets)}"
    trunks = [sheet for sheet in sheets.values() if sheet.piece == TRUNK]
    if len(trunks) != 1:
        raise WorkloadError(doing, found=f"{len(trunks)} trunks", expected="one trunk and its parts")
    (trunk,) = trunks
    for folder, sheet in sheets.items():
        if sheet.trunk != trunk.trunk:
            raise WorkloadError(
                doing,
                found=f"{folder}: part {sheet.piece!r} of trunk {sheet.trunk}",
                expected=f"a part of trunk {trunk.trunk}",
                fix="join it with the trunk that it was split from, or split it anew from a model with this trunk",
            )
    counts = Counter(sheet.piece for sheet in sheets.values())
    wrong = [f"{name} {count} times" for name, count in counts.items() if count > 1]
    wrong += [f"no {name}" for name in trunk.parts if name not in counts]
    wrong += [f"{name}, which it has not" for name in counts if name != TRUNK and name not in trunk.parts]
    if wrong:
        needed = ", ".join(sorted(trunk.parts))
        raise WorkloadError(doing, found="; ".join(wrong), expected=f"the trunk and each of its parts once: {needed}")
    return trunk


def _check_tensors(folder: Path, sheet: Sheet, own: Mapping[str, Stored], expected: Mapping[str, Held]) -> None:
    doing = f"joining part {sheet.piece!r} from {folder}"
    odd = sorted(own.keys() ^ expected.keys(), key=natural_key)
    if odd:
        found = f"{odd[0]}, which it should not hold" if odd[0] in own else f"no {odd[0]}"
        raise WorkloadError(doing, found=found, expected=f"the {len(expected)} tensors that the trunk was split from")
    for name, stored in own.items():
        here, there = (stored.entry.dtype, list(stored.entry.shape)), (expected[name].dtype, expected[name].shape)
        if here != there:
            raise WorkloadError(
                doing,
                found=f"{name}: {here[0]} {here[1]}",
                expected=f"{there[0]} {there[1]}, which the model's config says",
                fix="a part may have other values, and no other shapes",
            )


def _held(stored: Stored) -> Held:
    entry = stored.entry
    digest = hashlib.sha256(to_bytes(stored.read()).data).hexdigest()
    return Held(dtype=entry.dtype, shape=list(entry.shape), sha256=digest)


def _digest(tensors: Mapping[str, Held]) -> str:
    """sha256 (hex) of names, dtypes, shapes and digests, by name."""
    joint = hashlib.sha256()
    for name, one in sorted(tensors.items()):
        joint.update(f"{name}\n{one.dtype} {one.shape} {one.sha256}\n".encode())
    return joint.hexdigest()


def _write(writer: FolderWriter, tensors: Iterator[tuple[str, Stored]]) -> int:
    """Write tensors as files of at most `SHARD_BYTES`, unless one alone is larger; their bytes."""
    total, pending, size = 0, dict[str, Stored](), 0
    for name, stored in tensors:
        if pending and size + stored.entry.size_bytes > SHARD_BYTES:
            writer.put({member: one.read() for member, one in pending.items()})
            pending, size = {}, 0
        pending[name] = stored
        size, total = size + stored.entry.size_bytes, total + stored.entry.size_bytes
    writer.put({member: one.read() for member, one in pending.items()})
    return total


def _files(folder: Path) -> dict[str, bytes]:
    """All that is no weight.

    Raises:
        WorkloadError: there are weights beside the model's.
        And see `take_inventory`.
    """
    inventory = take_inventory(folder, follow_links=True)
    own = {SINGLE} if SINGLE in inventory.weights else set(read_object(folder / INDEX)["weight_map"].values())
    if beside := sorted(set(inventory.weights) - own):
        raise WorkloadError(
            f"reading {folder}",
            found=f"{beside[0]}, of which the model knows nothing",
            expected="the model's own weights",
            fix="take it out of the folder, and publish it by itself",
        )
    with local_errors(f"reading {folder}"):
        return {name: (folder / name).read_bytes() for name in inventory.files if name != INDEX}


def _spelled(sheet: Sheet) -> bytes:
    return (sheet.model_dump_json(indent=1) + "\n").encode()
