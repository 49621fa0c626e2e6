"""Training of the motion generator: `train`, resumable, and the same bits for the same seed."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from track4d_protocol.errors import InputError

from ..progress import Report, silent
from ..video.diffusion import log_snr, mix
from ..video.generator import MotionGenerator
from ..video.motion_unet import MotionUNet, UNetConfig
from .clips import load_clips
from .data import Batch, make_batch
from .muon import Muon

log = logging.getLogger(__name__)

WARM_UP = 100  # steps
# Of all steps, at the end; the rate is constant before, so that their number may be changed on the way.
DECAY_SHARE = 0.7
TEXT_DROP = 0.1  # share of samples without their sentence, for classifier-free guidance (Ho and Salimans 2022)
SMALL_ENERGY = 0.02  # mean square of a latent below which a motion is small
SAVE_EVERY = 250  # steps


@dataclass(frozen=True)
class TrainingSettings:
    """What determines the weights, together with this package's version.

    Attributes:
        steps: in all, earlier ones of a resumed training included.
        batch: samples a step, a multiple of 4.
        seed: of the weights, the data and the noise.
        learning_rate: of AdamW in the constant phase.
        muon_rate: of Muon in the constant phase.
        natural: weights for motions as real clips have them, see `make_batch`.
    """

    steps: int = 12000
    batch: int = 16
    seed: int = 0
    learning_rate: float = 1e-3
    muon_rate: float = 0.02
    natural: bool = False


def rate(settings: TrainingSettings, step: int) -> float:
    """Warm-up, constant, cosine decay to a hundredth; a factor on the learning rates."""
    start = (1 - DECAY_SHARE) * settings.steps
    done = min(max((step - start) / max(settings.steps - start, 1), 0), 1)
    return min(1, (step + 1) / WARM_UP) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizers(network: MotionUNet, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the weights of hidden layers, AdamW for the rest; a group's `base` is its rate in the constant phase."""
    outer = ("latent_in", "condition_in", "out", "affine", "parts.share", "parts.out", "parts.to", "gist.out", "text.", "view")
    hidden: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in network.named_parameters():
        (hidden if parameter.ndim >= 2 and not name.startswith(outer) else rest).append(parameter)
    return [
        Muon([{"params": hidden, "base": settings.muon_rate}]),
        torch.optim.AdamW([{"params": rest, "base": settings.learning_rate}], weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def diffusion_loss(
    network: MotionUNet, batch: Batch, generator: torch.Generator, precision: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """The loss to minimise, and the plain squared error of the predicted clean latent where the object is.

    What the sentence means is learnt from the noisiest samples, so three quarters of them are in the upper half of the levels,
    and one eleventh all noise, as sampling begins with; weights by the SNR would drown them. Small motions count more than
    their square, or a wagging tail would never be learnt beside a spin, nor a walk beside a fall; and a sample that the network
    throws far off counts by the root of its error only, or it alone would say where a step goes.
    """
    size, shape = len(batch.latent), batch.latent.shape
    place = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size  # evenly spread
    noise_level = (place * 1.1).sqrt().clamp(max=1)
    drop = torch.rand(size, generator=generator) < TEXT_DROP
    seen = torch.nonzero(batch.mask.reshape(-1))[:, 0]  # pixels that see the object; the others are two thirds of the work
    owner = seen // (batch.mask.numel() // size)
    clean = _rows(batch.latent)[seen]  # [P, 3 K]
    noise = torch.randn(clean.shape, generator=generator)
    snr = log_snr(noise_level, shape[-1])[owner, None]
    rows = torch.zeros(batch.mask.numel(), shape[2], dtype=precision)
    rows[seen] = mix(clean, noise, snr).to(precision)
    noisy = rows.view(*shape[:2], *shape[3:], shape[2]).permute(0, 1, 4, 2, 3)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        predicted = network(noisy, batch.condition, noise_level, batch.tokens, drop)
    wrong = torch.index_select(_rows(predicted), 0, seen).float() - clean
    numbers = torch.bincount(owner, minlength=size) * shape[2]  # that describe the object; [B]
    errors = torch.zeros(size).index_add(0, owner, wrong.square().sum(1)) / numbers
    energy = torch.zeros(size).index_add(0, owner, clean.square().sum(1)) / numbers
    wrong_by = errors / (energy + SMALL_ENERGY)
    wrong_by = torch.where(wrong_by < 1, wrong_by, 2 * wrong_by.clamp(min=1).sqrt() - 1)
    return (wrong_by * (energy + SMALL_ENERGY) ** 0.25).mean(), errors.detach().mean()


def _rows(maps: Tensor) -> Tensor:
    """[B, V, C, H, W] as one row for each pixel, [B * V * H * W, C]; a view where the channels lie last in memory."""
    return maps.permute(0, 1, 3, 4, 2).reshape(-1, maps.shape[2])


def _write(path: Path, write) -> None:
    temporary = path.with_name(path.name + ".new")
    write(temporary)
    os.replace(temporary, path)


def save_weights(path: Path, average: dict[str, Tensor], config: UNetConfig, trained: dict) -> None:
    """Half-precision weights with their configuration and history in the header."""
    tensors = {name: tensor.to(torch.float16).contiguous() for name, tensor in average.items()}
    _write(
        path,
        lambda new: save_file(tensors, new, {"config": json.dumps(config.to_dict()), "trained": json.dumps(trained)}),
    )


def train(
    out: Path,
    settings: TrainingSettings = TrainingSettings(),
    resume: bool = False,
    start: Path | None = None,
    clips: Path | None = None,
    config: UNetConfig | None = None,
    grid: int | None = None,
    report: Report = silent,
) -> Path:
    """Trains the generator on procedural objects, and on real clips where there are some.

    Every step draws its data and noise from (seed, step, process), so that a training that was stopped, by `report` raising
    or by Ctrl-C, and resumed ends with the same weights bit by bit as one that was not (same machine, same number of
    threads). Under `torchrun --nproc-per-node N --no-python -- track4d train motion ...` each process takes its part of every
    batch, and all have the same weights: on CPUs that is faster than N threads.

    Args:
        out: folder for `checkpoint.pt`, `log.jsonl` and `motion.safetensors`; made when absent.
        resume: goes on from `out/checkpoint.pt` where there is one.
        start: weights to begin a new run with, such as the shipped ones; the optimisers and the schedule begin anew.
        grid: pixels along a side of the latent; the grid of `start` is doubled until it is as fine (coarse first is cheaper).
        clips: folder of real clips, written by `tools/extract_clips.py`.
        report: called once a step with stage "train".

    Returns:
        the path of the weights (the exponential moving average).
    """
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if settings.batch % (4 * ranks):
        raise InputError("bad_batch", f"A batch of {settings.batch} can't be shared by {ranks} processes in fours.",
                         f"Use {4 * ranks} or a multiple.")
    if ranks > 1:
        dist.init_process_group("gloo")
    real = load_clips(clips) if clips is not None else []
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    if start is None:
        config = config or UNetConfig()
        network = MotionUNet(replace(config, grid=grid or config.grid))
    else:
        network = MotionGenerator.load(start).network
        while grid is not None and network.config.grid < grid:
            network = network.refined()
    network.train()
    config = network.config
    average = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizers = make_optimizers(network, settings)
    step, checkpoint, weights = 0, out / "checkpoint.pt", out / "motion.safetensors"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["network"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        average, step = state["average"], state["step"]
        log.info("resumed at step %d", step)

    def save() -> None:
        if rank > 0:
            return
        state = {
            "network": network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "average": average,
            "step": step,
        }
        _write(checkpoint, lambda new: torch.save(state, new))
        save_weights(weights, average, config, asdict(settings) | {"step": step, "real_meshes": len(real)})

    losses: list[tuple[float, float]] = []
    threads = torch.get_num_threads()
    try:
        while step < settings.steps:
            report("train", step, settings.steps)
            seed = settings.seed + 7919 * rank
            batch = make_batch(seed, step, settings.batch // ranks, real, config.grid, settings.natural)
            torch.set_num_threads(threads)  # Numba, where it starts its threads, gives OpenMP all cores: five times as slow
            loss, seen = diffusion_loss(network, batch, torch.Generator().manual_seed(seed * 1_000_003 + step))
            network.zero_grad()
            loss.backward()
            if ranks > 1:
                _share_gradients(network, ranks)
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["base"] * rate(settings, step)
                optimizer.step()
            keep = min(0.998, (step + 1) / (step + 10))
            for name, tensor in network.state_dict().items():
                average[name].lerp_(tensor, 1 - keep)
            step += 1
            losses.append((loss.item(), seen.item()))
            if rank == 0 and (step % 100 == 0 or step == settings.steps):
                _append(out / "log.jsonl", step, losses)
                losses = []
            if step % SAVE_EVERY == 0:
                save()
    finally:
        save()
        if ranks > 1:
            dist.destroy_process_group()
    return weights


def _share_gradients(network: MotionUNet, ranks: int) -> None:
    """The mean of all processes' gradients, in place."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / ranks).split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def _append(path: Path, step: int, losses: list[tuple[float, float]]) -> None:
    loss, seen = np.mean(losses, 0)
    with path.open("a") as file:
        file.write(
            json.dumps(
                {
                    "step": step,
                    "loss": round(float(loss), 5),
                    "error": round(float(seen), 5),
                    "cpu_seconds": round(time.process_time()),
                }
            )
            + "\n"
        )
