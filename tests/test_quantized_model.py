"""A quantized model is an ordinary module: copied, pickled, sent to workers, loaded, moved, called, differentiated."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qfx
from qfx.metrics import sqnr_db
from qfx.models import MODELS_SMALL
from qfx.targets import TARGETS, Leaf
from qfx.targets.native.inlined import inlined

pytestmark = pytest.mark.filterwarnings("ignore::qfx.QfxWarning")

AVAILABLE = [name for name, target in TARGETS.items() if target.unavailable() is None]
PRESETS = ("int8", "int8_dynamic", "w8a16", "w4a16")


@dataclass
class Config:
    classes: int = 4
    name: str = "net"


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


class Net(nn.Module):
    """Convolution, residual add, pooling, layer norm and linear layers; a dataclass as result; things to carry over."""

    version = "1.2"

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.labels = ["a", "b", "c", "d"]
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.fc, self.head = nn.Linear(8, 32), nn.Linear(32, 4)
        self.register_buffer("table", torch.randn(8), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def forward(self, x: Tensor, bias: float = 0.0, *, hidden: bool = True) -> Output:
        y = self.first(x).relu()
        y = (y + self.second(y)).relu()
        y = self.norm(y.mean((2, 3)) + self.table + bias)
        return Output(self.head(self.fc(y).relu()), y if hidden else None)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(net: Net) -> Callable[..., nn.Module]:
    """Quantized models by recipe and target, made once and handed out as they are."""
    kept: dict[tuple[str, str], nn.Module] = {}

    def get(recipe: str = "int8", target: str = "reference") -> nn.Module:
        key = (recipe, target)
        if key not in kept:
            kept[key] = qfx.quantize(net, X, recipe=recipe, target=target, verbose=False)
        return kept[key]

    return get


each_target = pytest.mark.parametrize("target", AVAILABLE)
each_recipe = pytest.mark.parametrize("recipe", PRESETS)


def logits(model: nn.Module, x: Tensor = X) -> Tensor:
    with torch.no_grad():
        return model(x).logits


# --- copies ---------------------------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": through_pickle,
    "torch.save": through_torch_save,
    "twice": lambda m: copy.deepcopy(through_pickle(through_pickle(m))),
}


@each_target
@each_recipe
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_computes_the_same(made: Callable[..., nn.Module], way: str, recipe: str, target: str) -> None:
    qmodel = made(recipe, target)
    want, of_three = logits(qmodel), logits(qmodel, X[:3])  # packs kernels, which must not be in the way
    twin = WAYS[way](qmodel)
    assert torch.equal(logits(twin), want) and torch.equal(logits(twin, X[:3]), of_three)
    assert isinstance(twin(X), Output) and str(qfx.report(twin)) == str(qfx.report(qmodel))
    assert twin.config == qmodel.config and inspect.signature(twin.forward) == inspect.signature(qmodel.forward)
    assert [k for k, _ in twin.named_buffers()] == [k for k, _ in qmodel.named_buffers()]


@each_target
def test_a_deep_copy_shares_nothing(made: Callable[..., nn.Module], target: str) -> None:
    qmodel = made(target=target)
    want = logits(qmodel).clone()
    twin = copy.deepcopy(qmodel)
    assert not {t.data_ptr() for t in tensors_of(twin)} & {t.data_ptr() for t in tensors_of(qmodel)}
    for t in tensors_of(twin):
        t.zero_()
    assert torch.equal(logits(qmodel), want)


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [t.detach() for t in (*model.parameters(), *model.buffers()) if t.numel()]


def test_a_copy_is_still_refused_as_a_float_model(made: Callable[..., nn.Module]) -> None:
    for way in WAYS.values():
        with pytest.raises(qfx.CaptureError, match="already"):
            qfx.quantize(way(made()), X, verbose=False)


_READER = """
import sys, torch, warnings
warnings.simplefilter("ignore")
model, x, want = torch.load(sys.argv[1], weights_only=False)
assert "qfx.capture" not in sys.argv
with torch.no_grad():
    got = model(x)
assert torch.equal(got["logits"], want), (got["logits"] - want).abs().max()
print(model.config.vocab_size)
"""


def test_a_saved_model_loads_in_another_process(tmp_path: Path) -> None:
    model, example = MODELS_SMALL["bert_small"]()
    qmodel = qfx.quantize(model, example, verbose=False)
    with torch.no_grad():
        want = qmodel(*example)["logits"]
    torch.save((qmodel, example[0], want), tmp_path / "model.pt")
    done = subprocess.run(
        [sys.executable, "-c", _READER, str(tmp_path / "model.pt")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == model.config.vocab_size


_WORKERS = """
import multiprocessing, warnings
import torch
import qfx
from torch import nn

warnings.simplefilter("ignore")
x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


def work(model, inputs, queue):
    with torch.no_grad():
        queue.put(model(inputs).tolist())


if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    q = qfx.quantize(model, x, verbose=False)
    want = q(x).tolist()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=(q, x, queue))
    worker.start()
    assert queue.get(timeout=120) == want
    worker.join()
    print("same")
"""


def test_a_model_is_sent_to_a_spawned_worker(tmp_path: Path) -> None:
    script = tmp_path / "workers.py"
    script.write_text(_WORKERS)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr


# --- state dict -----------------------------------------------------------------------------------------------------


@each_target
@each_recipe
def test_a_state_dict_restores_a_model_whose_buffers_were_changed(
    made: Callable[..., nn.Module], recipe: str, target: str
) -> None:
    qmodel = made(recipe, target)
    want, state = logits(qmodel), copy.deepcopy(qmodel.state_dict())
    twin = copy.deepcopy(qmodel)
    logits(twin)  # packs kernels of the values that are about to change
    persistent = set(state)
    for name, t in (*twin.named_buffers(), *twin.named_parameters()):
        if name in persistent:
            t.detach().copy_(t.detach().flip(-1) if t.ndim else t.detach() + 1)
    twin.load_state_dict(twin.state_dict())
    assert not torch.equal(logits(twin), want)
    keys = twin.load_state_dict(state)
    assert not keys.missing_keys and not keys.unexpected_keys
    assert torch.equal(logits(twin), want)


def test_a_state_dict_passes_through_a_file_of_weights_only(made: Callable[..., nn.Module]) -> None:
    file = io.BytesIO()
    torch.save(made().state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {t.dtype for t in state.values()} <= {torch.float32, torch.int8, torch.uint8, torch.int32}
    twin = copy.deepcopy(made())
    twin.load_state_dict(state)
    assert torch.equal(logits(twin), logits(made()))


def test_a_state_dict_of_another_model_is_refused(made: Callable[..., nn.Module]) -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        copy.deepcopy(made()).load_state_dict(made("w8a16").state_dict())


# --- modes, devices, dtypes -----------------------------------------------------------------------------------------


@each_recipe
def test_eval_and_train_have_no_effect(made: Callable[..., nn.Module], recipe: str) -> None:
    twin = copy.deepcopy(made(recipe))
    assert torch.equal(logits(twin.train()), logits(made(recipe)))
    assert torch.equal(logits(twin.eval()), logits(made(recipe)))
    assert twin.train() is twin and twin.eval() is twin


@each_target
def test_to_the_same_device_and_dtype_changes_nothing(made: Callable[..., nn.Module], target: str) -> None:
    twin = copy.deepcopy(made(target=target))
    logits(twin)
    for moved in (twin.to("cpu"), twin.cpu(), twin.float(), twin.to(torch.float32), twin.to(device="cpu")):
        assert moved is twin
        assert torch.equal(logits(twin), logits(made(target=target)))


@each_recipe
@pytest.mark.parametrize(
    "change", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda m: m.to(torch.float16)]
)
def test_another_dtype_is_refused_and_nothing_is_changed(
    made: Callable[..., nn.Module], recipe: str, change: Callable[[nn.Module], nn.Module]
) -> None:
    twin = copy.deepcopy(made(recipe))
    with pytest.raises(qfx.UnsupportedError, match="convert the float model first"):
        change(twin)
    assert torch.equal(logits(twin), logits(made(recipe)))


def test_meta_has_no_values_but_keeps_the_shapes(made: Callable[..., nn.Module]) -> None:
    twin = copy.deepcopy(made()).to("meta")
    assert all(t.is_meta for t in (*twin.parameters(), *twin.buffers()))
    assert twin(X.to("meta")).logits.shape == (8, 4)


# --- gradients ------------------------------------------------------------------------------------------------------


@each_recipe
def test_parameters_need_no_gradient_and_the_users_keep_theirs(net: Net, recipe: str) -> None:
    qmodel = qfx.quantize(net, X, recipe=recipe, target="reference", verbose=False)
    assert not any(p.requires_grad for p in qmodel.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not qmodel(X).logits.requires_grad


@each_target
@pytest.mark.parametrize("recipe", ["w8a16", "w4a16"])
def test_weight_only_models_pass_gradients_to_their_input(
    made: Callable[..., nn.Module], net: Net, recipe: str, target: str
) -> None:
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    made(recipe, target)(x).logits.sum().backward()
    net(y).logits.sum().backward()
    assert x.grad is not None and y.grad is not None
    assert sqnr_db(y.grad, x.grad) > (25 if recipe == "w8a16" else 5)
    net.zero_grad()


@each_target
@pytest.mark.parametrize("recipe", ["int8", "int8_dynamic"])
def test_integer_activations_refuse_gradients_by_name(made: Callable[..., nn.Module], recipe: str, target: str) -> None:
    qmodel, x = made(recipe, target), X.clone().requires_grad_()
    with pytest.raises(qfx.UnsupportedError, match=r"Net .* no gradient[\s\S]*no_grad"):
        qmodel(x)
    with pytest.raises(qfx.UnsupportedError):
        qmodel(x=x)
    with torch.no_grad():
        assert torch.equal(qmodel(x).logits, logits(qmodel))
    assert torch.equal(qmodel(x.detach()).logits, logits(qmodel))


@each_target
@each_recipe
def test_inference_mode_and_out_of_it_again(net: Net, recipe: str, target: str) -> None:
    """The first call packs the kernels: made in inference mode, they must serve outside of it too."""
    qmodel = qfx.quantize(net, X, recipe=recipe, target=target, verbose=False)
    with torch.inference_mode():
        inside = copy.deepcopy(qmodel)(X).logits.clone()
    twin = copy.deepcopy(qmodel)
    with torch.inference_mode():
        twin(X)
    outside = twin(X).logits
    assert torch.equal(outside, inside)
    if recipe.endswith("a16"):
        x = X.clone().requires_grad_()
        twin(x).logits.sum().backward()
        assert x.grad is not None


# --- calls ----------------------------------------------------------------------------------------------------------


@each_target
@each_recipe
@pytest.mark.parametrize("batch", [1, 2, 3, 33])
def test_other_batches_give_each_row_what_it_gives_alone(
    made: Callable[..., nn.Module], batch: int, recipe: str, target: str
) -> None:
    x = torch.randn(batch, 3, 10, 10)
    together = logits(made(recipe, target), x)
    alone = torch.cat([logits(made(recipe, target), row[None]) for row in x])
    # Float operators between the integer ones may sum in another order for another batch: rarely a rounding flips.
    assert together.shape == (batch, 4) and sqnr_db(alone, together) > 38


@each_target
def test_an_empty_batch_gives_an_empty_result(made: Callable[..., nn.Module], target: str) -> None:
    assert logits(made(target=target), X[:0]).shape == (0, 4)


@each_target
def test_memory_formats_and_strides_do_not_matter(made: Callable[..., nn.Module], target: str) -> None:
    qmodel = made(target=target)
    want = logits(qmodel)
    last = X.to(memory_format=torch.channels_last)
    strided = X.transpose(2, 3).contiguous().transpose(2, 3)
    sliced = torch.cat([X, X], 1)[:, :3]
    for x in (last, strided, sliced):
        assert sqnr_db(want, logits(qmodel, x)) > 60


def test_calls_by_position_by_keyword_and_with_defaults(made: Callable[..., nn.Module]) -> None:
    qmodel = made()
    want = logits(qmodel)
    for out in (qmodel(X, 0.0), qmodel(x=X), qmodel(X, bias=0.0, hidden=True), qmodel(hidden=True, x=X)):
        assert type(out) is Output and torch.equal(out.logits, want) and out.hidden is not None
    assert list(inspect.signature(qmodel.forward).parameters) == ["x", "bias", "hidden"]


def test_constants_are_part_of_the_graph(net: Net) -> None:
    qmodel = qfx.quantize(net, {"x": X, "hidden": False}, target="reference", verbose=False)
    assert qmodel(X, hidden=False).hidden is None
    with pytest.raises(qfx.CaptureError, match="argument hidden should be False"):
        qmodel(X)


def test_plain_attributes_are_carried_over_as_copies(made: Callable[..., nn.Module], net: Net) -> None:
    qmodel = made()
    assert qmodel.config == net.config and qmodel.config is not net.config
    assert qmodel.labels == net.labels and qmodel.labels is not net.labels
    assert qmodel.version == "1.2" and qmodel.dtype == torch.float32
    assert type(qmodel).__name__ == "Net"


def test_hooks_of_the_caller_run(made: Callable[..., nn.Module]) -> None:
    twin, seen = copy.deepcopy(made()), []
    handle = twin.register_forward_hook(lambda module, args, out: seen.append(type(out).__name__))
    twin(X)
    handle.remove()
    twin(X)
    assert seen == ["Output"]


@each_target
def test_leaves_are_named_after_the_users_layers(made: Callable[..., nn.Module], target: str) -> None:
    leaves = {name for name, m in inlined(made(target=target)).named_modules() if isinstance(m, Leaf)}
    assert {"first", "second", "fc", "head"} <= {re.sub(r"^native(_\d+)?\.graph\.", "", name) for name in leaves}


def test_printing_a_model_shows_its_kernels(made: Callable[..., nn.Module]) -> None:
    assert "reference conv2d" in repr(made())
    assert "conv" in made().print_readable(print_output=False)  # fx's own tools work on it
