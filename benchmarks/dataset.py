"""What the video models' training data cost: clips per second, and their share of a training step.

    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/dataset.py              procedural clips
    OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/dataset.py --shards OUT  clips of a data set beside them

CPU time of one core, clips and training steps measured in turn, so that the shares hold on a busy machine too. "waiting" is
the share of the wall time of a loop of training steps that goes by until the next batch is there; a worker process makes
them ahead.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from track4d.training import shards
from track4d.training.video_data import Batch, ClipShape, Procedural, Source, load_batches, make_batch
from track4d.training.video_losses import noise_frames, position_loss
from track4d.video.features import FEATURE_UNET
from track4d.video.unet import MultiViewUNet, camera_condition

SHAPES = (ClipShape(4, 4, 64), ClipShape(4, 16, 64), ClipShape(4, 16, 128), ClipShape(4, 16, 256))
STEPPED = 64  # pixels up to which a training step on a CPU is measured


def make_step() -> Callable[[Batch], None]:
    """A training step of the shipped network, in float32 as it was trained: noise and position loss, forward, backward, AdamW."""
    torch.manual_seed(0)
    network = MultiViewUNet(FEATURE_UNET)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    name = network.config.temporal_feature

    def step(batch: Batch) -> None:
        count, size = len(batch.video), batch.video.shape[-1]
        noise = torch.randn_like(batch.video)
        noisy = noise_frames(batch.video, noise, torch.full((count,), 0.7), torch.full((count,), 0.1))
        predicted = network(noisy, torch.full((count,), 300), torch.ones(count, 8, dtype=torch.long),
                            camera_condition(batch.viewmats), features=[name])
        loss = (predicted.sample[:, :, 1:] - noise[:, :, 1:]).square().mean()
        loss = loss + position_loss(predicted.features[name], batch.tracks / size, batch.visibility)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def waiting_share(source: Source, shape: ClipShape, step: Callable[[Batch], None], steps: int = 5) -> float:
    """The share of the wall time of a training loop with one worker that is spent until the next batch is there."""
    batches = iter(load_batches(source, shape, 1, 0, 0, steps + 2, workers=1))
    for _ in range(2):  # until the worker has started
        step(next(batches))
    waited, begun = 0.0, time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        step(batch)
    return waited / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder that `track4d dataset render` has written")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    sources: dict[str, Source] = {"procedural": Procedural()}
    largest: dict[str, int] = {}
    if arguments.shards:
        sources["shards"] = stored = shards.open_shards(arguments.shards, share=0)
        largest["shards"] = shards.read_clip(stored.entries[0]).video.shape[2]
    torch.set_num_threads(1)
    console = Console()
    step = make_step()
    table = Table("source", "views x frames", "pixels", "ms a clip", "clips/s", "ms a step", "data / step", "waiting")
    for name, source in sources.items():
        for shape in SHAPES:
            if name in largest and shape.size > largest[name]:
                continue
            made, stepped = [], []
            for position in range(-1, arguments.rounds):
                start = time.process_time()
                batch = make_batch(source, shape, 0, [position + 1])
                middle = time.process_time()
                if shape.size <= STEPPED:
                    step(batch)
                if position >= 0:  # the first one compiles
                    made.append(middle - start)
                    stepped.append(time.process_time() - middle)
            clip = statistics.median(made)
            row = [name, f"{shape.views} x {shape.frames}", str(shape.size), f"{1e3 * clip:.1f}", f"{1 / clip:.1f}"]
            if shape.size <= STEPPED:
                training = statistics.median(stepped)
                row += [f"{1e3 * training:.0f}", f"{clip / training:.1%}", f"{waiting_share(source, shape, step):.1%}"]
            table.add_row(*row)
            console.print(" ".join(row), style="dim")  # what there is, should the rest take too long
    console.print(table)


if __name__ == "__main__":
    main()
