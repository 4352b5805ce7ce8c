"""Programs that several processes run together on the CPU, and a way to run them."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qfx

from .nets import Mlp, ResNet, settle

WORLD, STEPS, ROWS = 2, 5, 8
SHAPES = {"mlp": (ROWS, 6), "resnet": (ROWS, 3, 6, 6)}


def prepared(kind: str, recipe: str) -> nn.Module:
    torch.manual_seed(3)
    x = torch.randn(SHAPES[kind])
    model = Mlp() if kind == "mlp" else settle(ResNet(), x)
    return qfx.prepare(model, x, recipe=recipe, mode="qat")


def batch(kind: str, step: int) -> Tensor:
    """The joint batch; rows of later ranks are wider, so that ranges differ."""
    x = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(step))
    x[ROWS // WORLD :] *= 2.0
    return x


def steps(
    model: nn.Module,
    kind: str,
    rank: int | None,
    *,
    schedule: qfx.Schedule | None = None,
    spoiled: tuple[int, int] = (-1, -1),
    momentum: float = 0.9,
) -> list[Tensor]:
    """Train on one rank's rows of each batch, or on all; the losses. ``spoiled``: a step and a rank with NaN."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=momentum)
    losses = []
    for step in range(STEPS):
        x = batch(kind, step)
        x = x if rank is None else x.chunk(WORLD)[rank]
        if (step, rank) == spoiled:
            x = x * float("nan")
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if spoiled[0] != step:
            loss.backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(loss.detach())
    return losses


def calibrated(kind: str, recipe: str) -> nn.Module:
    return qfx.calibrate(prepared(kind, recipe), [batch(kind, 0)])


def in_parallel(
    rank: int, kind: str, recipe: str, make: Callable[[str, str], nn.Module] = prepared
) -> dict[str, Any]:
    model = make(kind, recipe)
    wrapped = DistributedDataParallel(model)
    losses = torch.stack(steps(wrapped, kind, rank))
    dist.all_reduce(losses)
    wrapped.eval()
    return {"losses": losses / WORLD, "state": copy.deepcopy(model.state_dict())}


def switched_by_a_schedule(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    model = prepared(kind, recipe)
    schedule = qfx.Schedule(model, float_steps=1, freeze_observers=3, freeze_batch_norm=3)
    steps(DistributedDataParallel(model), kind, rank, schedule=schedule)
    return {"state": model.state_dict()}


def first_batch_spoiled(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    """One rank's first batch holds NaN: nobody waits for the other."""
    model = prepared(kind, recipe)
    steps(model, kind, rank, spoiled=(0, 1))
    return {"state": model.state_dict()}


def no_rows(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    """One rank's batches are empty."""
    model = prepared(kind, recipe)
    x = batch(kind, 0)
    for _ in range(2):
        model(x if rank == 0 else x[:0])
    return {"state": model.state_dict()}


def in_parallel_calibrated(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    return in_parallel(rank, kind, recipe, calibrated)


def sharded_at_once(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    """Learned scales that have not started."""
    model = prepared(kind, recipe)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    try:
        steps(model, kind, rank)
    except qfx.TrainingError as error:
        return {"refusal": str(error)}
    return {}


def sharded(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    model = calibrated(kind, recipe)
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    losses = torch.stack(steps(model, kind, rank))
    dist.all_reduce(losses)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    result: dict[str, Any] = {"losses": losses / WORLD, "state": state}
    try:
        qfx.convert(model.eval())
    except qfx.QfxError as error:
        result["refusal"] = str(error)
    return result


def sharded_by_layer(rank: int, kind: str, recipe: str) -> dict[str, Any]:
    """The refusals, and the losses of training that goes on, sharded as a whole."""
    mesh = init_device_mesh("cpu", (WORLD,))
    model = calibrated(kind, recipe)
    refusals = {}
    parts = {
        "container": lambda: model.layer1,
        "layer": lambda: model.get_submodule("layer1.0.conv1"),
        "batch norm": lambda: model.bn,
        "quantizer": lambda: next(iter(model.fake_quant.children())),
        "list": lambda: [model.bn, model.layer1],
    }
    for name, part in parts.items():
        try:
            fully_shard(part(), mesh=mesh)
        except qfx.QfxError as error:
            refusals[name] = str(error)
    fully_shard(model, mesh=mesh)
    losses = torch.stack(steps(model, kind, rank))
    dist.all_reduce(losses)
    return {"refusals": refusals, "losses": losses / WORLD}


PROGRAMS: dict[str, tuple[Callable[..., dict[str, Any]], str, str]] = {
    "parallel int8": (in_parallel, "mlp", "int8"),
    "parallel lsq": (in_parallel, "mlp", "w4a4_lsq"),
    "parallel with batch norms": (in_parallel, "resnet", "int8"),
    "schedule": (switched_by_a_schedule, "mlp", "w4a4_lsq"),
    "spoiled int8": (first_batch_spoiled, "mlp", "int8"),
    "spoiled lsq": (first_batch_spoiled, "mlp", "w4a4_lsq"),
    "no rows": (no_rows, "mlp", "int8"),
    "parallel calibrated": (in_parallel_calibrated, "mlp", "w4a4_lsq"),
    "sharded int8": (sharded, "mlp", "int8"),
    "parallel calibrated int8": (in_parallel_calibrated, "mlp", "int8"),
    "sharded at once": (sharded_at_once, "mlp", "w4a4_lsq"),
    "sharded": (sharded, "mlp", "w4a4_lsq"),
    "sharded with batch norms": (sharded, "resnet", "w4a4_lsq"),
    "sharded by layer": (sharded_by_layer, "resnet", "w4a4_lsq"),
}


def _main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timeout)
    results: dict[str, Any] = {}
    for name, (program, *arguments) in PROGRAMS.items():
        try:
            results[name] = program(rank, *arguments)
        except Exception:
            results[name] = traceback.format_exc()
        dist.barrier()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_all(folder: Path) -> tuple[dict[str, Any], ...]:
    """What every program returned (or the text of its error) on each rank; starting processes is what takes long."""
    mp.spawn(_main, (str(folder),), nprocs=WORLD)
    return tuple(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD))
