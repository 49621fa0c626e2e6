"""`track4d train video`: Stage One's U-Net with point-tracking priors, in both sizes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..training.video_data import Source

PROCEDURAL_SHARE = 0.5  # of the small network's clips, beside rendered ones


def train_video(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs, sheets and weights; all processes share it.")] = Path(
        "runs/video"
    ),
    published: Annotated[Path | None, typer.Option(help="Folder of the converted published model, to train that; else the small "
                                                        "network is trained from scratch.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of shards from `track4d dataset render`, or MV-Video's JSON list; "
                                                   "else procedural clips alone.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps in all.", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="Clips per step of each process.", min=1)] = None,
    accumulation: Annotated[int, typer.Option(help="Batches per optimiser step.", min=1)] = 1,
    correspondence: Annotated[float, typer.Option(help="Weight of the correspondence loss; 0 leaves it out.")] = 0.1,
    position: Annotated[float, typer.Option(help="Weight of the position loss; 0 leaves it out.")] = 10.0,
    precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    seed: Annotated[int, typer.Option(help="Of data, noise and new weights.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that make or read clips.", min=0)] = 1,
    start: Annotated[Path | None, typer.Option(help="Weights of a small network to begin with.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")] = False,
) -> None:
    """Train the video U-Net with the tracking losses. On many GPUs or machines: accelerate launch -m track4d train video ..."""
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from track4d_protocol.errors import InputError

    from ..training.video import VideoTraining, train
    from ..video.checkpoints import load_published
    from ..video.features import FEATURE_UNET, load_small
    from ..video.multiview_video import MultiViewVideo
    from ..video.unet import MultiViewUNet

    if published is not None and data is None:
        raise InputError("no_training_clips", "The published model is trained on clips of its own size.",
                         "Render some, track4d dataset render MODELS -o FOLDER --size 256, and give --data FOLDER.")
    defaults = VideoTraining() if published else VideoTraining.small()
    settings = replace(defaults, steps=steps or defaults.steps, batch=batch or defaults.batch, accumulation=accumulation,
                       correspondence=correspondence, position=position, precision=precision or defaults.precision, seed=seed)
    torch.manual_seed(seed)
    if published:
        model = load_published(published)
    else:
        model = load_small(start) if start else MultiViewVideo(MultiViewUNet(FEATURE_UNET))
    clips, held_out = (open_clips(data, validation, published is None) for validation in (False, True))
    console = Console(stderr=True, highlight=False)
    with Progress(console=console, disable=os.environ.get("RANK", "0") != "0") as progress:  # one bar, not one per process
        bar = progress.add_task("training", total=settings.steps)
        weights = train(out, model, clips, settings, held_out, resume, workers,
                        lambda stage, step, total, preview=None: progress.update(bar, completed=step, total=total))
    if not progress.disable:
        console.print(f"wrote {weights}")


def open_clips(data: Path | None, validation: bool, mixed: bool) -> Source:
    """Procedural clips, rendered ones, or both in turn.

    Args:
        data: folder of shards, or MV-Video's list.
        mixed: whether procedural clips are mixed with those of `data` in training.
    """
    from ..training.mv_video import open_mv_video
    from ..training.shards import open_shards
    from ..training.video_data import Mixture, Procedural

    if data is None:
        return Procedural(validation)
    stored: Source = open_mv_video(data, validation) if data.suffix == ".json" else open_shards(data, validation)
    return Mixture(stored, Procedural(validation), PROCEDURAL_SHARE) if mixed and not validation else stored
