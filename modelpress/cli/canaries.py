"""Commands on candidates that take over step by step: `canary status`, `canary watch`, `canary abort`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from modelpress.cli.common import (
    CHAMPION,
    AliasOption,
    JsonOption,
    NameArgument,
    StoreOption,
    app,
    echo,
    export_store,
    opened_store,
    rows_table,
)

if TYPE_CHECKING:
    from modelpress.canary.decide import Finding
    from modelpress.canary.log import Standing
    from modelpress.canary.tally import Tallies
    from modelpress.config import GateConfig

DEFAULT = "default"
canary_app = typer.Typer(name="canary", help="Candidates that take over step by step.", no_args_is_help=True)
app.add_typer(canary_app)


def begin(name: str, candidate: str, config: str, store: str | None, gate: GateConfig | None = None) -> None:
    """Judge a candidate and begin its canary: `modelpress promote --canary`."""
    from modelpress.config import CanaryConfig, load_canary

    checked = CanaryConfig() if config == DEFAULT else load_canary(Path(config))
    export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.canary import promote_canary

        decision = promote_canary(name, candidate, checked, gate)
    echo(f"{name}: the canary begins; " + "; ".join(decision.reasons))
    echo(f"the deployment `canary` does its steps, or: modelpress canary watch {name}")


@canary_app.command()
def status(
    name: NameArgument, alias: AliasOption = CHAMPION, store: StoreOption = None, as_json: JsonOption = False
) -> None:
    """Show the newest canary: its step, what servers counted, how each test stands."""
    from modelpress.canary import decide, log, tally
    from modelpress.errors import NotFoundError

    opened = opened_store(store)
    standing = log.current(opened, name, alias)
    if standing is None:
        raise NotFoundError(f"looking for a canary of {name}@{alias} in {opened.uri}", found="none")
    config = standing.state.config
    seen = tally.read(opened, name, standing.state.id)
    found = decide.findings(config, seen, decide.levels(config)[0])
    if as_json:
        import json

        document = {
            "canary": standing.state.model_dump(mode="json"),
            "servers": seen.servers,
            "steps": [one.model_dump(mode="json") for _, one in sorted(seen.steps.items())],
            "findings": [one.model_dump(mode="json") for one in found],
            "stopped": seen.stopped,
            "damaged": seen.damaged,
        }
        typer.echo(json.dumps(document, indent=2))
        return
    _show(standing, seen, found)


@canary_app.command()
def watch(
    name: NameArgument,
    alias: AliasOption = CHAMPION,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 30.0,
    store: StoreOption = None,
) -> None:
    """Do the steps from here until the canary has ended, as the deployment `canary` does each minute."""
    export_store(store)
    from flows.console import terminal

    with terminal():
        from flows.canary import canary
        from modelpress.canary import log

        while True:
            canary(name)
            standing = log.current(opened_store(store), name, alias)
            if standing is None or not standing.running:
                break
            time.sleep(every)
    echo(f"{name}@{alias}: {'no canary' if standing is None else standing.state.phase}")


@canary_app.command()
def abort(
    name: NameArgument,
    alias: AliasOption = CHAMPION,
    reason: Annotated[str, typer.Option(help="Why; it is kept in the log.")] = "by hand",
    store: StoreOption = None,
) -> None:
    """End a canary now: servers send the candidate nothing from their next poll on. Needs the store alone."""
    from modelpress.canary import log
    from modelpress.errors import NotFoundError

    opened = opened_store(store)
    standing = log.current(opened, name, alias)
    if standing is None or not standing.running:
        raise NotFoundError(f"ending the canary of {name}@{alias}", found="none that runs")
    ended = log.abort(opened, name, standing, reason)
    echo(f"{name}: the canary of pack {ended.state.candidate} is aborted; {alias} is {ended.entry.pack}, as before")


def _show(standing: Standing, seen: Tallies, found: list[Finding]) -> None:
    state, step = standing.state, standing.state.now
    echo(f"pack {state.candidate} beside {state.champion}: {state.phase}, since {state.began:%Y-%m-%d %H:%M} UTC")
    ran = seen.of(state.step).ran
    echo(
        f"step {state.step + 1} of {len(state.config.steps)}: {step.mode}, share {step.share:g}; "
        f"{ran} of {step.min_requests} requests by {seen.servers} servers"
    )
    for line in [*state.reasons, *seen.stopped, *seen.damaged]:
        echo(f"  {line}")
    rows = [
        {
            "test": one.test,
            "verdict": one.verdict,
            "rate": "" if one.rate is None else f"{one.rate:.4f} [{one.low:.4f}, {one.high:.4f}]",
            "champion": "" if one.champion_rate is None else f"{one.champion_rate:.4f}",
            "outcomes": f"{one.requests:g}",
            "evidence against": f"{one.evidence:.1f} of {one.alarm_at:.1f}",
            "evidence for": f"{one.evidence_kept:.1f} of {one.clear_at:.1f}",
            "bound": one.bound,
        }
        for one in found
    ]
    echo(rows_table(rows))
