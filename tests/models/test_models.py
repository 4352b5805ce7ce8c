"""The reference models: structure, seeds, statistics, and that they export with dynamic sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from qfx.models import (
    BERT_BASE,
    BERT_SMALL,
    MODELS,
    MODELS_SMALL,
    VIT_S16,
    Bert,
    BertConfig,
    CifarResNet,
    DigitsResNet,
    Llama,
    LlamaConfig,
    MobileNetV2,
    ResNet,
    Vit,
    VitConfig,
    build_bert,
    build_llama,
    build_resnet,
    build_resnet_cifar,
    load_resnet20,
    load_stories260k,
    random_images,
    random_tokens,
    seeded,
    settle_batch_norm,
    train_digits,
)
from qfx.models.bert import BertLayer
from qfx.models.llama import SwiGlu, rope_tables, rotate
from qfx.models.mobilenet_v2 import InvertedResidual
from qfx.models.resnet import DEPTHS, BasicBlock, Bottleneck
from qfx.models.resnet_cifar import CifarBlock, PaddedShortcut
from qfx.models.vit import VitBlock

NAMES = ["resnet18", "resnet50", "resnet20", "mobilenet_v2", "bert_base", "bert_small", "vit_s16", "llama"]
TOKEN_MODELS = {"bert_base", "bert_small", "llama"}
WITH_BATCH_NORM = ["resnet18", "resnet50", "resnet20", "mobilenet_v2"]


def split(example: Any) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return ((), example) if isinstance(example, dict) else (example, {})


@torch.no_grad()
def call(model: nn.Module, example: Any) -> dict[str, Tensor]:
    args, kwargs = split(example)
    output = model(*args, **kwargs)
    return output if isinstance(output, dict) else {"output": output}


def like(example: Tensor, batch: int, length: int) -> Tensor:
    """An input of another batch size and, where it is one of tokens, another length."""
    if example.is_floating_point():
        return random_images(example.shape[-1], batch=batch, seed=batch)
    return random_tokens(length, int(example.max()) + 1, batch=batch, seed=batch)


def each(example: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(example, dict):
        return {name: change(x) for name, x in example.items()}
    return tuple(change(x) for x in example)


def batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def small_on_tokens(name: str) -> tuple[nn.Module, Tensor]:
    model, example = MODELS_SMALL[name]()
    assert isinstance(example, tuple) and len(example) == 1
    return model, example[0]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


# The tables


def test_both_tables_have_the_same_names_in_the_same_order() -> None:
    assert list(MODELS) == list(MODELS_SMALL) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_small_model_is_in_eval_mode_and_sane(name: str) -> None:
    model, example = MODELS_SMALL[name]()
    assert not any(module.training for module in model.modules())
    assert all(x.shape[0] == 1 for x in (example.values() if isinstance(example, dict) else example))
    for output in call(model, example).values():
        assert output.shape[0] == 1 and output.isfinite().all()
        assert 1e-2 < output.abs().max() < 20


@pytest.mark.parametrize("name", NAMES)
def test_seed_decides_and_global_state_stays(name: str) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, example = MODELS_SMALL[name](seed=3)
    call(first, example)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    second, _ = MODELS_SMALL[name](seed=3)
    other, _ = MODELS_SMALL[name](seed=4)
    assert same_state(first, second)
    assert not same_state(first, other)


@pytest.mark.parametrize("name", NAMES)
def test_exports_with_dynamic_sizes(name: str) -> None:
    model, example = MODELS_SMALL[name]()
    dynamic = torch.export.Dim.DYNAMIC
    # A batch of 1 would be specialised.
    args, kwargs = split(each(example, lambda x: torch.cat([x, x])))
    shapes = each(example, lambda x: {0: dynamic} if x.is_floating_point() else {0: dynamic, 1: dynamic})
    program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False).module()
    for batch, length in ((1, 7), (3, 40)):
        changed = each(example, partial(like, batch=batch, length=length))
        expected, actual = call(model, changed), call(program, changed)
        assert expected.keys() == actual.keys()
        for key, value in expected.items():
            assert value.shape[0] == batch
            assert key not in {"hidden", "output"} or name not in TOKEN_MODELS or value.shape[1] == length
            torch.testing.assert_close(actual[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_full_model_is_sane(name: str) -> None:
    model, example = MODELS[name]()
    small, small_example = MODELS_SMALL[name]()
    assert type(model) is type(small) and type(example) is type(small_example)
    outputs = call(model, example)
    assert outputs.keys() == call(small, small_example).keys()
    assert all(1e-2 < output.abs().max() < 20 for output in outputs.values())


# Structure


@pytest.mark.parametrize(
    "build, parameters",
    [
        (lambda: ResNet(*DEPTHS[18]), 11_689_512),
        (lambda: ResNet(*DEPTHS[34]), 21_797_672),
        (lambda: ResNet(*DEPTHS[50]), 25_557_032),
        (lambda: ResNet(*DEPTHS[101]), 44_549_160),
        (lambda: ResNet(*DEPTHS[152]), 60_192_808),
        (CifarResNet, 269_722),
        (MobileNetV2, 3_504_872),
        (lambda: Bert(BERT_BASE), 109_483_778),
        (lambda: Bert(BERT_SMALL), 28_764_674),
        (lambda: Vit(VIT_S16), 22_050_664),
        (Llama, 260_032),
    ],
)
def test_number_of_parameters_is_the_published_one(build: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_resnet_200_has_200_layers() -> None:
    with torch.device("meta"):
        model = ResNet(*DEPTHS[200])
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum("downsample" not in name for name in layers) == 200


def test_resnet_18_has_torchvisions_names() -> None:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    expected = ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    for stage in range(1, 5):
        for block in range(2):
            path = f"layer{stage}.{block}"
            for index in (1, 2):
                expected += [f"{path}.conv{index}.weight", *(f"{path}.bn{index}.{name}" for name in norm)]
            if stage > 1 and block == 0:
                expected += [f"{path}.downsample.0.weight", *(f"{path}.downsample.1.{name}" for name in norm)]
    expected += ["fc.weight", "fc.bias"]
    with torch.device("meta"):
        assert list(ResNet(*DEPTHS[18]).state_dict()) == expected


@pytest.mark.parametrize(
    "build, shapes",
    [
        (
            lambda: ResNet(*DEPTHS[50]),
            {"layer1.0.conv3.weight": (256, 64, 1, 1), "layer2.0.conv2.weight": (128, 128, 3, 3), "fc.bias": (1000,)},
        ),
        (
            MobileNetV2,
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.2.conv.1.0.weight": (96, 1, 3, 3),
                "features.17.conv.3.running_var": (320,),
                "features.18.1.weight": (1280,),
                "classifier.1.weight": (1000, 1280),
            },
        ),
        (Vit, {"pos_embed": (1, 197, 384), "blocks.11.attn.qkv.bias": (1152,), "patch_embed.proj.bias": (384,)}),
        (Llama, {"layers.4.attention.wk.weight": (32, 64), "layers.0.feed_forward.w2.weight": (64, 172)}),
    ],
)
def test_parameters_have_the_names_and_shapes_of_their_origin(
    build: Callable[[], nn.Module], shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        state = build().state_dict()
    assert {name: tuple(state[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: build_resnet(19), "18, 34, 50, 101, 152, 200"),
        (lambda: build_resnet_cifar(21), "6n"),
        (lambda: build_resnet_cifar(2), "6n"),
        (lambda: BertConfig(dim=100, heads=8), "multiple of heads"),
        (lambda: VitConfig(dim=100, heads=8), "multiple of heads"),
        (lambda: VitConfig(image_size=225), "multiple of patch_size"),
        (lambda: LlamaConfig(dim=72, heads=8), "pairs"),
        (lambda: LlamaConfig(heads=8, kv_heads=3), "multiple of kv_heads"),
        (lambda: build_llama(LlamaConfig(max_length=8))(random_tokens(9, 512)), "8 positions"),
        (lambda: MODELS_SMALL["bert_small"]()[0](random_tokens(65, 200)), "64 positions"),
    ],
)
def test_impossible_sizes_are_refused(build: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# Batch norm


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_statistics_are_settled(name: str) -> None:
    model, _ = MODELS_SMALL[name]()
    norms = batch_norms(model)
    assert norms
    for norm in norms:
        assert norm.num_batches_tracked is not None and norm.running_var is not None
        assert norm.num_batches_tracked == 1 and norm.momentum == 0.1 and not norm.training
        assert not torch.allclose(norm.running_var, torch.ones(()), rtol=1e-3) and (norm.running_var > 0).all()
        assert norm.weight.std() > 0.1 and norm.bias.std() > 0.01


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_settled_batch_norms_give_unit_variance(name: str) -> None:
    model, example = MODELS_SMALL[name]()
    spread: list[float] = []

    def measure(norm: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        plain = (output - norm.bias[:, None, None]) / norm.weight[:, None, None]
        spread.append(float(plain.std()))

    for norm in batch_norms(model):
        norm.register_forward_hook(measure)
    call(model, each(example, lambda x: like(x, 16, 0)))
    assert len(spread) == len(batch_norms(model))
    assert all(0.7 < value < 1.4 for value in spread)


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3, momentum=0.25)
        self.frozen = nn.BatchNorm1d(3, track_running_stats=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        y: Tensor = self.frozen(self.dropout(self.bn(x))) + offset
        return y


@pytest.mark.parametrize("by_name", [False, True])
def test_settling_takes_the_statistics_of_the_batch_and_nothing_else(by_name: bool) -> None:
    model = WithDropout()
    nn.init.constant_(model.bn.running_mean, 99.0)  # type: ignore[arg-type]
    x, offset = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int64)
    before = torch.random.get_rng_state()
    settled = settle_batch_norm(model, {"offset": offset, "x": x} if by_name else (x, offset), batch_size=8, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert settled is model and not any(module.training for module in model.modules())
    assert model.bn.momentum == 0.25
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(model.bn.running_mean, data.mean(0))
    torch.testing.assert_close(model.bn.running_var, data.var(0))


def test_settling_restores_after_an_error() -> None:
    model = WithDropout()
    with pytest.raises(TypeError):
        settle_batch_norm(model, torch.zeros(1, 3))
    assert model.bn.momentum == 0.25 and not model.bn.training


def test_settling_needs_two_examples() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        settle_batch_norm(WithDropout(), torch.zeros(1, 3), batch_size=1)


@pytest.mark.parametrize(("size", "rows"), [(8, 16), (256, 8), (512, 4)])
def test_settling_takes_fewer_examples_of_large_inputs(size: int, rows: int) -> None:
    seen: list[Tensor] = []
    model = nn.BatchNorm2d(1)
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    settle_batch_norm(model, torch.zeros(1, 1, size, size))
    assert [len(x) for x in seen] == [rows]
    assert torch.equal(seen[0], torch.randn(rows, 1, size, size, generator=torch.Generator().manual_seed(0)))


def test_settling_leaves_a_model_without_batch_norm_alone() -> None:
    model = nn.Linear(2, 2)
    weight = model.weight.clone()
    assert settle_batch_norm(model, torch.zeros(1, 7)) is model and not model.training
    assert torch.equal(model.weight, weight)


def test_seeded_stays_on_the_cpu() -> None:
    with torch.device("meta"):
        model = seeded(lambda: nn.Linear(2, 2))
    assert model.weight.device.type == "cpu"


# Loading


@pytest.mark.parametrize("counters", [True, False])
def test_resnet_20_loads_a_state_dict(tmp_path: Path, counters: bool) -> None:
    source = build_resnet_cifar(seed=7)
    state = {name: x for name, x in source.state_dict().items() if counters or "num_batches" not in name}
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= set(
        state
    )
    assert not any("shortcut" in name for name in state)
    torch.save(dict(state), tmp_path / "resnet20.pt")
    x = random_images(32, batch=2)
    loaded = load_resnet20(tmp_path / "resnet20.pt")
    assert not loaded.training
    assert torch.equal(loaded(x), source(x))


def test_shortcut_without_parameters() -> None:
    x = torch.arange(32.0).reshape(1, 2, 4, 4)
    y = PaddedShortcut(2)(x)
    assert y.shape == (1, 4, 2, 2)
    assert not y[:, [0, 3]].any()
    assert y[0, 1].tolist() == [[0, 2], [8, 10]]


@pytest.mark.parametrize("by_folder", [True, False])
def test_llama_loads_a_state_dict_that_names_the_shared_weight_once(tmp_path: Path, by_folder: bool) -> None:
    source = build_llama(seed=7)
    state = {name: x for name, x in source.state_dict().items() if name != "output.weight"}
    assert len(state) == 47
    torch.save(state, tmp_path / "stories260K.pt")
    loaded = load_stories260k(tmp_path if by_folder else tmp_path / "stories260K.pt")
    tokens = random_tokens(9, 512)
    assert not loaded.training and loaded.output.weight is loaded.tok_embeddings.weight
    assert torch.equal(loaded(tokens), source(tokens))


# What each model computes


def zero_last_norm(branch: nn.Module) -> None:
    last = batch_norms(branch)[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


@torch.no_grad()
@pytest.mark.parametrize(
    "build, activation",
    [
        (lambda: BasicBlock(4, 4, 1), torch.relu),
        (lambda: Bottleneck(16, 4, 1), torch.relu),
        (lambda: CifarBlock(4, 1), torch.relu),
        (lambda: InvertedResidual(4, 4, 1, 6), torch.clone),
    ],
)
def test_block_without_its_branch_is_its_shortcut(
    build: Callable[[], nn.Module], activation: Callable[[Tensor], Tensor]
) -> None:
    block = seeded(build)
    zero_last_norm(block)
    x = random_images(6, channels=16 if isinstance(block, Bottleneck) else 4)
    torch.testing.assert_close(block(x), activation(x))


@torch.no_grad()
@pytest.mark.parametrize("block, channels", [(BasicBlock, 8), (Bottleneck, 32)])
def test_block_that_changes_the_shape_projects_its_shortcut(block: Callable[..., nn.Module], channels: int) -> None:
    model = seeded(lambda: block(4, 8, 2))
    projection = model.get_submodule("downsample")
    x = random_images(6, channels=4)
    shortcut = projection(x)
    zero_last_norm(nn.Sequential(*(module for name, module in model.named_children() if name != "downsample")))
    assert shortcut.shape == (1, channels, 3, 3)
    torch.testing.assert_close(model(x), torch.relu(shortcut))


@torch.no_grad()
def test_bert_layer_is_torchs_encoder_layer() -> None:
    config = BertConfig(dim=16, heads=2, hidden=24)
    layer = seeded(lambda: BertLayer(config))
    torchs = nn.TransformerEncoderLayer(16, 2, 24, activation="gelu", batch_first=True, layer_norm_eps=1e-12).eval()
    mine, attention = layer.state_dict(), layer.attention
    projections = (attention.query, attention.key, attention.value)
    names = {"self_attn.out_proj": "attention.output", "norm1": "attention_norm", "norm2": "output_norm"}
    names |= {"linear1": "intermediate", "linear2": "output"}
    state = {
        f"{theirs}.{kind}": mine[f"{name}.{kind}"] for theirs, name in names.items() for kind in ("weight", "bias")
    }
    state["self_attn.in_proj_weight"] = torch.cat([linear.weight for linear in projections])
    state["self_attn.in_proj_bias"] = torch.cat([linear.bias for linear in projections])
    torchs.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(layer(x, None), torchs(x))


@torch.no_grad()
def test_vit_block_is_torchs_encoder_layer() -> None:
    block = seeded(lambda: VitBlock(VitConfig(dim=16, heads=2, hidden=24)))
    torchs = nn.TransformerEncoderLayer(
        16, 2, 24, activation="gelu", batch_first=True, norm_first=True, layer_norm_eps=1e-6
    ).eval()
    mine = block.state_dict()
    names = {"self_attn.out_proj": "attn.proj", "norm1": "norm1", "norm2": "norm2"}
    names |= {"linear1": "mlp.fc1", "linear2": "mlp.fc2"}
    state = {
        f"{theirs}.{kind}": mine[f"{name}.{kind}"] for theirs, name in names.items() for kind in ("weight", "bias")
    }
    state |= {f"self_attn.in_proj_{kind}": mine[f"attn.qkv.{kind}"] for kind in ("weight", "bias")}
    torchs.load_state_dict(state)
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(block(x), torchs(x))


@torch.no_grad()
def test_swiglu_gates_by_w1() -> None:
    model = SwiGlu(LlamaConfig(dim=2, heads=1, kv_heads=1, hidden=1))
    for linear, weight in ((model.w1, [[1.0, 0.0]]), (model.w3, [[0.0, 1.0]]), (model.w2, [[1.0], [-1.0]])):
        linear.weight.copy_(torch.tensor(weight))
    gated = 2.0 * torch.sigmoid(torch.tensor(2.0)) * 3.0
    torch.testing.assert_close(model(torch.tensor([2.0, 3.0])), torch.stack([gated, -gated]))


@torch.no_grad()
def test_positions_matter() -> None:
    bert, ids = small_on_tokens("bert_small")
    assert not torch.allclose(bert(ids)["hidden"], bert(ids.flip(1))["hidden"].flip(1), atol=1e-3)
    vit, example = MODELS_SMALL["vit_s16"]()
    assert isinstance(example, tuple) and isinstance(vit, Vit)
    rows_reversed = example[0].unflatten(2, (4, 8)).flip(2).flatten(2, 3)  # four rows of patches
    assert not torch.allclose(vit(example[0]), vit(rows_reversed), atol=1e-3)
    nn.init.zeros_(vit.pos_embed)
    torch.testing.assert_close(vit(example[0]), vit(rows_reversed))


@torch.no_grad()
def test_llama_does_not_look_ahead() -> None:
    model, tokens = small_on_tokens("llama")
    changed = tokens.clone()
    changed[0, 8:] = 0
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@given(m=st.integers(0, 31), n=st.integers(0, 31), shift=st.integers(0, 32))
def test_rotary_products_depend_on_the_distance_only(m: int, n: int, shift: int) -> None:
    cos, sin = rope_tables(8, 64, 10000.0)
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(m))

    def product(i: int, j: int) -> Tensor:
        return rotate(query, cos[i], sin[i]) @ rotate(key, cos[j], sin[j])

    torch.testing.assert_close(product(m, n), product(m + shift, n + shift), rtol=1e-4, atol=1e-4)


def test_rotary_positions_turn_neighbours() -> None:
    cos, sin = rope_tables(4, 3, 100.0)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 1.0]), cos[2], sin[2])
    angles = torch.tensor([2.0, 0.2])  # two positions at frequencies 1 and 100 ** -0.5
    expected = torch.stack([angles[0].cos(), angles[0].sin(), -angles[1].sin(), angles[1].cos()])
    torch.testing.assert_close(turned, expected)


@torch.no_grad()
def test_llama_shares_each_key_head_among_neighbouring_query_heads() -> None:
    """Grouped-query attention is plain attention with every key and value head written out for its group."""
    config = LlamaConfig(vocab_size=32, dim=16, layers=1, heads=4, kv_heads=2, hidden=24, max_length=8)
    plain = LlamaConfig(vocab_size=32, dim=16, layers=1, heads=4, kv_heads=4, hidden=24, max_length=8)
    model = build_llama(config)
    state = model.state_dict()
    for name in ("wk", "wv"):
        path = f"layers.0.attention.{name}.weight"
        state[path] = state[path].unflatten(0, (2, 4)).repeat_interleave(2, dim=0).flatten(0, 1)
    written_out = build_llama(plain)
    written_out.load_state_dict(state)
    tokens = random_tokens(8, 32)
    torch.testing.assert_close(written_out(tokens), model(tokens))


@torch.no_grad()
def test_bert_ignores_masked_tokens() -> None:
    model, example = MODELS_SMALL["bert_base"]()
    assert isinstance(example, dict)
    example["attention_mask"][:, 10:] = 0
    changed = {**example, "input_ids": example["input_ids"].clone()}
    changed["input_ids"][:, 10:] = 0
    before, after = model(**example), model(**changed)
    torch.testing.assert_close(before["logits"], after["logits"])
    torch.testing.assert_close(before["hidden"][:, :10], after["hidden"][:, :10])
    without = {key: value for key, value in changed.items() if key != "attention_mask"}
    assert not torch.allclose(model(**without)["logits"], after["logits"])


@torch.no_grad()
def test_bert_defaults_are_all_tokens_of_type_zero() -> None:
    model, ids = small_on_tokens("bert_small")
    explicit = model(ids, torch.ones_like(ids), torch.zeros_like(ids))
    for key, value in model(ids).items():
        torch.testing.assert_close(value, explicit[key])
    assert not torch.allclose(model(ids, None, torch.ones_like(ids))["hidden"], explicit["hidden"])


def test_bert_without_head_gives_hidden_states_only() -> None:
    model = build_bert(BertConfig(vocab_size=50, dim=16, layers=1, heads=2, hidden=32, max_length=8, num_labels=0))
    assert model(random_tokens(4, 50)).keys() == {"hidden"}
    assert not any(name.startswith(("pooler", "classifier")) for name in model.state_dict())


# Digits


def test_digits_are_learnt() -> None:
    before = torch.random.get_rng_state()
    with torch.no_grad():  # training switches gradients on for itself
        model, (test_x, test_y), (train_x, train_y) = train_digits()
        accuracy = (model(test_x).argmax(1) == test_y).float().mean()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert accuracy >= 0.975
    assert test_x.shape == (450, 1, 8, 8) and train_x.shape == (1347, 1, 8, 8)
    assert test_y.shape == (450,) and train_y.dtype == torch.int64
    assert not (test_x.flatten(1)[:, None] == train_x.flatten(1)[None]).all(-1).any()
    assert abs(float(train_x.mean())) < 1e-5 and abs(float(train_x.std()) - 1) < 1e-5


def test_training_on_digits_is_decided_by_its_seed() -> None:
    first, second, other = (train_digits(seed, epochs=1)[0] for seed in (1, 1, 2))
    assert isinstance(first, DigitsResNet)
    assert same_state(first, second)
    assert not same_state(first, other)
