"""Narrow weights of linear layers in the order in which ``csrc/native/weight_only.h`` reads them.

16 output channels make a panel; a panel is a run of steps of 64 bytes, a cache line each; a step holds a 32-bit word
(little-endian) of every channel, with the next 8 inputs in 4 bits or the next 4 in 8 bits::

    panel 0            step 0: channel 0   channel 1  ...  channel 15    64 bytes
    (channels 0-15)    step 1: channel 0   channel 1  ...  channel 15
                       ...
    panel 1            step 0: channel 16  ...

    a word of 4 bits, lowest first:  k0 k4 k1 k5 k2 k6 k3 k7    (bytes hold k0 to k3 low, k4 to k7 high)
    a word of 8 bits:                k0    k1    k2    k3

So one load gives a field of each channel in its own lane, nothing is added across lanes, and threads that take whole
panels read memory in one run each. Scales and zero points lie beside the weights, 16 channels together: a line of
scales for each group of a panel.

- 2 to 4 bits are stored in 4, unsigned (signed integers plus 8); 5 to 8 bits in 8, signed (unsigned integers less 128).
  Zero points are moved likewise, and are kept only where they differ.
- A group starts a new step, so that it may have any size; channels and inputs that pad have integers of zero.
- Scales are float32: in 16 bits they would be off by up to 2^-9 (bfloat16) or 2^-11, far more than the sums' rounding,
  to save 3 % of the traffic of 4 bits in groups of 128.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 16
"""Output channels that are stored together."""

_WORD_BITS = 32
_STORED = {4: torch.uint8, 8: torch.int8}


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[O, K]`` as the kernel takes it; ``P`` panels, ``S`` steps, ``G`` groups.

    ``weight``: uint8 ``[P, S, 64]``; ``scale``: float32 ``[P, G, 16]``; ``zero``: int8 ``[P, G, 16]``, or None where
    every zero point is ``middle``. ``group``: inputs that share a scale, at most K. ``bits``: 4 or 8.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    middle: int
    out_features: int
    in_features: int
    group: int
    bits: int

    @property
    def nbytes(self) -> int:
        """Bytes that are read for one product."""
        return sum(part.nbytes for part in (self.weight, self.scale, self.zero) if part is not None)


def stored_bits(bits: int) -> int:
    """The bits in which integers of ``bits`` (2 to 8) are stored: 4 or 8."""
    return 4 if bits <= 4 else 8


def pack_weight(q: Tensor, scale: Tensor, zero_point: Tensor, group: int, bits: int) -> PackedWeight:
    """Pack integers with ``x = (q - zero_point) * scale``.

    Args:
        q: int8 or uint8 ``[O, K]``, of ``bits`` (2 to 8); neither O nor K is zero.
        scale: float32 ``[O, ceil(K / group)]``.
        zero_point: int32 of the scale's shape, within the range of ``bits``.
        group: inputs that share a scale; the last group may have fewer.
        bits: the width of the integers.
    """
    width = stored_bits(bits)
    signed = q.dtype == torch.int8
    shift = {(4, True): 8, (8, False): -128}.get((width, signed), 0)
    moved, zeros = q.to(torch.int16) + shift, zero_point + shift
    same = bool((zeros == zeros[0, 0]).all())
    channels, length = q.shape
    group = min(group, length)
    return PackedWeight(
        _words(_by_steps(moved, group, _WORD_BITS // width).to(_STORED[width]), width),
        _by_panels(scale.float()),
        None if same else _by_panels(zeros.to(torch.int8)),
        int(zeros[0, 0]) if same else 0,
        channels,
        length,
        group,
        width,
    )


def _by_steps(q: Tensor, group: int, fields: int) -> Tensor:
    """``[O, steps * fields]``: zeros behind each group that does not end with a step."""
    groups = pad(q, (0, -q.shape[1] % group)).unflatten(1, (-1, group))
    padded = pad(groups, (0, _up(group, fields) - group)).flatten(1)
    missing = groups.shape[1] * group - q.shape[1]  # of the last group
    return padded[:, : padded.shape[1] - _up(group, fields) + _up(group - missing, fields)]


def _up(count: int, step: int) -> int:
    return -(-count // step) * step


def _words(q: Tensor, bits: int) -> Tensor:
    """uint8 ``[P, S, 64]`` of integers ``[O, S * fields]``."""
    fields = _WORD_BITS // bits
    panels = pad(q, (0, 0, 0, -q.shape[0] % PANEL)).unflatten(0, (-1, PANEL)).unflatten(2, (-1, fields))
    words = panels.transpose(1, 2).contiguous().view(torch.uint8)
    if bits == 4:
        words = words[..., :4] | words[..., 4:] << 4
    lines: Tensor = words.flatten(2).contiguous()
    return lines


def _by_panels(p: Tensor) -> Tensor:
    """``[P, G, 16]`` of ``[O, G]``."""
    panels: Tensor = pad(p, (0, 0, 0, -p.shape[0] % PANEL)).unflatten(0, (-1, PANEL))
    return panels.transpose(1, 2).contiguous()
