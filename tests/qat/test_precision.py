"""Mixed precision: a step under autocast."""

from __future__ import annotations

import pytest
import torch

import qfx

from .nets import ResNet, quantizers, settle

SHAPE = (8, 3, 6, 6)


@pytest.mark.parametrize("recipe", ["int8", "w4a4_lsq"])
def test_trains_in_bfloat16(recipe: str) -> None:
    x, labels = torch.randn(SHAPE), torch.randint(4, (8,))
    prepared = qfx.prepare(settle(ResNet(), x), x, recipe=recipe, mode="qat")
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = prepared(x)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        assert logits.dtype == torch.bfloat16
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for q in quantizers(prepared):
        assert q.scale.dtype == torch.float32
        assert torch.isfinite(q.scale).all()
        assert bool((q.scale > 0).all())
    qfx.convert(prepared.eval(), check=True)
