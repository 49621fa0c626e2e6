"""How fast the rasteriser is: forward and backward, in milliseconds of CPU time per picture, and how exact.

    python benchmarks/rasterise.py           the CPU rasteriser, beside its prototype where that is at hand
    python benchmarks/rasterise.py --gpu     gsplat beside it
    python benchmarks/rasterise.py --batch   cost over the number of pictures, of the loss, and of a whole step of a fit;
                                             with --plot FILE.png a plot of it

Both sides run in turn in one process, so that their ratio means something on a busy machine: the ratio is the median
over the rounds of (ours / theirs). OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 gives the cost on one core. Ours is all
that training pays (autograd, gradients summed over views and frames, fresh memory), the prototype's its bare kernels.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from track4d.gaussians.rasterise import picture_loss, rasterise
from track4d.gaussians.rasterise.dense import rasterise_dense
from track4d_protocol.space import intrinsics, orbit_viewmats

PROTOTYPE = Path(__file__).resolve().parents[2] / "shared" / "prototypes" / "rasterise"
CASES = ((5_000, 128), (20_000, 256), (50_000, 256))  # Gaussians, pixels
FRAMES, VIEWS = 2, 4
WARM_UP = 8  # rounds
LEARNT = ("means", "quats", "scales", "opacities", "colors")


def torus_scene(gaussians: int, size: int, frames: int = FRAMES) -> dict:
    """A surface of flat Gaussians as `rasterise` takes it, with opacities like those of a fitted scene."""
    generator = torch.Generator().manual_seed(1)
    around, across = 2 * np.pi * torch.rand(2, gaussians, generator=generator)
    outward = torch.stack([around.cos(), around.sin(), torch.zeros(gaussians)], -1)  # [N, 3]
    normals = outward * across.cos()[:, None] + torch.tensor([0, 0, 1.0]) * across.sin()[:, None]
    points = 0.62 * outward + 0.26 * normals  # [N, 3]
    steps = 0.05 * torch.arange(frames)[:, None, None] * torch.sin(3 * points[:, [1]])  # [F, N, 1]
    nothing = torch.zeros(gaussians)
    quats = torch.stack([1 + normals[:, 2], -normals[:, 1], normals[:, 0], nothing], -1)  # [N, 4], +z to the normal
    spacing = (4 * np.pi**2 * 0.62 * 0.26 / gaussians) ** 0.5
    unlike = torch.exp(0.3 * torch.randn(gaussians, 3, generator=generator))
    scales = 0.7 * spacing * torch.tensor([1, 1, 0.1]) * unlike
    return {
        "means": points + steps * normals, "quats": quats.expand(frames, gaussians, 4).contiguous(), "scales": scales,
        "opacities": torch.sigmoid(2 + 1.5 * torch.randn(gaussians, generator=generator)),
        "colors": 0.5 + 0.5 * torch.sin(6 * points + torch.tensor([0, 2, 4.0])),
        "viewmats": torch.from_numpy(orbit_viewmats(elevation=30)), "Ks": torch.from_numpy(intrinsics(size, VIEWS)),
        "size": size, "background": torch.zeros(3),
    }


def step(scene: dict, weights: torch.Tensor, draw: Callable = rasterise) -> tuple[torch.Tensor, dict]:
    """One forward and backward of the product, everything included; the image and the gradients."""
    leaves = {k: x.detach().requires_grad_() if k in LEARNT else x for k, x in scene.items()}
    image, _ = draw(**leaves)
    image.backward(weights)
    return image.detach(), {name: leaves[name].grad for name in LEARNT}


def prototype_step(scene: dict, weights: torch.Tensor) -> Callable[[], None]:
    """The same work by the prototype's kernels alone (no torch, buffers kept between calls)."""
    sys.path.insert(0, str(PROTOTYPE))
    import project
    import rasterise as blend

    size, frames, gaussians = scene["size"], *scene["means"].shape[:2]
    pictures = frames * VIEWS
    means, quats, scales, opacities, colors = (scene[name].numpy() for name in LEARNT)
    K = scene["Ks"][0].numpy()
    cameras = project.cams_of(scene["viewmats"].numpy(), (K[0, 0], K[1, 1], K[0, 2], K[1, 2]), size)
    centres, conics = np.empty((pictures, gaussians, 2), np.float32), np.empty((pictures, gaussians, 3), np.float32)
    depths = np.empty((pictures, gaussians), np.float32)
    gradients = [np.empty((frames, gaussians, k), np.float32) for k in (3, 4, 3)]
    rasteriser, black = blend.NB(), np.zeros(3, np.float32)
    threads = torch.get_num_threads()

    def run() -> None:
        project.proj_fwd(means, quats, scales, cameras, centres, conics, depths)
        rasteriser.forward(centres, conics, colors, opacities, depths, size, size, black, threads)
        d_centres, d_conics, _, _ = rasteriser.backward(weights.flatten(0, 1).numpy(), threads)
        project.proj_bwd(means, quats, scales, cameras, d_centres, d_conics, *gradients)

    return run


def in_turn(works: list[Callable], rounds: int, clock: Callable[[], float] = time.process_time) -> list[list[float]]:
    """Seconds of each work in each round, after some to warm up: kernels compile, the allocator learns the sizes."""
    seconds: list[list[float]] = [[] for _ in works]
    for round_ in range(-WARM_UP, rounds):
        for work, own in zip(works, seconds):
            start = clock()
            work()
            if round_ >= 0:
                own.append(clock() - start)
    return seconds


def gradient_error(gaussians: int = 1500, size: int = 64) -> dict[str, float]:
    """Relative L2 distance of every gradient from float64, and the largest of the image."""
    scene = torus_scene(gaussians, size, frames=1)
    weights = torch.randn(1, VIEWS, size, size, 3, generator=torch.Generator().manual_seed(2))
    exact = {k: x.double() if torch.is_tensor(x) else x for k, x in scene.items()}
    image, gradients = step(scene, weights)
    true_image, true = step(exact, weights.double(), rasterise_dense)
    errors = {name: float((gradients[name] - true[name]).norm() / true[name].norm()) for name in LEARNT}
    return {"image (max)": float((image - true_image).abs().max()), **errors}


def benchmark_cpu(console: Console, rounds: int) -> None:
    threads = os.environ.get("NUMBA_NUM_THREADS", os.cpu_count())
    table = Table(title=f"CPU rasteriser, forward + backward, {threads} thread(s)")
    for column in ("Gaussians", "pixels", "ms per picture (min)", "prototype", "ratio (median)"):
        table.add_column(column, justify="right")
    for gaussians, size in CASES:
        scene = torus_scene(gaussians, size)
        weights = torch.randn(FRAMES, VIEWS, size, size, 3, generator=torch.Generator().manual_seed(2))
        works: list[Callable] = [lambda scene=scene, weights=weights: step(scene, weights)]  # type: ignore[misc]
        if PROTOTYPE.is_dir():
            works.append(prototype_step(scene, weights))
        ours, *others = in_turn(works, rounds)
        milliseconds = [f"{1e3 * min(seconds) / (FRAMES * VIEWS):.2f}" for seconds in (ours, *others)]
        ratio = [f"{statistics.median(a / b for a, b in zip(ours, theirs)):.2f}" for theirs in others]
        table.add_row(f"{gaussians:,}", str(size), *milliseconds, *ratio)
    console.print(table)
    errors = Table(title="Distance from the float64 definition (1,500 Gaussians, 64 pixels, 4 views)")
    values = gradient_error()
    for name in values:
        errors.add_column(name, justify="right")
    errors.add_row(*(f"{value:.1e}" for value in values.values()))
    console.print(errors)


def fit_step(scene: dict) -> Callable[[], None]:
    """One step of a fit of everything that can be learnt, positions and orientations per frame: draw, loss, backward, Adam."""
    leaves = {name: scene[name].clone().requires_grad_() for name in LEARNT}
    optimiser = torch.optim.Adam(leaves.values(), lr=1e-5, fused=True)
    frames, size = len(scene["means"]), scene["size"]
    wanted, wanted_alpha = torch.rand(frames, VIEWS, size, size, 3), torch.rand(frames, VIEWS, size, size)

    def run() -> None:
        optimiser.zero_grad()
        picture_loss(*rasterise(**{**scene, **leaves}), wanted, wanted_alpha, squared=0.2).backward()
        optimiser.step()

    return run


def loss_step(loss: Callable, frames: int, size: int) -> Callable[[], None]:
    """Value and gradient of a loss of all pictures."""
    drawn, wanted = torch.rand(2, frames, VIEWS, size, size, 3)
    alpha, wanted_alpha = torch.rand(2, frames, VIEWS, size, size)
    drawn.requires_grad_(), alpha.requires_grad_()

    def run() -> None:
        drawn.grad = alpha.grad = None
        loss(drawn, alpha, wanted, wanted_alpha).backward()

    return run


def torch_loss(rgb: torch.Tensor, alpha: torch.Tensor, wanted_rgb: torch.Tensor, wanted_alpha: torch.Tensor) -> torch.Tensor:
    off = rgb - wanted_rgb
    return off.abs().mean() + 0.2 * off.square().mean() + (alpha - wanted_alpha).abs().mean()


def benchmark_batch(console: Console, rounds: int, plot: Path | None = None) -> None:
    table = Table(title="One call over frames x views, forward + backward, CPU ms (min)")
    for column in ("Gaussians", "pixels", "frames x views", "rasteriser", "per picture", "whole step",
                   "step / rasteriser (median)", "loss, fused", "loss, torch"):
        table.add_column(column, justify="right")
    lines: dict[str, list[tuple[float, float]]] = {}
    for (gaussians, size), counts in ((CASES[0], (1, 2, 4, 8, 16)), (CASES[1], (1, 2, 4, 8, 16))):
        for frames in counts:
            scene = torus_scene(gaussians, size, frames)
            weights = torch.randn(frames, VIEWS, size, size, 3, generator=torch.Generator().manual_seed(2))
            draw, whole, fused, plain = in_turn([
                lambda scene=scene, weights=weights: step(scene, weights), fit_step(scene),  # type: ignore[misc]
                loss_step(partial(picture_loss, squared=0.2), frames, size), loss_step(torch_loss, frames, size)], rounds)
            ratio = statistics.median(a / b for a, b in zip(whole, draw))
            table.add_row(f"{gaussians:,}", str(size), f"{frames} x {VIEWS}", f"{1e3 * min(draw):.1f}",
                          f"{1e3 * min(draw) / (frames * VIEWS):.2f}", f"{1e3 * min(whole):.1f}", f"{ratio:.2f}",
                          f"{1e3 * min(fused):.1f}", f"{1e3 * min(plain):.1f}")
            for what, seconds in (("rasteriser", draw), ("whole step of a fit", whole)):
                line = lines.setdefault(f"{gaussians:,} Gaussians, {size} px, {what}", [])
                line.append((frames * VIEWS, 1e3 * min(seconds)))
    console.print(table)
    if plot:
        draw_plot(plot, lines)


def draw_plot(path: Path, lines: dict[str, list[tuple[float, float]]], width: int = 900, height: int = 560) -> None:
    """Milliseconds over pictures, both logarithmic; behind each line a grey one through its last point: exactly linear cost."""
    left, right, top, bottom = 90, 30, 60, 70
    points = np.log10([point for line in lines.values() for point in line])
    low, high = points.min(0) - 0.15, points.max(0) + 0.15  # log10 of (pictures, milliseconds)
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(16)

    def place(x: float, y: float) -> tuple[float, float]:
        u, v = (np.log10([x, y]) - low) / (high - low)
        return left + u * (width - left - right), height - bottom - v * (height - top - bottom)

    for x in (4, 8, 16, 32, 64):
        pen.line([place(x, 10 ** low[1]), place(x, 10 ** high[1])], "#e4e4e4")
        pen.text((place(x, 1)[0], height - bottom + 8), str(x), "black", font, anchor="mt")
    for y in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000):
        if low[1] <= np.log10(y) <= high[1]:
            pen.line([place(10 ** low[0], y), place(10 ** high[0], y)], "#e4e4e4")
            pen.text((left - 8, place(1, y)[1]), str(y), "black", font, anchor="rm")
    pen.text((left, 20), "CPU milliseconds, forward + backward", "black", font)
    pen.text((width / 2, height - 18), "pictures in one call (frames x views)", "black", font, anchor="mb")
    for k, (name, line) in enumerate(lines.items()):
        color = ("#1f6fb4", "#d2691e", "#2a9245", "#8e44ad")[k % 4]
        (x0, _), (x1, y1) = line[0], line[-1]
        pen.line([place(x0, y1 * x0 / x1), place(x1, y1)], "#9a9a9a", 1)
        pen.line([place(*point) for point in line], color, 2)
        for point in line:
            x, y = place(*point)
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), color)
        pen.text((left + 14, top + 10 + 22 * k), name, color, font)
    pen.text((left + 14, top + 10 + 22 * len(lines)), "grey: exactly linear", "#7a7a7a", font)
    picture.save(path)


def benchmark_gpu(console: Console, rounds: int) -> None:
    if not torch.cuda.is_available():
        console.print("gsplat: not measured, torch finds no CUDA device here.")
        return

    def synchronised(work: Callable) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()
        return run

    table = Table(title=f"gsplat on {torch.cuda.get_device_name()}, {FRAMES * VIEWS} pictures, forward + backward")
    for column in ("Gaussians", "pixels", "gsplat ms per picture", "numba ms", "image, mean off", "worst gradient"):
        table.add_column(column, justify="right")
    for gaussians, size in CASES:
        scene = torus_scene(gaussians, size)
        weights = torch.randn(FRAMES, VIEWS, size, size, 3, generator=torch.Generator().manual_seed(2))
        on_gpu, gpu_weights = {k: x.cuda() if torch.is_tensor(x) else x for k, x in scene.items()}, weights.cuda()
        gpu, cpu = in_turn([synchronised(lambda s=on_gpu, w=gpu_weights: step(s, w)),  # type: ignore[misc]
                            lambda s=scene, w=weights: step(s, w)], rounds, time.perf_counter)  # type: ignore[misc]
        (gpu_image, gpu_gradients), (image, gradients) = step(on_gpu, gpu_weights), step(scene, weights)
        worst = max(float((gpu_gradients[k].cpu() - gradients[k]).norm() / gradients[k].norm()) for k in LEARNT)
        table.add_row(f"{gaussians:,}", str(size), *(f"{1e3 * min(s) / (FRAMES * VIEWS):.3f}" for s in (gpu, cpu)),
                      f"{float((gpu_image.cpu() - image).abs().mean()):.1e}", f"{worst:.1e}")
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="compare gsplat with the CPU rasteriser")
    parser.add_argument("--batch", action="store_true", help="cost over the number of pictures, and of a step of a fit")
    parser.add_argument("--rounds", type=int, default=10, help="how often each side runs")
    parser.add_argument("--plot", type=Path, help="write what --batch has measured as .png")
    arguments = parser.parse_args()
    console = Console(width=110)
    if arguments.batch:
        benchmark_batch(console, arguments.rounds, arguments.plot)
    else:
        (benchmark_gpu if arguments.gpu else benchmark_cpu)(console, arguments.rounds)
