"""The Muon optimiser (Jordan et al. 2024): momentum whose matrices are orthogonalised before they are applied."""

from __future__ import annotations

import torch
from torch import Tensor


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearly the orthogonal factor of [..., rows, columns]: singular values between 0.7 and 1.2 (Newton-Schulz)."""
    x = matrix.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """For the weights of hidden linear layers and convolutions; everything else belongs to AdamW.

    Args:
        params: tensors of two or more axes; further axes count as columns.
        lr: step, in units of the spectral norm of the update.
        momentum: of Nesterov's kind.
        weight_decay: decoupled.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = parameter.grad.flatten(1)
                state = self.state[parameter]
                velocity = state.setdefault("velocity", torch.zeros_like(gradient))
                velocity.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalise(gradient.lerp(velocity, group["momentum"]))
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update.view_as(parameter), alpha=group["lr"] * scale)
