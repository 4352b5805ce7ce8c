"""The schedule of quantization-aware training: what is switched at which step, as one object that any loop can step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfx.errors import ConfigError, TrainingError
from qfx.spec import MAX_BITS, MIN_BITS, QuantSpec
from qfx.trained_fake_quant import TrainedFakeQuantize
from qfx.training_modules import LiveBatchNorm

Bits = int | tuple[int, int]


class Schedule:
    """Switches a prepared model at given steps; ``step()`` after every step of the optimizer.

    Args:
        prepared: what ``qfx.prepare(..., mode="qat")`` returned, before it is wrapped for several processes.
        float_steps: so many steps are trained in float, while ranges are already observed.
        freeze_observers: from this step on ranges stay, moving and learned ones.
        freeze_batch_norm: from this step on batch norms keep their statistics; their weights train on.
        bits: step → bits, or ``(weight bits, activation bits)``: no layer has fewer until the next entry. The recipe
            says where each layer ends: ``{0: 8, 500: 6, 1000: 4}`` takes the 4-bit layers of a recipe there by way of 8
            and 6, and leaves its 8-bit layers alone.

    Raises:
        ConfigError: bits that would change after the ranges are frozen, or that no layer has in the end.
    """

    def __init__(
        self,
        prepared: nn.Module,
        *,
        float_steps: int = 0,
        freeze_observers: int | None = None,
        freeze_batch_norm: int | None = None,
        bits: Mapping[int, Bits] | None = None,
    ) -> None:
        self.quantizers = [m for m in prepared.modules() if isinstance(m, TrainedFakeQuantize)]
        self.batch_norms = [m for m in prepared.modules() if isinstance(m, LiveBatchNorm)]
        if not self.quantizers:
            raise ConfigError(
                f"{type(prepared).__name__} holds nothing to schedule",
                hint='pass what qfx.prepare(model, example_inputs, mode="qat") returned',
            )
        self.final = [m.recipe_bits for m in self.quantizers]
        self.float_steps = float_steps
        self.freeze_observers = freeze_observers
        self.freeze_batch_norm = freeze_batch_norm
        self.bits = {step: _pair(b) for step, b in sorted((bits or {}).items())}
        self._validate()
        self.steps = 0
        self._apply()

    def _validate(self) -> None:
        for name, step in (
            ("float_steps", self.float_steps),
            ("freeze_observers", self.freeze_observers),
            ("freeze_batch_norm", self.freeze_batch_norm),
            *(("a step of bits", step) for step in self.bits),
        ):
            if step is not None and (not isinstance(step, int) or step < 0):
                raise ConfigError(f"{name} is a number of steps, got {step!r}")
        if self.bits and self.freeze_observers is not None and max(self.bits) > self.freeze_observers:
            raise ConfigError(
                f"bits change at step {max(self.bits)}, after ranges are frozen at step {self.freeze_observers}: "
                "they would be those of other bits",
                hint="freeze observers at a later step than the last change of bits",
            )
        for place, what in enumerate(("weights", "activations")):
            ends = [b for m, b in zip(self.quantizers, self.final, strict=True) if m.constant is (place == 0)]
            for step, pair in self.bits.items():
                if not MIN_BITS <= pair[place] <= MAX_BITS:
                    raise ConfigError(f"bits range from {MIN_BITS} to {MAX_BITS}, got {pair[place]} at step {step}")
                if ends and pair[place] < min(ends):
                    raise ConfigError(
                        f"step {step} asks for {pair[place]} bits, but the recipe leaves no {what} with fewer than "
                        f"{min(ends)}",
                        hint="let the recipe name the bits that training ends with",
                    )

    def step(self) -> None:
        """Count a step of the optimizer, and switch what is due."""
        self.steps += 1
        self._apply()

    def check(self, loss: Tensor) -> None:
        """Refuse a loss that would ruin the weights; to be called before ``backward()``.

        A loop that catches the error and goes on with the next batch has skipped the step: its weights are as they
        were, and ranges and batch-norm statistics took up nothing that is not finite.

        Raises:
            TrainingError: the loss is NaN or infinite; the text names the step.
        """
        value = loss.detach()
        if not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"the loss of step {self.steps} is {float(value.flatten()[0]):g}: nothing was learned from its batch",
                hint="look at that batch; if it is sound, lower the learning rate or clip gradient norms",
            )

    def _apply(self) -> None:
        bits = next((pair for step, pair in reversed(self.bits.items()) if step <= self.steps), (0, 0))
        frozen = self.freeze_observers is not None and self.steps >= self.freeze_observers
        for module, final in zip(self.quantizers, self.final, strict=True):
            module.quantizing = self.steps >= self.float_steps
            if isinstance(module.spec, QuantSpec):
                module.set_bits(max(final, bits[0 if module.constant else 1]))
            module.observing = not frozen
        if self.freeze_batch_norm is not None and self.steps >= self.freeze_batch_norm:
            for batch_norm in self.batch_norms:
                batch_norm.freeze()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps; what they have switched is in the model's state dict."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at a saved step; load the model's state dict first."""
        self.steps = int(state["steps"])
        self._apply()


def _pair(bits: Bits) -> tuple[int, int]:
    return (bits, bits) if isinstance(bits, int) else bits
