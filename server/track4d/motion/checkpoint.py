"""Optimisations that can be interrupted: their whole state in a file, and the moment when they get nowhere any more."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from track4d_protocol.errors import InputError


@dataclass
class Run:
    """The state of an optimisation between two steps. A resumed run does bit for bit what an uninterrupted one does (CPU).

    Attributes:
        module: what is optimised.
        optimiser: of its parameters.
        generator: the run's only source of randomness.
        signature: what the run is of; a checkpoint of something else is refused.
        kept: other tensors that later steps need.
        step: steps done.
        losses: of each step done.
    """

    module: nn.Module
    optimiser: torch.optim.Optimizer
    generator: torch.Generator
    signature: str
    kept: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    losses: list[float] = field(default_factory=list)

    def advance(self, loss: Tensor) -> None:
        """One optimiser step down the gradient of a loss; a loss that is not finite changes nothing but is counted."""
        self.optimiser.zero_grad()
        self.losses.append(float(loss.detach()))
        if torch.isfinite(loss):
            loss.backward()
            self.optimiser.step()
        self.step += 1

    def is_flat(self, window: int, tolerance: float) -> bool:
        """Whether the mean loss of the last `window` steps is less than `tolerance` (a share) below that of as many before."""
        if len(self.losses) < 2 * window:
            return False
        now, before = sum(self.losses[-window:]), sum(self.losses[-2 * window:-window])
        return now > (1 - tolerance) * before

    def save(self, path: Path) -> None:
        """Writes the state; the file is complete or the old one at any time."""
        state = {"signature": self.signature, "module": self.module.state_dict(), "optimiser": self.optimiser.state_dict(),
                 "generator": self.generator.get_state(), "kept": self.kept, "step": self.step, "losses": self.losses}
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> bool:
        """Takes over the state of a file, if there is one; returns whether there was.

        Raises:
            InputError: the file is no checkpoint, or one of another run.
        """
        if not path.exists():
            return False
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            signature = state["signature"]
        except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise InputError("bad_checkpoint", f"The checkpoint {path.name} can't be read: {error}.",
                             "Delete it; the work starts again.") from error
        if signature != self.signature:
            raise InputError("bad_checkpoint", f"The checkpoint {path.name} is of other work: {signature}, not {self.signature}.",
                             "Give another file name, or delete it.")
        self.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.kept, self.step, self.losses = state["kept"], state["step"], state["losses"]
        return True
