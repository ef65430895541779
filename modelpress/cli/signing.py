"""Commands on trust: `sign`, `trust new-key`, `trust show`, `trust forget`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from modelpress.cli.common import (
    CHAMPION,
    AliasOption,
    JsonOption,
    NameArgument,
    StoreOption,
    app,
    echo,
    opened_store,
    parse_pack,
    rows_table,
    store_settings,
)

trust_app = typer.Typer(name="trust", help="Keys that sign, and keys that count.", no_args_is_help=True)
app.add_typer(trust_app)


@app.command()
def sign(
    pack: Annotated[
        str | None, typer.Argument(metavar="[NAME[@REF]]", help="Pack; REF is an alias or a digest.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every pack and alias that counts now.")] = False,
    signed_by: Annotated[
        str | None, typer.Option(help="With --all: only what this key signed, though it be revoked.")
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a pack whole, and sign it with the key of MODELPRESS_SIGNING_KEY_FILE."""
    from modelpress import load
    from modelpress.errors import ConfigError, TrustError
    from modelpress.trust.again import sign_all, sign_one

    if (pack is None) != everything or (signed_by is not None and not everything):
        found = "both" if pack and everything else "--signed-by alone" if signed_by else "neither"
        raise ConfigError("choosing what to sign", found=found, expected="NAME[@REF], or --all [--signed-by KEY]")
    opened = opened_store(store)
    if pack is not None:
        name, ref = parse_pack(pack)
        done = [sign_one(opened, name, load.resolve(opened, name, ref))]
    else:
        done = list(sign_all(opened, signed_by))
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in done], indent=2))
    elif done:
        echo(rows_table([{"what": one.what, "outcome": one.outcome, "": one.reason.split("\n")[0]} for one in done]))
    refused = [one for one in done if one.outcome == "refused"]
    if refused:
        raise TrustError("signing everything", found="\n".join(f"{one.what}: {one.reason}" for one in refused))


@trust_app.command()
def new_key(
    file: Annotated[Path, typer.Argument(help="The new file of the private key (PEM, mode 0600).")],
    owner: Annotated[str, typer.Option(help="Who holds it.")],
    role: Annotated[str, typer.Option(help="What its signatures count as.")] = "publisher",
    packs: Annotated[list[str] | None, typer.Option(help="Names it may sign, with *; may be repeated.")] = None,
) -> None:
    """Make a pair of keys, and print the entry for the trust file. MODELPRESS_SIGNING_KEY_PASSPHRASE protects it."""
    import yaml

    from modelpress.settings import read_settings
    from modelpress.trust import Signer
    from modelpress.trust.policy import entry_of

    signer = Signer.generate()
    entry = entry_of(signer, owner, role, packs or ["*"])  # refuses illegal words before there is a file
    signer.save(file, read_settings().signing_key_passphrase.get_secret_value())
    typer.echo(
        yaml.safe_dump([entry.model_dump(mode="json", exclude_none=True)], sort_keys=False, width=1000), nl=False
    )


@trust_app.command()
def show(as_json: JsonOption = False) -> None:
    """Show the trust file that MODELPRESS_TRUST names: which keys count now, and what a pack needs."""
    from modelpress.errors import ConfigError
    from modelpress.trust import read_policy
    from modelpress.trust.policy import now

    settings = store_settings(None)
    if settings.trust is None:
        raise ConfigError("showing who is trusted", found="no trust file", fix="set MODELPRESS_TRUST")
    policy, moment = read_policy(settings.trust), now()
    rows = [
        {
            "id": key.id,
            "role": key.role,
            "owner": key.owner,
            "packs": ", ".join(key.packs),
            "state": key.state(moment) or "counts",
        }
        for key in policy.keys
    ]
    if as_json:
        typer.echo(json.dumps({"required": policy.required, "pointers": policy.pointers, "keys": rows}, indent=2))
        return
    echo(f"{settings.trust}: a pack needs {' and '.join(policy.required)}; a pointer {' or '.join(policy.pointers)}")
    echo(rows_table(rows))


@trust_app.command()
def forget(name: NameArgument, alias: AliasOption = CHAMPION, store: StoreOption = None) -> None:
    """Forget how far the log of an alias was seen on this machine, and take it as it is from now on."""
    opened = opened_store(store)
    from modelpress.trust.seen import Seen

    forgotten = Seen(store_settings(store).seen).forget(opened.uri, name, alias)
    echo(f"{name}@{alias} on {opened.uri}: {'forgotten' if forgotten else 'nothing was kept'}")
