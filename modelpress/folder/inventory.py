"""Which files of a folder are published, and which are refused: nothing is left out unasked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from modelpress.errors import ConfigError, FormatError, StageError, WorkloadError
from modelpress.manifest import Manifest
from modelpress.progress import Progress
from modelpress.store.local import local_errors

MANIFEST_NAME = "modelpress.json"
WEIGHTS = ".safetensors"
MAX_FILE_BYTES = 2**28
"""A file that holds no safetensors is compressed in memory; a larger one is refused."""
BLOCK_BYTES = 4 * 2**20

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.joblib", "*.dill", "*.mar", "*.nemo")
"""Formats that run code when they are read."""
SECRETS = (
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "*.ovpn", "*.gpg", "*.asc"),
    *("env", "*.env", "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "credentials*", "secrets*", "kubeconfig*"),
    *("*service-account*.json", "*service_account*.json", "token", "token.txt", "htpasswd", "netrc", "*.tfstate"),
)
"""Names that keys and passwords have."""


@dataclass(frozen=True)
class Inventory:
    """What of a folder is published."""

    folder: Path
    weights: list[str]
    """Safetensors files, relative to the folder, sorted."""
    files: list[str]
    """All others."""
    states: dict[str, tuple[int, int, int]] = field(repr=False)
    """By file: size in bytes, time of the last change, inode."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(size for size, _, _ in self.states.values())

    def digests(self, progress: Progress) -> dict[str, str]:
        """sha256 (hex) of every file; `progress` counts bytes."""
        found, done = {}, 0
        for name in sorted(self.states):
            digest = hashlib.sha256()
            with local_errors(f"reading {self.folder / name}"), (self.folder / name).open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    done += len(block)
                    progress(done, self.size_bytes, f"reading {name}")
            found[name] = digest.hexdigest()
        return found

    def check_unchanged(self) -> None:
        """Refuse a folder that was written to since it was listed.

        Raises:
            StageError: a file is another, or has another size or time.
        """
        for name, before in self.states.items():
            with local_errors(f"looking at {self.folder / name}"):
                if _state(self.folder / name) != before:
                    raise self.changed(name)

    def changed(self, name: str) -> StageError:
        """That a file is not what it was."""
        return StageError(
            f"publishing {self.folder}",
            found=f"{name!r} was changed meanwhile",
            expected="a folder that stands still",
            fix="wait until it is written, and publish it again",
        )


def take_inventory(folder: Path, ignore: Sequence[str] = (), *, follow_links: bool = False) -> Inventory:
    """List what of a folder is published.

    Args:
        folder: of a model; folders in it are walked.
        ignore: globs of what is left out: paths relative to the folder, or single names (``.*`` is everything hidden).
        follow_links: take files that symbolic links outside of the folder lead to, as in the cache of the Hugging Face
            hub. Links to folders are never followed.

    Raises:
        ConfigError: a file that is not published (a pickle, a hidden or a secret one, a link outside, one that is no
            plain file, too large, or with a name that a pack cannot hold), or a pattern that fits nothing.
        WorkloadError: the folder is none, or holds no safetensors file.
    """
    with local_errors(f"listing {folder}"):
        if not folder.is_dir():
            raise WorkloadError(f"publishing {folder}", found="no folder", expected="a folder with safetensors files")
        used: set[str] = set()
        names = sorted(_walk(folder, "", ignore, used))
        unused = [pattern for pattern in ignore if pattern not in used]
        if unused:
            raise ConfigError(
                f"publishing {folder}", found=f"nothing that --ignore {unused[0]!r} fits", expected="some"
            )
        refused = [(name, why) for name in names if (why := _refusal(folder, name, follow_links))]
        if refused:
            raise _refused(folder, refused)
        names = [name for name in names if name != MANIFEST_NAME or not _is_manifest(folder / name)]
        states = {name: _state(folder / name) for name in names}
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if not weights:
        raise WorkloadError(
            f"publishing {folder}",
            found=f"{len(names)} files, none of them {WEIGHTS}",
            expected="a model's weights as safetensors",
            fix="save it with save_pretrained(folder)",
        )
    return Inventory(folder, weights, [name for name in names if name not in weights], states)


def _walk(folder: Path, prefix: str, ignore: Sequence[str], used: set[str]) -> Iterator[str]:
    for entry in os.scandir(folder / prefix):
        name = f"{prefix}{entry.name}"
        fits = [one for one in ignore if fnmatchcase(name, one) or fnmatchcase(entry.name, one)]
        if fits:
            used.update(fits)
        elif entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
            yield from _walk(folder, f"{name}/", ignore, used)
        else:
            yield name


def _refusal(folder: Path, name: str, follow_links: bool) -> str | None:
    """Why a file is not published; None if it is."""
    path, home = folder / name, Path(os.path.realpath(folder))
    real = Path(os.path.realpath(path))
    inside = real.is_relative_to(home)
    # A link is also what it leads to, and within the folder what that lies in.
    called = {path.name, *(real.relative_to(home).parts if inside else [real.name])}
    reason = None
    if any(one.startswith(".") for one in called):
        reason = "hidden"
    elif any(fnmatchcase(one.lower(), pattern) for one in called for pattern in SECRETS):
        reason = "named as keys and passwords are"
    elif any(fnmatchcase(one.lower(), pattern) for one in called for pattern in PICKLES):
        reason = "a pickle, or named like one, which runs code where it is read"
    elif not name.isprintable() or any(c in "\\:" for c in name):
        reason = "a name that a pack cannot hold"
    elif path.is_symlink() and not inside and not follow_links:
        reason = "a link that leads outside"
    elif not path.exists() or not stat.S_ISREG(path.stat().st_mode):
        reason = "no plain file"
    elif path.stat().st_size > MAX_FILE_BYTES and not name.endswith(WEIGHTS):
        reason = f"{path.stat().st_size} bytes, of which {MAX_FILE_BYTES} can be held"
    elif name == MANIFEST_NAME and not _is_manifest(path):
        reason = "a name that a pulled pack has its manifest under"
    return reason


def _refused(folder: Path, refused: Sequence[tuple[str, str]]) -> ConfigError:
    shown = [f"{name!r} ({why})" for name, why in refused[:5]]
    rest = f", and {len(refused) - 5} more" if refused[5:] else ""
    links = any("link" in why for _, why in refused)
    return ConfigError(
        f"publishing {folder}",
        found=", ".join(shown) + rest,
        expected="a model's files alone",
        fix="remove or rename them, or leave them out with --ignore PATTERN (--ignore '.*' is everything hidden)"
        + ("; --follow-links takes the files that links lead to" if links else ""),
    )


def _is_manifest(path: Path) -> bool:
    """Whether it is what `pull` writes beside a pack, which is no part of it."""
    try:
        Manifest.parse(path.read_bytes())
    except FormatError:
        return False
    return True


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino
