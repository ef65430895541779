"""What is known of a pack, gathered for a page: its manifest, its reports, its run, what gates said, who vouches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from modelpress import decisions, keys, load, pointer, run_records, strictjson
from modelpress.decisions import Kept
from modelpress.errors import ConfigError, EncryptionKeyError, FormatError, TrustError
from modelpress.manifest import Manifest
from modelpress.pack_files import read_reports
from modelpress.reports import AdviceCheck, ProfileReport, QualityReport, Report, RunReport, RunStage
from modelpress.reports.advice import AdviceReport
from modelpress.scores import Scored, of_pack
from modelpress.store.base import Store
from modelpress.trust.packs import signatures_of

ReportT = TypeVar("ReportT", bound=Report)
QUALITY = "quality "
"""Beginning of the keys of a pack's reports that hold the quality after a stage."""


@dataclass(frozen=True)
class Story:
    """Everything that a page of one run, or of one pack, is made from."""

    name: str
    manifest: Manifest | None = None
    """None where the run was stopped before it published."""
    numbers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The pack's own reports by stage: numbers without times, of compress each tensor."""
    run: RunReport | None = None
    """The run that made it, in full; None where none is kept."""
    metric: str = "quality"
    """Name of the primary metric."""
    scored: Mapping[str, Scored] = field(default_factory=dict, compare=False)
    """The scores in the pack, sample by sample: `candidate` and `source`."""
    decisions: tuple[Kept, ...] = ()
    """What gates said of it, the oldest first."""
    signatures: tuple[str, ...] = ()
    """One line each."""
    trusted: bool = False
    """Whether the signatures were held to a trust file."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Aliases that point at it, and since when."""
    profile: ProfileReport | None = None
    """A profile that was made beside the run; else the run's own counts."""
    advice: AdviceReport | None = None
    """An advice that was asked for before it."""
    checks: tuple[AdviceCheck, ...] = ()
    """What `advise --check` found of such advice, the oldest first."""
    sealed: str | None = None
    """Why its reports can't be read: it is encrypted, and no key opens it."""
    refused: tuple[str, ...] = ()
    """Why runs that are kept beside it do not count, where none counts."""
    unread: str | None = None
    """Why nothing that lies beside the pack is told: it could not be read when the run ended."""

    @property
    def pack(self) -> str | None:
        """Digest of the pack."""
        return self.manifest.digest if self.manifest is not None else None

    @property
    def config(self) -> Mapping[str, Any]:
        """The recipe."""
        return self.manifest.config if self.manifest is not None else (self.run.config if self.run else {})

    @property
    def source_bytes(self) -> float | None:
        """The source model's checkpoint."""
        if self.run is not None and self.run.source_bytes is not None:
            return self.run.source_bytes
        found = self.numbers.get("source", {}).get("size_bytes")
        return float(found) if isinstance(found, int | float) else None

    @property
    def stages(self) -> list[RunStage]:
        """The stages of the run."""
        return list(self.run.stages) if self.run is not None else []

    def report(self, stage: str, kind: type[ReportT]) -> ReportT | None:
        """A stage's report in full; None where it is not kept, or is of another release's form."""
        found = self.run.stage(stage) if self.run is not None else None
        return read_as(kind, found.report) if found is not None and found.report else None

    def qualities(self) -> dict[str, QualityReport]:
        """Quality by stage, from the run, else from what the pack itself says."""
        if self.run is not None:
            return {one.stage: one.evaluation.quality for one in self.stages if one.evaluation is not None}
        found = {}
        for key, values in self.numbers.items():
            if key.startswith(QUALITY):
                known = {name: value for name, value in values.items() if name in QualityReport.model_fields}
                shown = {name: value for name, value in values.items() if name not in known}
                quality = read_as(QualityReport, {**known, "metric": self.metric, "shown": shown})
                if quality is not None:
                    found[key.removeprefix(QUALITY)] = quality
        return found


def with_report(story: Story, path: Path) -> Story:
    """A story with a report that another command wrote: of `profile` or `advise`, or what `advise --check` keeps.

    Raises:
        ConfigError: it can't be read, is none of them, or has no check of this model.
    """
    found = read_beside(path)
    if isinstance(found, ProfileReport):
        return replace(story, profile=found)
    if isinstance(found, AdviceReport):
        return replace(story, advice=found)
    ours = tuple(one for one in found if one.name == story.name)
    if not ours:
        names = ", ".join(sorted({one.name for one in found})) or "none"
        raise ConfigError(f"reading the checks {path}", found=f"checks of {names}", expected=f"of {story.name}")
    return replace(story, checks=story.checks + ours)


def read_beside(path: Path) -> ProfileReport | AdviceReport | tuple[AdviceCheck, ...]:
    """A report that another command wrote: of `modelpress profile`, of `modelpress advise`, or checks of its advice.

    Raises:
        ConfigError: it can't be read, or is none of them.
    """
    doing = f"reading the report {path}"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(doing, found=str(error), expected="a file") from error
    lines = [line for line in data.splitlines() if line.strip()]
    if path.suffix == ".jsonl":
        checks = [read_as(AdviceCheck, strictjson.loads(line, doing)) for line in lines]
        if wrong := [number for number, one in enumerate(checks, 1) if one is None]:
            raise ConfigError(doing, found=f"line {wrong[0]} is no check", expected="what `advise --check` keeps")
        return tuple(one for one in checks if one is not None)
    document = strictjson.loads(data, doing)
    found = read_as(AdviceReport, document) or read_as(ProfileReport, document)
    if found is None and (check := read_as(AdviceCheck, document)) is not None:
        return (check,)
    if found is None:
        keys_ = ", ".join(sorted(document)[:8]) or "nothing"
        raise ConfigError(doing, found=f"JSON with {keys_}", expected="the report of `profile`, or of `advise`")
    return found


def read_as(kind: type[ReportT], values: Mapping[str, Any]) -> ReportT | None:
    """A report from JSON; what a later release added is left out, and None stands for what does not fit."""
    try:
        return kind.model_validate({key: value for key, value in values.items() if key in kind.model_fields})
    except ValidationError:
        return None


def read_story(store: Store, name: str, ref: str, run: RunReport | None = None) -> Story:
    """Read what a store says of a pack; no weight is read.

    Args:
        store: the publication store.
        name: of the pack.
        ref: an alias, a digest, or its beginning.
        run: the run that made it, where it is at hand; else the newest that is kept beside the pack.

    Raises:
        NotFoundError: there is no such pack or alias.
        TrustError, CorruptionError: see `load.load_manifest`.
    """
    digest = load.resolve(store, name, ref)
    manifest = load.load_manifest(store, name, digest)
    sealed, numbers, metric = None, {}, "quality"
    scored: Mapping[str, Scored] = {}
    try:
        fetch = load.fetcher(store, manifest)
        numbers, scored = read_reports(manifest, fetch), of_pack(manifest, fetch)
        metric = scored["candidate"].metric if "candidate" in scored else metric
    except EncryptionKeyError as error:
        sealed = error.found or error.doing
    refused: tuple[str, ...] = ()
    if run is None:
        try:
            run, problems = run_records.newest(store, name, digest)
            refused = tuple(dict.fromkeys(problem.found or problem.doing for problem in problems))
        except EncryptionKeyError as error:
            sealed = error.found or error.doing
    policy = store.trust.policy() if store.trust is not None else None
    signed = signatures_of(store, policy, name, digest)
    return Story(
        name=name,
        manifest=manifest,
        numbers={stage: found for stage, found in numbers.items() if isinstance(found, dict)},
        run=run,
        metric=metric,
        scored=scored,
        decisions=tuple(reversed(decisions.kept(store, name, digest).found)),
        signatures=tuple(one.line() for one in signed),
        trusted=policy is not None,
        aliases=tuple(_aliases(store, name, digest)),
        sealed=sealed,
        refused=refused,
    )


def _aliases(store: Store, name: str, digest: str) -> list[tuple[str, str]]:
    """Aliases that point at the pack, and since when; one whose log does not count is no alias of anything."""
    found = []
    for alias in sorted(store.folders(f"{keys.manifests(name)}refs/")):
        try:
            entry = pointer.current(store, name, alias)
        except (FormatError, TrustError):
            continue
        if entry is not None and entry.pack == digest:
            found.append((alias, entry.created.isoformat(" ", "seconds")))
    return found
