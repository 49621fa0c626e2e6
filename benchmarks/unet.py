"""What a denoising step of the video U-Net costs: predicted for both sizes, and one forward pass of the shipped one measured.

    OMP_NUM_THREADS=1 python benchmarks/unet.py               # the table, and the error of the prediction
    OMP_NUM_THREADS=1 python benchmarks/unet.py --train       # CPU time of a training step too

Operations are counted by torch in the real run. Memory is the growth of the process's high-water mark, once with glibc giving
freed blocks back at once, as the plan assumes, and once as it comes. Every measurement is a process of its own; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time

CASES = ((4, 8, 64), (4, 16, 64), (2, 16, 96), (4, 16, 128))
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def run(views: int, frames: int, size: int) -> dict[str, float]:
    """One forward pass of the shipped size in this process."""
    from track4d.plan import measure
    from track4d.video.features import FEATURE_UNET
    from track4d.video.unet import MultiViewUNet

    network = MultiViewUNet(FEATURE_UNET)
    measure(network, 1, 1, size, size, 1)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("5")  # the high-water mark starts again
    start = time.process_time()
    flops, _ = measure(network, views, frames, size, size, 1)
    return {"flops": flops, "bytes": resident("VmHWM") - before, "seconds": time.process_time() - start}


def measured(case: tuple[int, int, int], environment: dict[str, str]) -> dict[str, float]:
    """`run` in a fresh process."""
    command = [sys.executable, __file__, "--run", *map(str, case)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return json.loads(result.stdout)


def training_step(views: int, frames: int, size: int, checkpointing: bool) -> float:
    """CPU seconds of forward and backward of one object, after a first step that warms up."""
    import torch
    from track4d.video.features import FEATURE_UNET
    from track4d.video.unet import MultiViewUNet

    network = MultiViewUNet(FEATURE_UNET)
    network.gradient_checkpointing = checkpointing
    inputs = (torch.randn(1, views, frames, 4, size, size), torch.tensor([500]), torch.zeros(1, 8, dtype=torch.long),
              torch.randn(1, views, 16))
    for _ in range(2):
        start = time.process_time()
        network(*inputs).sample.square().mean().backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs=3, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--train", action="store_true", help="measure a training step too")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*arguments.run)))
        return
    from rich.console import Console
    from track4d.plan import plan, show
    from track4d.video.features import FEATURE_UNET

    show(4, 16, None, Console(width=120))
    print("\n| views x frames x px | GFLOP predicted | counted | ratio "
          "| peak MB predicted | measured | ratio | glibc as it comes | CPU s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for case in CASES:
        views, frames, size = case
        cost = plan(FEATURE_UNET, views, frames, size, size)
        exact, usual = measured(case, RETURNED), measured(case, {})
        made, took = cost.peak - cost.weights, exact["bytes"]
        print(f"| {views} x {frames} x {size} | {cost.flops / 1e9:.1f} | {exact['flops'] / 1e9:.1f} "
              f"| {cost.flops / exact['flops']:.3f} | {made / 1e6:.0f} | {took / 1e6:.0f} | {made / took:.3f} "
              f"| {usual['bytes'] / 1e6:.0f} | {usual['seconds']:.1f} |")
    if arguments.train:
        for checkpointing in (False, True):
            seconds = training_step(4, 8, 64, checkpointing)
            print(f"training step of 4 x 8 x 64, checkpointing {checkpointing}: {seconds:.2f} s of CPU time")


if __name__ == "__main__":
    main()
