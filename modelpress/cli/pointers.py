"""Commands on what is served, and why: `promote`, `rollback`, `history`, `decisions`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modelpress.cli.canaries import begin
from modelpress.cli.common import (
    CHAMPION,
    AliasOption,
    JsonOption,
    NameArgument,
    PackOrNameArgument,
    StoreOption,
    app,
    echo,
    export_store,
    opened_store,
    rows_table,
)

if TYPE_CHECKING:
    from modelpress.config import GateConfig
    from modelpress.decisions import Kept
    from modelpress.reports import Override

MAX_NAME, MAX_REASON = 100, 1000


@app.command()
def promote(
    name: NameArgument,
    candidate: Annotated[str, typer.Argument(help="An alias, a model version's number or a digest.")] = "challenger",
    override: Annotated[
        str | None,
        typer.Option(metavar="REASON", help="Promote it although it does not pass, for this reason; it is kept."),
    ] = None,
    by: Annotated[str | None, typer.Option(metavar="WHO", help="Who overrides; it is kept.")] = None,
    canary: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="Step by step, watched by tests: a YAML file of steps, or `default`."),
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(metavar="CONFIG", help="By the conditions in this YAML file, and not by the pack's own."),
    ] = None,
    judge_only: Annotated[
        bool, typer.Option("--judge-only", help="Keep the decision, and move nothing: for who promotes it later.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Judge a published pack on its own bytes, and move the alias if it passes."""
    against = _override(override, by)
    conditions = _conditions(gate)
    if canary is not None:
        if against is not None or judge_only:
            from modelpress.errors import ConfigError

            found = "--judge-only" if judge_only else "--override"
            raise ConfigError("beginning a canary", found=found, expected="a candidate that passes the gate")
        begin(name, candidate, canary, store, conditions)
        return
    export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.promote import promote as flow

        decision = flow(name, candidate, conditions, against, not judge_only)
    done = "judged, and not moved" if judge_only else "promoted"
    echo(f"{name}: {done} ({decision.outcome()}); " + "; ".join(decision.reasons))


def _conditions(path: str | None) -> GateConfig | None:
    """Those in a file; None: the pack's own."""
    if path is None:
        return None
    from modelpress.config import load_gate

    return load_gate(path)


def _override(reason: str | None, by: str | None) -> Override | None:
    """What was given for an override, both or neither.

    Raises:
        ConfigError: half of it, or an empty text.
    """
    if reason is None and by is None:
        return None
    from modelpress.errors import ConfigError
    from modelpress.reports import Override

    if not (reason and reason.strip() and by and by.strip()):
        found = "no name of who does" if reason and reason.strip() else "no reason"
        raise ConfigError("overriding the gate", found=found, expected='--override "REASON" --by WHO')
    if len(reason) > MAX_REASON or len(by) > MAX_NAME:
        found = f"{len(reason)} and {len(by)} characters"
        expected = f"a reason of at most {MAX_REASON} and a name of at most {MAX_NAME}"
        raise ConfigError("overriding the gate", found=found, expected=expected)
    return Override(by=by.strip(), reason=reason.strip())


@app.command()
def rollback(
    name: NameArgument,
    alias: AliasOption = CHAMPION,
    to: Annotated[str | None, typer.Option(help="Digest to go back to; left out, the pack before.")] = None,
    pointer_only: Annotated[
        bool, typer.Option("--pointer-only", help="Move only what servers follow: for when MLflow or Prefect is down.")
    ] = False,
    signed_by: Annotated[
        str | None,
        typer.Option(help="With --pointer-only: leave an entry that this key signed, though it be revoked."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Point an alias back at an earlier pack."""
    if signed_by is not None and not pointer_only:
        from modelpress.errors import ConfigError

        raise ConfigError("rolling back", found="--signed-by alone", expected="--pointer-only --signed-by KEY")
    if pointer_only:
        from modelpress import load, pointer
        from modelpress.trust.again import pardoned

        opened = opened_store(store)
        accepted = pardoned(opened, signed_by) if signed_by else None
        target = load.resolve(opened, name, to) if to else None
        pack = pointer.rollback(opened, name, alias, target, accepted=accepted).pack
    else:
        export_store(store)
        from flows.console import terminal

        with terminal():
            from flows.promote import rollback as flow

            pack = flow(name, alias, to)
    echo(f"{name}@{alias} is pack {pack} again")


@app.command()
def history(
    name: NameArgument, alias: AliasOption = CHAMPION, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Show the log of an alias: when, who, why, what the gate said, which pack."""
    from modelpress import decisions as kept
    from modelpress import pointer
    from modelpress.errors import NotFoundError

    opened = opened_store(store)
    entries = pointer.history(opened, name, alias)
    for number, record in kept.unkept(opened, name, entries).items():
        typer.echo(f"entry {number}: the decision {record} that it rests on is gone", err=True)
    if as_json:
        typer.echo(json.dumps([entry.model_dump(mode="json") for entry in entries], indent=2))
        return
    if not entries:
        raise NotFoundError(f"reading the log of {name}@{alias} in {opened.uri}", found="no entry")
    rows = [
        {
            "number": str(entry.number),
            "when": entry.created.isoformat(" ", "seconds"),
            "who": entry.who,
            "why": entry.reason,
            "gate": _outcome(entry.decision),
            "pack": entry.pack,
        }
        for entry in entries
    ]
    echo(rows_table(rows))


@app.command()
def decisions(
    target: PackOrNameArgument,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    older: Annotated[
        str | None, typer.Option(metavar="PACK/DECISION", help="Those that are older than this one: the next page.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what gates decided of a pack, or of all packs of a name, the newest first: promotions, refusals, overrides.

    Of a single pack (NAME@REF), with the reasons. Decisions that were deleted are shown where one after them is.
    """
    from modelpress import decisions as kept
    from modelpress.errors import NotFoundError

    opened, pack = opened_store(store), ""
    name, _, ref = target.partition("@")
    if ref:
        from modelpress import load  # pulls in torch

        pack = load.resolve(opened, name, ref)
    page = kept.kept(opened, name, pack, most=limit, older=older)
    found = [*page.found, *page.gone]
    if page.older is not None:
        typer.echo(f"older ones: modelpress decisions {target} --limit {limit} --older {page.older}", err=True)
    if as_json:
        typer.echo(json.dumps([_described(one) for one in found], indent=2))
        return
    if not found:
        raise NotFoundError(f"looking for decisions on {target} in {opened.uri}", found="none is kept")
    echo(rows_table([_row(one, signatures=opened.trust is not None) for one in found]))
    for one in found if ref else ():
        if one.record is not None:
            echo(f"\n{one.record.created.isoformat(' ', 'seconds')} {one.record.decision.outcome()}")
            for reason in one.record.decision.reasons:
                echo(f"  {reason}")


def _outcome(decision: dict[str, Any] | None) -> str:
    """What the gate said by a pointer's entry; a dash where no gate was asked."""
    from pydantic import ValidationError

    from modelpress.decisions import RECORD
    from modelpress.reports import Decision

    if decision is None:
        return "–"
    try:
        return Decision.model_validate({key: value for key, value in decision.items() if key != RECORD}).outcome()
    except ValidationError:  # the caller's own words, or a newer release's
        return "?"


def _described(one: Kept) -> dict[str, Any]:
    """For programs."""
    record = one.record.model_dump(mode="json") if one.record is not None else None
    return {"key": one.key, "record": record, "problem": one.problem.found if one.problem is not None else None}


def _row(one: Kept, *, signatures: bool) -> dict[str, str]:
    """For people."""
    record = one.record
    if record is None:
        found = (one.problem.found if one.problem is not None else None) or "unreadable"
        row = {"when": "–", "who": "–", "alias": "–", "gate": found, "moved": "–", "pack": one.key.split("/")[-2]}
    else:
        row = {
            "when": record.created.isoformat(" ", "seconds"),
            "who": record.who,
            "alias": record.alias,
            "gate": record.decision.outcome(),
            "moved": "yes" if record.decision.promote else "no",
            "pack": record.pack,
        }
    vouched = "counts" if one.problem is None else (one.problem.found or "does not count")
    return row | ({"signature": vouched} if signatures else {})
