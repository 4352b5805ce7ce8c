"""A package of somebody else's (tests/plugin), installed as one: pip builds it, qfx finds what is in it by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import qfx

SOURCE = Path(__file__).parent / "plugin"

pytestmark = pytest.mark.xdist_group("plugin")  # one worker installs it, once


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed in; built from a copy, for setuptools writes beside what it builds."""
    tree, folder = tmp_path_factory.mktemp("tree") / "plugin", tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE, tree, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    done = run("-m", "pip", "install", *options, "--target", str(folder), str(tree), cwd=tree)
    assert done.returncode == 0, done.stderr
    return folder


def run(*arguments: str, cwd: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [*([str(site)] if site else []), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


PROGRAM = """
import json, warnings
import torch, qfx
from torch import nn
from qfx.pipeline import PASSES_BY_NAME
from qfx.recipe import RECIPES_BY_NAME
from qfx.targets import TARGETS_BY_NAME, choose

warnings.simplefilter("ignore")

class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)

torch.manual_seed(0)
layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Swish(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 5)
model = nn.Sequential(*layers).eval()
x = torch.randn(32, 3, 6, 6)
pipeline = qfx.Pipeline.default("one-scale", "counting").after("fuse-conv-bn", "fuse-silu")
qmodel = qfx.quantize(
    model, x, calibration=[x], recipe="one-scale", target="counting", pipeline=pipeline, verbose=False
)

from qfx_plugin_example.counting import macs
before = macs(qmodel)
y, expected = qmodel(x[:2]), model(x[:2])
report = qfx.report(qmodel)
listed = [(set(r.names()), name) for r, name in (
    (PASSES_BY_NAME, "fuse-silu"), (RECIPES_BY_NAME, "one-scale"), (TARGETS_BY_NAME, "counting"))]
unknown = {}
for what, call in {
    "pass": lambda: pipeline.after("convert", "fuse-silo"),
    "stage": lambda: qfx.Pipeline.default().after("convert", "fuse-silu") and qfx.Pipeline.default().before(
        "canonicalize", "fuse-silu"),
    "recipe": lambda: qfx.Recipe.preset("one-scales"),
    "target": lambda: choose("countin"),
}.items():
    try:
        call()
    except qfx.ConfigError as error:
        unknown[what] = error.what
print(json.dumps({
    "listed": all(name in names for names, name in listed),
    "text": str(report),
    "names": [report.recipe, report.target],
    "rows": {row.layer: [row.operator, row.kernel, row.reason, row.integer] for row in report.rows},
    "notes": report.notes,
    "sqnr": report.output_sqnr_db,
    "macs": macs(qmodel) - before,
    "error": float((y - expected).detach().norm() / expected.detach().norm()),
    "unknown": unknown,
}))
"""


@pytest.fixture(scope="module")
def told(site: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a program finds out that uses all three by name."""
    done = run("-c", PROGRAM, cwd=tmp_path_factory.mktemp("away"), site=site)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_all_three_are_found_by_name(told: dict[str, Any]) -> None:
    assert told["listed"] and told["names"] == ["one-scale", "counting"]


def test_the_report_shows_all_three(told: dict[str, Any]) -> None:
    assert told["rows"]["0"] == ["conv2d", "counting conv2d+silu", "", True]
    assert told["rows"]["2"] == ["silu", "counting conv2d+silu", "runs inside the kernel of conv2d", True]
    assert told["rows"]["3"] == ["conv2d", "counting conv2d", "", True]
    assert told["rows"]["5"] == ["linear", "", "this machine has no integer unit for linear", False]
    assert ["fuse-silu", "silu of 2 was a sigmoid and a product"] in told["notes"]
    for text in ("one-scale, counting", "counting conv2d", "no integer unit", "fuse-silu: silu of 2"):
        assert text in told["text"]


def test_the_model_runs(told: dict[str, Any]) -> None:
    assert told["error"] < 0.05 and told["sqnr"] > 25
    assert told["macs"] == 2 * 16 * (8 * 27 + 4 * 8)


def test_its_names_are_offered_for_those_that_are_not_there(told: dict[str, Any]) -> None:
    assert told["unknown"] == {
        "pass": "there is no pass 'fuse-silo'; did you mean 'fuse-silu'?",
        "stage": "pass 'fuse-silu' needs a graph at stage CANONICAL, but the passes before it leave CAPTURED",
        "recipe": "there is no recipe 'one-scales'; did you mean 'one-scale'?",
        "target": "there is no target 'countin'; did you mean 'counting'?",
    }


def test_without_the_package_nothing_of_it_is_there() -> None:
    with pytest.raises(qfx.ConfigError, match="there is no recipe 'one-scale'"):
        qfx.Recipe.preset("one-scale")


def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    """With ``qfx.testing`` alone, in a folder of their own."""
    shutil.copytree(SOURCE / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests", cwd=tmp_path, site=site)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


def test_its_tests_are_not_ours(request: pytest.FixtureRequest) -> None:
    assert not [item for item in request.session.items if SOURCE in item.path.parents]
    ignored = [getattr(p, "collect_ignore", ()) for p in request.config.pluginmanager.get_plugins()]
    assert [SOURCE.name] in ignored
