"""Modules as StableHLO: OpenXLA's CPU computes what torch computes, at any size, from a folder that JAX alone reads.

Needs `modelpress[xla]`; without it the way out is tested.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelpress import cli
from modelpress.config import ExportConfig
from modelpress.errors import ConfigError, ExportError, SetupError
from modelpress.stablehlo import PLATFORMS, export_stablehlo
from modelpress.workload import Workload
from tests.toys import ImageToy, TextToy

INSTALLED = importlib.util.find_spec("torchax") is not None and importlib.util.find_spec("jax") is not None
needs_xla = pytest.mark.skipif(not INSTALLED, reason="no torchax: pip install 'modelpress[xla]'")

READER = """
import sys
import jax, jax.export, numpy, safetensors.flax
folder = sys.argv[1]
program = jax.export.deserialize(bytearray(open(folder + "/model.jax", "rb").read()))
weights = safetensors.flax.load_file(folder + "/model.safetensors")
inputs = dict(numpy.load(folder + "/../inputs.npz"))
numpy.save(folder + "/../answers.npy", program.call(weights, inputs))
assert "torch" not in sys.modules and "modelpress" not in sys.modules
print(*program.platforms)
"""


@needs_xla
@pytest.mark.parametrize("toy", [ImageToy, TextToy])
def test_a_folder_answers_as_the_module_without_torch(toy: type[ImageToy] | type[TextToy], tmp_path: Path) -> None:
    workload = toy()
    report = export_stablehlo(workload.module, workload, ExportConfig(tolerance=1e-4), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "model.jax",
        "model.json",
        "model.safetensors",
    ]
    assert 0 <= report.max_difference <= 1e-4
    assert report.ran_on == "cpu"
    state = workload.module.state_dict().values()
    assert report.weights == len(state)
    assert report.weights_bytes == sum(_narrow(one).nbytes for one in state)
    inputs = workload.example(5)
    np.savez(tmp_path / "inputs.npz", **{name: _narrow(tensor) for name, tensor in inputs.items()})
    command = [sys.executable, "-c", READER, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(PLATFORMS)
    with torch.inference_mode():
        expected = workload.module(**inputs).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), expected, atol=1e-4)


def _narrow(tensor: Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.int32) if tensor.dtype == torch.int64 else tensor.numpy()


class Positions(nn.Module):
    """A table of 16 positions, of which a text takes the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(100, 8), nn.Embedding(16, 8)
        self.register_buffer("numbers", torch.arange(16).unsqueeze(0), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        numbers = self.numbers[:, : ids.shape[1]].expand(ids.shape[0], -1)
        hidden = self.words(ids) + self.places(numbers)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


@needs_xla
def test_an_axis_may_have_a_largest_size(tmp_path: Path) -> None:
    module = Positions().eval()
    report = export_stablehlo(module, TextToy(module), ExportConfig(tolerance=1e-5), tmp_path / "out")
    assert report.weights == 3, "the positions' numbers are no parameter, and are there"


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) * 1e6 / 3


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@needs_xla
@pytest.mark.parametrize(
    ("module", "tolerance", "said"),
    [(Rounded(), 1e-12, "export.tolerance"), (Branches(), 1e-3, "torch.export can trace")],
    ids=["too far off", "a branch"],
)
def test_what_has_no_such_form_is_an_error_and_leaves_nothing(
    module: nn.Module, tolerance: float, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=said):
        export_stablehlo(module, ImageToy(module), ExportConfig(tolerance=tolerance), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    workload: Workload = ImageToy()
    with pytest.raises(ConfigError, match="a new or empty folder"):
        export_stablehlo(ImageToy().module, workload, ExportConfig(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(INSTALLED, reason="torchax is here")
def test_without_torchax_it_says_what_to_install(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SetupError, match="torchax") as caught:
        export_stablehlo(ImageToy().module, ImageToy(), ExportConfig(), tmp_path / "out")
    assert "modelpress[xla]" in str(caught.value.fix)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("workload: {kind: image-classification, model: digits-cnn, data: digits}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(recipe), "--to", str(tmp_path / "out")])
    assert ended.value.code == SetupError.exit_code
    assert "modelpress[xla]" in capsys.readouterr().err


def test_a_recipe_of_other_things_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("workload: {kind: image-classification, model: digits-cnn, data: digits}\nprune: {}\n")
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(recipe), "--to", str(tmp_path / "out")])
    assert ended.value.code == ConfigError.exit_code
    assert "prune: unknown field; legal here: workload, export" in capsys.readouterr().err
