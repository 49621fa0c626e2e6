"""Trackers: accuracy of optical flow against exact tracks of real clips, and the speed of CoTracker3.

    python benchmarks/trackers.py accuracy [CLIP ...] [--assets DIR]
    python benchmarks/trackers.py speed [--rounds 1]
    python benchmarks/trackers.py views [--rounds 1] [--threads 1]

Accuracy: a 15 x 15 grid of query points on the object in frame 0 of four views (16 frames, 256 pixels, textured and lit),
TAP-Vid's figures over frames 1..15: PCK at 1, 4 and 16 pixels, delta_avg (mean PCK at 1, 2, 4, 8, 16), average Jaccard, occlusion
accuracy, mean distance of the visible points, and CPU ms per frame and view (flow in both directions). "still" says that nothing
moves.

Speed: full-size network, random weights, one thread, CPU time. "plain" is the same mathematics written straightforwardly: all
frames encoded in one batch, patches by `grid_sample`, the templates repeated over the frames, explicit softmax.

Views: the paper's 8 points a view with the support grid's 36, one iteration of four views in a batch, against one view after
another in the same network and in the plain one. With more threads wall time counts: only a quiet machine gives a figure then.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import recover
import torch
import torch.nn.functional as F
from torch import Tensor
from track4d.tracking import MovingMesh, Tracks, query_grid, track
from track4d.tracking.cotracker import LEVELS, PER_HEAD, RADIUS, SIDE, Attention, CoTracker3, Estimate, to_cells
from track4d.tracking.predictor import grid_points
from track4d.tracking.tracks import compare

CLIPS = ("fox", "gull", "cesium_man", "shark", "spider")
FIGURES = ("delta_1", "delta_4", "delta_16", "delta_avg", "average_jaccard", "occlusion_accuracy", "epe")


def accuracy(clips: list[str], assets: Path) -> None:
    print(f"{'clip':12} {'tracker':8}" + "".join(f"{name:>19}" for name in (*FIGURES, "ms")))
    for clip in clips:
        truth = recover.load_truth(clip, assets)
        video, viewmats, Ks = recover.film(truth, degraded=False)
        scene = MovingMesh(truth.vertices, truth.mesh.faces, viewmats, Ks)
        rows: dict[str, list] = {"flow": [], "still": []}
        for v in range(len(video)):  # one view at a time: each keeps another number of grid points
            queries = query_grid(15, *video.shape[2:4], mask=video[v, 0, :, :, 3] > 127)[None]
            one = MovingMesh(scene.vertices, scene.faces, viewmats[v:v + 1], Ks[v:v + 1])
            exact = track(video[v:v + 1], queries, one)
            start = time.process_time()
            found = {"flow": track(video[v:v + 1], queries)}
            spent = (time.process_time() - start) / video.shape[1] * 1e3
            still = np.broadcast_to(exact.points[:, :1], exact.points.shape)
            found["still"] = Tracks(still, np.ones_like(exact.visibility), exact.confidence)
            for name, tracks in found.items():
                figures = compare(tracks, exact, queries, video.shape[2:4])
                rows[name].append([figures[key] for key in FIGURES] + [spent if name == "flow" else 0])
        for name, values in rows.items():
            print(f"{clip:12} {name:8}" + "".join(f"{value:19.3f}" for value in np.mean(values, 0)), flush=True)


class PlainCoTracker3(CoTracker3):
    """The same network, written straightforwardly."""

    def encode(self, video: Tensor) -> list[Tensor]:
        finest = F.normalize(self.fnet(video.flatten(0, 1) / 127.5 - 1), dim=1, eps=1e-6)
        pyramid = [finest]
        for _ in range(1, LEVELS):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return [level.unflatten(0, video.shape[:2]) for level in pyramid]  # [B, T, C, h, w]

    def patches(self, maps: Tensor, coords: Tensor) -> Tensor:
        """Maps [B, C, h, w] around [B, N, 2]; [B, N, 49, C]."""
        steps = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float32)
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).view(-1, 2)
        size = coords.new_tensor([maps.shape[-1] - 1, maps.shape[-2] - 1])
        places = (coords[:, :, None] + offsets) / size * 2 - 1  # [B, N, 49, 2]
        return F.grid_sample(maps, places, padding_mode="border", align_corners=True).permute(0, 2, 3, 1)

    def templates(self, pyramid: list[Tensor], queries: Tensor) -> list[Tensor]:
        return [self.patches(maps[:, 0], queries[..., 1:] / 2**k) for k, maps in enumerate(pyramid)]  # all ask in frame 0

    def correlate(self, pyramid: list[Tensor], templates: list[Tensor], coords: Tensor) -> Tensor:
        levels = []
        for k, (maps, template) in enumerate(zip(pyramid, templates)):
            around = self.patches(maps.flatten(0, 1), coords.flatten(0, 1) / 2**k).unflatten(0, coords.shape[:2])
            repeated = template[:, None].expand(-1, coords.shape[1], -1, -1, -1)
            volume = torch.einsum("btnpc,btnqc->bntpq", around, repeated)
            levels.append(self.corr_mlp(volume.reshape(*volume.shape[:3], SIDE**4)))
        return torch.cat(levels, -1)


def plain_attention(self: Attention, x: Tensor, context: Tensor) -> Tensor:
    """The attention of the network with its matrix of weights written out."""
    heads = (len(x), -1, x.shape[-1] // PER_HEAD, PER_HEAD)
    q = self.to_q(x).view(heads).transpose(1, 2)
    k, v = (part.reshape(heads).transpose(1, 2) for part in self.to_kv(context).chunk(2, -1))
    weights = (q @ k.transpose(-1, -2) * PER_HEAD**-0.5).softmax(-1)
    return self.to_out((weights @ v).transpose(1, 2).flatten(2))


def seconds(work: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    work()
    return clock() - start


def compared(name: str, first: Callable[[], object], second: Callable[[], object], rounds: int,
             clock: Callable[[], float] = time.process_time) -> None:
    """Prints the seconds of two ways in turn, and the median of their ratios."""
    first(), second()
    times = [(seconds(first, clock), seconds(second, clock)) for _ in range(rounds)]
    ratio = statistics.median(b / a for a, b in times)
    print(f"{name:58}{min(a for a, _ in times):10.2f}{min(b for _, b in times):10.2f}{ratio:8.2f}", flush=True)


def queries_of(model: CoTracker3, views: int, points: int, support: int) -> Tensor:
    rows, columns = model.resolution
    at = torch.cat([grid_points(points, rows, columns), grid_points(support, rows, columns)] if support
                   else [grid_points(points, rows, columns)])
    return F.pad(at, (1, 0)).expand(views, -1, -1)


def with_plain_attention(work: Callable[[], object]) -> None:
    ours = Attention.forward
    Attention.forward = plain_attention  # type: ignore[method-assign]
    try:
        work()
    finally:
        Attention.forward = ours  # type: ignore[method-assign]


@torch.inference_mode()
def speed(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, plain = CoTracker3().eval(), PlainCoTracker3().eval()
    plain.load_state_dict(ours.state_dict())
    video = F.interpolate(torch.rand(16, 3, 24, 32), ours.resolution, mode="bicubic").clamp(0, 1)[None] * 255
    print(f"{'CPU seconds, one thread':58}{'ours':>10}{'other':>10}{'ratio':>8}")

    queries = to_cells(queries_of(ours, 1, 15, 0))
    pyramid, plain_pyramid = ours.encode(video), plain.encode(video)
    coords = queries[:, None, :, 1:].expand(-1, 16, -1, -1).contiguous()
    estimate = Estimate(coords, torch.zeros_like(coords[..., 0]), torch.zeros_like(coords[..., 0]))
    templates, plain_templates = ours.templates(pyramid, queries), plain.templates(plain_pyramid, queries)
    tokens = ours.tokens(estimate, ours.correlate(pyramid, templates, coords))
    far = (ours.refine(pyramid, templates, estimate, 1).coords - plain.refine(plain_pyramid, plain_templates, estimate, 1).coords)
    print(f"plain and ours differ by at most {4 * float(far.abs().max()):.1e} pixels after one iteration")
    compared("encoder, 16 frames 384x512: ours / plain", lambda: ours.encode(video), lambda: plain.encode(video), rounds)
    compared("correlation, 225 points, one iteration: ours / plain", lambda: ours.correlate(pyramid, templates, coords),
             lambda: plain.correlate(plain_pyramid, plain_templates, coords), rounds)
    compared("transformer, 225 points, one iteration: ours / plain", lambda: ours.updateformer(tokens),
             lambda: with_plain_attention(lambda: plain.updateformer(tokens)), rounds)
    compared("whole clip, 225 points, 6 iterations: ours / plain", lambda: ours.locate(ours.encode(video), queries),
             lambda: with_plain_attention(lambda: plain.locate(plain.encode(video), queries)), rounds)


@torch.inference_mode()
def views(rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    clock = time.process_time if threads == 1 else time.perf_counter
    ours, plain = CoTracker3().eval(), PlainCoTracker3().eval()
    plain.load_state_dict(ours.state_dict())
    queries = to_cells(queries_of(ours, 4, 8, 0)[:, :44] * torch.tensor([1, 0.25, 0.25]))
    video = torch.rand(4, 16, 3, 96, 128) * 255
    pyramid, plain_pyramid = ours.encode(video), plain.encode(video)

    def loop(model: CoTracker3, levels: list[Tensor]) -> None:
        for v in range(len(queries)):
            model.locate([level[v:v + 1] for level in levels], queries[v:v + 1], 1)

    title = f"4 views of 44 points, 16 frames, {threads} thread{'s' * (threads > 1)}"
    print(f"{title:58}{'ours':>10}{'other':>10}{'ratio':>8}")
    compared("batch / loop", lambda: ours.locate(pyramid, queries, 1), lambda: loop(ours, pyramid), rounds, clock)
    compared("batch / plain loop", lambda: ours.locate(pyramid, queries, 1),
             lambda: with_plain_attention(lambda: loop(plain, plain_pyramid)), rounds, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("accuracy", "speed", "views"))
    parser.add_argument("clips", nargs="*", default=list(CLIPS))
    parser.add_argument("--assets", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "assets")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="of `views`")
    arguments = parser.parse_args()
    if arguments.what == "accuracy":
        accuracy(arguments.clips, arguments.assets)
    elif arguments.what == "speed":
        speed(arguments.rounds)
    else:
        views(arguments.rounds, arguments.threads)


if __name__ == "__main__":
    sys.exit(main())
