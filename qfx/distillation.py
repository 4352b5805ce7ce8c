"""Knowledge distillation: the float model teaches the one that is trained with rounding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qfx.errors import ConfigError


def distillation_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """``T² · KL(softmax(teacher / T) ‖ softmax(student / T))``, averaged over all rows; a scalar.

    Args:
        student, teacher: logits ``[..., classes]`` of one shape; no gradient passes to the teacher.
        temperature: above 1 the teacher's small probabilities weigh more.

    Raises:
        ConfigError: shapes differ, or the temperature is not positive.

    Method: Hinton et al., 2015 (arXiv:1503.02531), section 2.
    """
    if student.shape != teacher.shape:
        raise ConfigError(
            f"the student's logits have shape {list(student.shape)}, the teacher's {list(teacher.shape)}",
            hint="give both models the same batch",
        )
    if not temperature > 0.0:
        raise ConfigError(f"a temperature is positive, got {temperature}")
    targets = F.log_softmax(teacher.detach().float() / temperature, dim=-1).flatten(0, -2)
    guesses = F.log_softmax(student.float() / temperature, dim=-1).flatten(0, -2)
    return F.kl_div(guesses, targets, reduction="batchmean", log_target=True) * temperature**2
