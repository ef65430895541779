"""Commands on triggers: `hooks serve|register`."""

from __future__ import annotations

from typing import Annotated

import typer

from modelpress.cli.common import StoreOption, app, echo, export_store

hooks = typer.Typer(
    no_args_is_help=True, help="MLflow's webhooks: an alias that is set there is judged within seconds."
)
app.add_typer(hooks, name="hooks")


@hooks.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    run: Annotated[str | None, typer.Option(help="Who looks: `here` or `worker`.")] = None,
    poll_seconds: Annotated[
        float | None, typer.Option(help="How often `here` looks without an event; 0 never.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Receive MLflow's events. The secret comes from MODELPRESS_HOOKS_SECRET_FILE."""
    export_store(store)
    from flows.hooks import main, settings
    from modelpress.settings import read_settings

    main.configure_log()
    main.run(read_settings(), settings.read_settings(host=host, port=port, run=run, poll_seconds=poll_seconds))


@hooks.command()
def register(
    url: Annotated[str, typer.Argument(help="Of the receiver, as MLflow reaches it: https://HOST/mlflow.")],
    test: Annotated[
        bool, typer.Option(help="Let MLflow send an event that means nothing, and fail if it can't.")
    ] = True,
) -> None:
    """Tell MLflow where its events go. Again is no harm: the address and the secret become today's."""
    from flows.hooks import register as registering
    from flows.hooks import settings
    from modelpress.settings import read_settings

    secret = settings.read_settings().secrets()[0]
    done = registering.register(registering.connect(read_settings()), url, secret, test=test)
    echo(f"webhook {done.id} {'made' if done.made else 'brought up to date'}{', and tried' if test else ''}")
