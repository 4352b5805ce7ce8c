"""Noise: the float and the fake-quantized run of one graph in lockstep."""

from __future__ import annotations

import copy
import math
import warnings

import torch
from torch import Tensor, fx, nn

import qfx
from qfx.api import graphs
from qfx.errors import QfxWarning
from qfx.metrics import sqnr_db
from qfx.noise import measure
from qfx.roundings import fake_quants
from qfx.spec import INT8, UINT8, IntType, QConfig, QuantSpec, Scheme


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 16), nn.Linear(16, 4), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        return self.second(hidden), self.norm(hidden)


def calibrated(recipe: qfx.Recipe | str = "int8") -> tuple[fx.GraphModule, Tensor, nn.Module]:
    model, x = TwoHeads().eval(), torch.randn(64, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QfxWarning)
        prepared = qfx.calibrate(qfx.prepare(model, x, recipe=recipe, target="reference"), [x])
    return graphs(prepared)[""], x, model


def test_noise_is_that_of_the_fake_quantized_graph() -> None:
    gm, x, model = calibrated()
    noise = measure(gm, (x,))
    want = model(x)
    for got, expected in zip(noise.outputs, want, strict=True):
        torch.testing.assert_close(got, expected)  # the float run

    quantizing = copy.deepcopy(gm)
    for _, module in fake_quants(quantizing):
        module.quantizing = True
    with torch.no_grad():
        rounded = quantizing.forward(x)
    linear = [name for name in noise.by_node if name.startswith("linear")]
    assert math.isclose(noise.by_node[linear[-1]], sqnr_db(want[0], rounded[0]), abs_tol=0.01)
    norm = next(name for name in noise.by_node if name.startswith("layer_norm"))
    assert math.isclose(noise.by_node[norm], sqnr_db(want[1], rounded[1]), abs_tol=0.01)


def test_every_floating_node_is_measured_but_no_constant() -> None:
    gm, x, _ = calibrated()
    noise = measure(gm, (x,))
    calls = {n.name for n in gm.graph.nodes if n.op == "call_function"}
    assert set(noise.by_node) <= calls
    assert {n.split("_")[0] for n in noise.by_node} >= {"linear", "relu", "layer"}
    assert all(20 < value < math.inf for value in noise.by_node.values())


def test_fewer_bits_are_noisier() -> None:
    levels = []
    for bits in (8, 4, 2):
        qconfig = QConfig(QuantSpec(UINT8), QuantSpec(IntType(bits, True), Scheme.SYMMETRIC))
        torch.manual_seed(0)
        gm, x, _ = calibrated(qfx.Recipe("mine", qconfig))
        levels.append(min(measure(gm, (x,)).by_node.values()))
    assert levels[0] > levels[1] + 10 > levels[2] + 15


def test_measuring_changes_nothing() -> None:
    gm, x, _ = calibrated(qfx.Recipe("dynamic", QConfig(None, QuantSpec(INT8, Scheme.SYMMETRIC))))
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    flags = [(m.observing, m.quantizing) for _, m in fake_quants(gm)]
    given = x.clone()
    measure(gm, (x,))
    assert torch.equal(x, given)
    assert flags == [(m.observing, m.quantizing) for _, m in fake_quants(gm)]
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())


def test_in_place_operators_keep_the_runs_apart() -> None:
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    x, y = gm.graph.placeholder("x"), gm.graph.placeholder("y")
    written = gm.graph.call_function(torch.ops.aten.add_.Scalar, (x, 1.0))
    gm.graph.output((gm.graph.call_function(torch.ops.aten.mul.Tensor, (written, y)), x))
    gm.recompile()
    noise = measure(gm, (torch.zeros(3), torch.ones(3)))
    assert noise.by_node == {"add__scalar": math.inf, "mul_tensor": math.inf}
    assert [o.tolist() for o in noise.outputs] == [[1.0] * 3, [1.0] * 3]  # added once, not twice
