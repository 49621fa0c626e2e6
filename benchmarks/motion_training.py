"""Where a training step of the motion generator spends its time, and what half precision does to its gradients.

    OMP_NUM_THREADS=1 python benchmarks/motion_training.py [--clips runs/clips] [--steps 12]

Starts from the shipped weights, with their grid, and leaves them as they are.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import torch
from track4d.training.clips import load_clips
from track4d.training.data import make_batch
from track4d.training.motion import TrainingSettings, diffusion_loss, make_optimizers
from track4d.video.generator import MotionGenerator

BATCH, WARM_UP = 16, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="real clips, for their share of every batch")
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real = load_clips(arguments.clips) if arguments.clips else []
    network = MotionGenerator.load().network.train()
    optimizers = make_optimizers(network, TrainingSettings())
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = 0.0
    spent: dict[str, float] = defaultdict(float)
    for step in range(WARM_UP + arguments.steps):
        if step == WARM_UP:
            spent.clear()
        marks = [time.perf_counter()]
        batch = make_batch(0, step, BATCH, real, network.config.grid)
        marks.append(time.perf_counter())
        loss, _ = diffusion_loss(network, batch, torch.Generator().manual_seed(step))
        marks.append(time.perf_counter())
        network.zero_grad()
        loss.backward()
        marks.append(time.perf_counter())
        for optimizer in optimizers:
            optimizer.step()
        marks.append(time.perf_counter())
        for name, start, end in zip(("data", "forward", "backward", "optimisers"), marks, marks[1:]):
            spent[name] += end - start
    whole = sum(spent.values())
    print(f"| part of a step of {BATCH} samples, one thread | ms | share |")
    print("|---|---:|---:|")
    for name, seconds in spent.items():
        print(f"| {name} | {1e3 * seconds / arguments.steps:.0f} | {seconds / whole:.0%} |")
    print(f"{BATCH * arguments.steps / whole:.1f} samples/s; data alone {BATCH * arguments.steps / spent['data']:.0f} samples/s")

    batch = make_batch(7, 0, 8, real, network.config.grid)
    gradients = []
    for precision in (torch.float32, torch.bfloat16):
        network.zero_grad()
        diffusion_loss(network, batch, torch.Generator().manual_seed(0), precision)[0].backward()
        gradients.append({name: value.grad.clone() for name, value in network.named_parameters() if value.ndim > 1})
    dead = [name for name, exact in gradients[0].items() if not exact.any() or float(exact.norm()) == 0]
    wrong = {name: float((gradients[1][name] - exact).norm() / exact.norm())
             for name, exact in gradients[0].items() if name not in dead}
    worst = max(wrong, key=lambda name: wrong[name])
    print(f"gradients in half precision: off by {sorted(wrong.values())[len(wrong) // 2]:.3f} of their size in the middle, "
          f"by {wrong[worst]:.3f} at worst ({worst}); weights without any: {', '.join(dead) or 'none'}")


if __name__ == "__main__":
    main()
