"""`python -m flows.demo`: the whole line on two real models, then one prediction of each over HTTP.

No server and no account: Prefect's ephemeral server and MLflow on SQLite, stores in folders, all under `.modelpress/`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from modelpress.config import OptimizeConfig, load_config
from modelpress.errors import CorruptionError, GateError, ModelpressError, ServingError
from modelpress.settings import read_settings, without_logins

if TYPE_CHECKING:
    from flows.result import OptimizeResult

RECIPES = ("configs/digits.yaml", "configs/minilm.yaml")
READY_SECONDS = 60
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "HF_HUB_OFFLINE": "1",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
}

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    """Run the demo; errors that are ours end it with their text and exit code."""
    started = time.monotonic()
    try:
        _prepare()
        recipes = [load_config(path) for path in RECIPES]
        results = [_deliver(config) for config in recipes]
        with _server(results) as url:
            for config, result in zip(recipes, results, strict=True):
                if _promoted(result):
                    _predict(url, config, result)
        _summarise(results, time.monotonic() - started)
        _refuse_if_refused(results)
    except ModelpressError as error:
        console.print(f"[bold red]error:[/] {error}", soft_wrap=True)
        sys.exit(error.exit_code)


class Story(logging.Handler):
    """Prints what stages say of themselves; all else stays in the Prefect UI's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line per stage."""
        if hasattr(record, "stage"):
            console.print(f"  [dim]{time.strftime('%H:%M:%S')}[/] {record.getMessage()}", soft_wrap=True)


def _prepare() -> None:
    """Point everything at `.modelpress/` and let only the story through; called before Prefect is imported."""
    home = read_settings().home.absolute()
    home.mkdir(parents=True, exist_ok=True)  # Prefect makes its own folder, but not the one around it
    for name, value in {**QUIET, "PREFECT_HOME": str(home / "prefect"), "MODELPRESS_HOME": str(home)}.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    console.print("[bold]modelpress demo[/]: two models through the whole line, then served")
    console.print("starting Prefect's ephemeral server, importing torch ...")
    from flows.console import quiet

    quiet()
    logging.getLogger("prefect").addHandler(Story())
    for noisy in ("mlflow", "alembic", "onnxscript", "onnx_ir", "torch.onnx", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _deliver(config: OptimizeConfig) -> OptimizeResult:
    from flows.optimize import optimize

    console.print(f"\n[bold]{config.name}[/]")
    result: OptimizeResult = optimize(config)
    if not result.recomputed:
        console.print("  [green]nothing was recomputed: every stage was taken from the earlier run[/]")
    return result


def _promoted(result: OptimizeResult) -> bool:
    return result.decision is not None and result.decision.promote


def _refuse_if_refused(results: list[OptimizeResult]) -> None:
    refused = [result for result in results if not _promoted(result)]
    if refused:
        raise GateError(
            f"promoting {', '.join(result.name for result in refused)}",
            found="; ".join(result.decision.line() for result in refused if result.decision),
            expected="every check to pass",
        )


@contextmanager
def _server(results: list[OptimizeResult]) -> Iterator[str]:
    """The serving process on a free port, from its start to a graceful end."""
    port = _free_port()
    url, log = f"http://127.0.0.1:{port}", read_settings().home / "serving.log"
    environment = {
        **os.environ,
        "MODELPRESS_SERVING_PORT": str(port),
        "MODELPRESS_SERVING_MODELS": ",".join(result.name for result in results if _promoted(result)),
    }
    console.print(f"\n[bold]serving[/] the champions on {url}")
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", "serving"], env=environment, stderr=output, stdout=output)
        try:
            _wait_ready(process, url, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(READY_SECONDS)


def _wait_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/v2/health/ready", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    last = log.read_text(errors="replace")[-2000:]
    raise ServingError(f"waiting for the server on {url}", found=last, expected=f"ready in {READY_SECONDS} s")


def _predict(url: str, config: OptimizeConfig, result: OptimizeResult) -> None:
    """Ask the server for one prediction and compare it with the pipeline's own graph on the same input."""
    import httpx
    import numpy as np

    from modelpress import graph
    from modelpress.reports import ArtifactRef
    from modelpress.workload import load_workload
    from tasks.runner import fetch_checkpoint

    settings = read_settings()
    inputs = load_workload(config.workload).example(1)
    reference = ArtifactRef(uri=f"{settings.work_uri}/blobs/sha256/{result.graph}", sha256=result.graph, size_bytes=0)
    session = graph.session(fetch_checkpoint(reference), config.evaluate.provider, config.evaluate.threads)
    expected = graph.run(session, inputs)
    answer = httpx.post(f"{url}/v2/models/{result.name}/infer", json=_request(inputs), timeout=60)
    if answer.status_code != 200:
        raise ServingError(f"asking for a prediction of {result.name}", found=answer.text, expected="HTTP 200")
    output = answer.json()["outputs"][0]
    found = np.asarray(output["data"], dtype=np.float32).reshape(output["shape"])
    if not np.array_equal(found, expected):
        raise CorruptionError(
            f"comparing the served prediction of {result.name} with the pipeline's own",
            found=f"a difference of up to {np.abs(found - expected).max():g}",
            expected="the same numbers, bit for bit",
        )
    metadata = httpx.get(f"{url}/v2/models/{result.name}", timeout=60).json()
    first = ", ".join(f"{number:.4f}" for number in found.ravel()[:3])
    console.print(
        f"  {result.name}: {found.shape[-1]} numbers over HTTP, {first}, …: "
        f"[green]equal to the pipeline's own output[/], by pack {metadata['versions'][0][:16]}…",
        soft_wrap=True,
    )


def _request(inputs: dict[str, Any]) -> dict[str, Any]:
    """An Open Inference Protocol v2 request for torch tensors."""
    names = {"torch.float32": "FP32", "torch.int64": "INT64", "torch.int32": "INT32"}
    tensors = [
        {"name": name, "shape": list(x.shape), "datatype": names[str(x.dtype)], "data": x.flatten().tolist()}
        for name, x in inputs.items()
    ]
    return json.loads(json.dumps({"inputs": tensors}))  # type: ignore[no-any-return]


def _summarise(results: list[OptimizeResult], seconds: float) -> None:
    from flows.result import table

    for result in results:
        rows = table(result.stages)
        title = f"[bold]{result.name}[/], quality with its 95 % confidence interval"
        drawn = Table(title=title, title_justify="left", title_style="", box=SIMPLE, padding=(0, 1))
        for head in rows[0]:
            drawn.add_column(head, justify="left" if head == "stage" else "right")
        for row in rows:
            drawn.add_row(*row.values())
        console.print(drawn)
        gate = result.decision.line() if result.decision else "not asked"
        console.print(f"pack    [bold]{result.pack}[/]", soft_wrap=True)
        console.print(
            f"bytes   {result.source_bytes:,} → {result.published_bytes:,}, {result.compression_ratio:.1f}× fewer; "
            f"throughput {result.speedup:.1f}× the source model's in ONNX Runtime",
            soft_wrap=True,
        )
        console.print(f"gate    {gate}\n", soft_wrap=True)
    recomputed = sum(len(result.recomputed) for result in results)
    done = f"{recomputed} stages and evaluations ran" if recomputed else "[green]nothing was recomputed[/]"
    console.print(f"[bold]done in {seconds:.0f} s[/]: {done}. To look around:")
    _print_lines()


def _print_lines() -> None:
    settings, python = read_settings(), Path(sys.executable).parent
    console.print(
        f"  Prefect UI   PREFECT_HOME={os.environ['PREFECT_HOME']} {python}/prefect server start", soft_wrap=True
    )
    console.print(
        f"  MLflow UI    {python}/mlflow ui --backend-store-uri {without_logins(settings.mlflow_uri)}", soft_wrap=True
    )
    console.print(f"  the server   {python}/modelpress serve", soft_wrap=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    main()
