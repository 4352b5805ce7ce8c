"""Several processes train one model: their ranges are those of the joint batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qfx

from . import ranks

Get = Callable[[str], tuple[dict[str, Any], dict[str, Any]]]
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """What both ranks say of a program."""
    results = ranks.run_all(tmp_path_factory.mktemp("ranks"))

    def get(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        for result in results:
            assert isinstance(result[name], dict), result[name]
        return results[0][name], results[1][name]

    return get


def different(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_two_ranks_are_one_process_with_the_joint_batch(of: Get) -> None:
    first, second = of("parallel int8")
    assert not different(first["state"], second["state"])
    alone = ranks.prepared("mlp", "int8")
    losses = torch.stack(ranks.steps(alone, "mlp", None))
    torch.testing.assert_close(first["losses"], losses, rtol=1e-5, atol=1e-7)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)


def test_learned_scales_are_equal_on_all_ranks(of: Get) -> None:
    first, second = of("parallel lsq")
    assert not different(first["state"], second["state"])


def test_ranges_are_bit_identical_to_those_of_the_joint_batch_and_empty_batches_count_for_nothing(of: Get) -> None:
    first, second = of("no rows")
    assert not different(first["state"], second["state"])
    alone = ranks.prepared("mlp", "int8")
    for _ in range(2):
        alone(ranks.batch("mlp", 0))
    assert not different(first["state"], alone.state_dict())


def test_batch_norms_are_kept(of: Get) -> None:
    first, second = of("parallel with batch norms")
    own = different(first["state"], second["state"])
    assert all(name.endswith(("running_mean", "running_var")) for name in own), "each rank's own, as in the float model"
    state = first["state"]
    assert int(state["bn.num_batches_tracked"]) == 3 + ranks.STEPS
    assert all(bool(state[name].abs().sum() > 0) for name in state if name.endswith(("running_var", ".scale")))


def test_a_schedule_leaves_no_parameter_without_gradient(of: Get) -> None:
    """In float steps, and when ranges are frozen, learned scales take no part; DistributedDataParallel goes on."""
    first, second = of("schedule")
    assert not different(first["state"], second["state"])


@pytest.mark.parametrize("recipe", ["int8", "lsq"])
def test_a_spoiled_first_batch_of_one_rank_stops_nobody(of: Get, recipe: str) -> None:
    for result in of(f"spoiled {recipe}"):
        assert all(torch.isfinite(value).all() for value in result["state"].values())


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_shards_as_a_whole(of: Get, recipe: str) -> None:
    suffix = " int8" if recipe == "int8" else ""
    first, _ = of("sharded" + suffix)
    parallel, _ = of("parallel calibrated" + suffix)
    torch.testing.assert_close(first["losses"], parallel["losses"], rtol=1e-5, atol=1e-7)
    assert "load the full state dict" in first["refusal"]
    fresh = ranks.prepared("mlp", recipe)
    fresh.load_state_dict(first["state"])
    for name, value in parallel["state"].items():
        torch.testing.assert_close(fresh.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    qfx.convert(fresh.eval(), check=True)


def test_learned_scales_start_before_they_are_sharded(of: Get) -> None:
    for result in of("sharded at once"):
        assert "before fully_shard" in result["refusal"]


def test_refuses_to_be_sharded_by_layer_and_trains_on(of: Get) -> None:
    first, _ = of("sharded by layer")
    assert first["refusals"].keys() == {"container", "layer", "batch norm", "quantizer", "list"}
    assert all("shard the model as a whole" in text for text in first["refusals"].values())
    assert torch.equal(first["losses"], of("sharded with batch norms")[0]["losses"])
