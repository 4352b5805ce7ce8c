"""Specs at other widths, and what rounds a prepared graph's layers by them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, fx

from qfx.choices import Choice
from qfx.fake_quant import FakeQuantize
from qfx.layers import Layer, source_of, weight_of
from qfx.operators import tensor_inputs
from qfx.roundings import fake_quant_of
from qfx.spec import IntType, QConfig, QuantSpec

PARTS = ("weight", "activation")


@dataclass(frozen=True, order=True)
class Trial:
    """One tensor of one layer at one width: the ``part`` of the layer ``key`` in ``bits`` bits."""

    key: str
    part: str
    bits: int

    def __str__(self) -> str:
        return f"{self.key} {self.part} {self.bits}"


def at_width(spec: QuantSpec, bits: int) -> QuantSpec:
    """The same spec in ``bits`` bits."""
    return replace(spec, element=IntType(bits, spec.element.signed))


def at_choice(qconfig: QConfig, choice: Choice) -> QConfig | None:
    """The specs that the choice makes of a layer's; None: float. What it leaves out stays as it is."""
    if choice.is_float:
        return None
    weight, activation = qconfig.weight, qconfig.activation
    if weight is not None and choice.weight is not None:
        weight = at_width(weight, choice.weight)
    if activation is not None and choice.activation is not None:
        activation = at_width(activation, choice.activation)
    return QConfig(activation, weight)


class Rounders:
    """What rounds the layers of one CALIBRATED graph at any width; each range is found once.

    Weights are observed at every width anew, data by the observers that calibration has filled.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._made: dict[tuple[FakeQuantize | str, int], FakeQuantize] = {}

    def weight(self, layer: Layer, bits: int) -> Tensor:
        """The layer's weight, rounded; float, of its own shape."""
        spec = layer.qconfig.weight
        assert spec is not None
        weight = weight_of(self.gm, layer)
        module = self._made.get((layer.key, bits))
        if module is None:
            module = FakeQuantize(at_width(spec, bits), layer.path)
            assert module.observer is not None
            module.observer(weight)
            module.calculate()
            self._keep((layer.key, bits), module)
        rounded: Tensor = module(weight)
        return rounded

    def data(self, call: fx.Node, position: int, bits: int) -> FakeQuantize:
        """What rounds the data that the operator reads at a tensor input."""
        calibrated = fake_quant_of(self.gm, tensor_inputs(call)[position])
        assert calibrated is not None and isinstance(calibrated.spec, QuantSpec)
        module = self._made.get((calibrated, bits))
        if module is None:
            module = ranged(calibrated, at_width(calibrated.spec, bits))
            self._keep((calibrated, bits), module)
        return module

    def _keep(self, key: tuple[FakeQuantize | str, int], module: FakeQuantize) -> None:
        module.quantizing = True
        self._made[key] = module


def ranged(calibrated: FakeQuantize, spec: QuantSpec) -> FakeQuantize:
    """A FakeQuantize of ``spec`` with the range that the data of ``calibrated`` give it."""
    module = FakeQuantize(spec, calibrated.layer)
    if calibrated.observer is not None:
        module.observer = calibrated.observer.with_spec(spec)
        module.calculate()
    return module


def observed(gm: fx.GraphModule) -> dict[fx.Node, FakeQuantize]:
    """What has seen each value of a calibrated graph, by the node that makes the value: its widest."""
    found: dict[fx.Node, FakeQuantize] = {}
    for node in gm.graph.nodes:
        module = fake_quant_of(gm, node)
        if module is not None and module.observer is not None:
            found.setdefault(source_of(node, 0), module)
    return found
