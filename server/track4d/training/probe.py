"""Which features of a video diffusion U-Net track points best? (Track4DGen, section 3.2 and Fig. 3)

A real video is slightly noised and denoised once; the points of its first frame are looked for in the later frames by the nearest
neighbour of their descriptors, block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..video.features import SLIGHT_NOISE, all_features
from ..video.multiview_video import MultiViewVideo
from .video_data import Clip
from .video_losses import sample_features, similarity_maps

if TYPE_CHECKING:
    from rich.table import Table

MOVING = 1 / 16  # of the picture's side: a point that has moved less is no test
CLOSE = 1 / 16  # a point found no further from the truth counts as found (PCK)
QUERIES = 32  # of each view's grid, about
STANDING_STILL = "standing still"


@dataclass(frozen=True)
class TrackingScore:
    """How well points that moved were found again.

    Attributes:
        name: of the features.
        channels, height, width: of their maps.
        error: mean distance of the nearest neighbour from the truth, in hundredths of the picture's side.
        pck: share of points found within a 16th of the picture's side.
        centred_error, centred_pck: the same when each frame's mean descriptor of the object is subtracted before.
        likeness: cosine of a point's descriptors in adjacent frames; contrast: the same minus that of different points.
        points: compared.
    """

    name: str
    channels: int
    height: int
    width: int
    error: float
    pck: float
    centred_error: float
    centred_pck: float
    likeness: float
    contrast: float
    points: int


def track_errors(
    model: MultiViewVideo, clips: Sequence[Clip], names: Sequence[str] = (), step: int = SLIGHT_NOISE
) -> list[TrackingScore]:
    """Scores of features on clips with known tracks, and last what standing still would score.

    Args:
        names: out of `unet.feature_names()`; all by default.
        step: training step of the slight noise.
    """
    names = list(names) or model.unet.feature_names()
    sums: dict[str, list[np.ndarray]] = {name: [] for name in [*names, STANDING_STILL]}
    shapes = {STANDING_STILL: (0, 0, 0)}
    for seed, clip in enumerate(clips):
        features = all_features(model, clip.video, clip.caption, clip.viewmats, names, step, seed)
        every = max(1, clip.tracks.shape[2] // QUERIES)
        tracks = torch.from_numpy(clip.tracks[:, :, ::every] / np.float32(clip.video.shape[2]))  # [V, F, Q, 2] of the picture
        moved = (tracks - tracks[:, :1]).norm(dim=-1)
        visible = torch.from_numpy((clip.visibility & clip.mask[:, None])[:, :, ::every])
        tested = (visible & visible[:, :1] & (moved > MOVING))[:, 1:]  # [V, F - 1, Q]
        sums[STANDING_STILL].append(_columns(moved[:, 1:], moved[:, 1:], tested, torch.zeros(2)))
        on = torch.from_numpy(clip.video[..., 3] > 127)  # [V, F, H, W]
        for name in names:
            maps = features[name]
            shapes[name] = (maps.shape[2], maps.shape[3], maps.shape[4])
            found = [nearest(values, tracks[:, 0]) for values in (maps, centred(maps, on))]
            plain, shifted = ((positions - tracks)[:, 1:].norm(dim=-1) for positions in found)
            sums[name].append(_columns(plain, shifted, tested, _likeness(maps, tracks, visible)))
    scores = []
    for name, parts in sums.items():
        values = np.concatenate(parts)  # [points, 6]
        means = values.mean(0) if len(values) else np.full(6, np.nan)
        error, pck, centred_error, centred_pck, likeness, others = means.tolist()
        scores.append(TrackingScore(name, *shapes[name], 100 * error, pck, 100 * centred_error, centred_pck,
                                    likeness, likeness - others, len(values)))
    return scores


def _columns(distance: Tensor, centred_distance: Tensor, tested: Tensor, likeness: Tensor) -> np.ndarray:
    """One row per tested point: error, found, the same centred, and the clip's likeness of the same and of other points."""
    found = [column for values in (distance[tested], centred_distance[tested]) for column in (values, (values < CLOSE).float())]
    return torch.cat([torch.stack(found, 1), likeness.expand(int(tested.sum()), 2)], 1).numpy()


def nearest(features: Tensor, queries: Tensor) -> Tensor:
    """Where the first frame's points are found by the greatest cosine similarity.

    The similarity maps are enlarged, so that maps of all resolutions are searched as finely as each other.

    Args:
        features: [V, F, C, h, w].
        queries: [V, Q, 2] in the first frame, in units of the picture.

    Returns:
        [V, F, Q, 2] in units of the picture; the first frame's are searched too.
    """
    fine = 64
    similar = similarity_maps(features, queries)  # [V, F, Q, h, w]
    enlarged = F.interpolate(similar.flatten(0, 1), (fine, fine), mode="bilinear", align_corners=False)
    cell = enlarged.flatten(-2).argmax(-1).unflatten(0, similar.shape[:2])  # [V, F, Q]
    return torch.stack([cell % fine + 0.5, torch.div(cell, fine, rounding_mode="floor") + 0.5], -1) / fine


def centred(features: Tensor, on: Tensor) -> Tensor:
    """Features [V, F, C, h, w] minus their mean over the object `on` [V, F, H, W] in each view and frame."""
    inside = F.interpolate(on.float(), features.shape[-2:], mode="area")[:, :, None]  # [V, F, 1, h, w]
    mean = (features * inside).sum((-2, -1), keepdim=True) / inside.sum((-2, -1), keepdim=True).clamp(min=1e-6)
    return features - mean


def _likeness(features: Tensor, tracks: Tensor, visible: Tensor) -> Tensor:
    """Mean cosine of the same points in adjacent frames, and of neighbours in the list of points; [2]."""
    points = sample_features(features, tracks)  # [V, F, Q, C]
    both = visible[:, 1:] & visible[:, :-1]
    same = (points[:, 1:] * points[:, :-1]).sum(-1)[both].mean()
    shift = max(1, points.shape[2] // 2)
    others = (points * points.roll(shift, 2)).sum(-1)[visible & visible.roll(shift, 2)].mean()
    return torch.stack([same, others])


def heat_maps(model: MultiViewVideo, clip: Clip, names: Sequence[str], points: int = 2, step: int = SLIGHT_NOISE,
              zoom: int = 3) -> np.ndarray:
    """A picture of the similarity of some points to all places of later frames, as in the paper's Fig. 3.

    Args:
        names: features to draw, one row each under the row of frames.
        points: how many points of the first view, the ones that move furthest.

    Returns:
        [H, W, 3] uint8 sRGB. White crosses: where the point is; white circles: where its nearest neighbour is.
    """
    import cv2

    features = all_features(model, clip.video, clip.caption, clip.viewmats, list(names), step)
    size = clip.video.shape[2] * zoom
    tracks = clip.tracks[0] / clip.video.shape[2]  # [F, Q, 2]
    usable = clip.visibility[0].all(0) & clip.mask[0]
    reach = np.where(usable, np.linalg.norm(tracks - tracks[:1], axis=-1).max(0), -1)
    shown = np.linspace(0, len(tracks) - 1, min(6, len(tracks))).round().astype(int)
    rgba = clip.video[0][shown].astype(np.float32) / 255
    frames = ((rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]) * 255).astype(np.uint8)
    blocks = []
    for point in np.argsort(-reach)[:points]:
        query = torch.from_numpy(tracks[:1, point].astype(np.float32))[None]  # [1, 1, 2]
        rows = [("", [cv2.resize(frame, (size, size), interpolation=cv2.INTER_NEAREST) for frame in frames], None)]
        for name in names:
            maps = features[name][:1]
            similar = similarity_maps(maps, query)[0, :, 0].numpy()[shown]  # [K, h, w]
            low, high = similar.min(), similar.max()
            tiles = []
            for likeness in similar:
                scaled = ((likeness - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
                enlarged = cv2.resize(scaled, (size, size), interpolation=cv2.INTER_LINEAR)
                tiles.append(cv2.applyColorMap(enlarged, cv2.COLORMAP_INFERNO)[..., ::-1].copy())
            rows.append((name, tiles, nearest(maps, query)[0, :, 0].numpy()[shown]))
        for name, tiles, found in rows:
            for k, (tile, frame) in enumerate(zip(tiles, shown)):
                ink = (255, 255, 255) if name else (220, 0, 0)
                cv2.drawMarker(tile, tuple((tracks[frame, point] * size).astype(int).tolist()), ink, cv2.MARKER_CROSS, 13, 2)
                if found is not None:
                    cv2.circle(tile, tuple((found[k] * size).astype(int).tolist()), 7, ink, 1, cv2.LINE_AA)
            label = np.full((size, 230, 3), 255, np.uint8)
            cv2.putText(label, name or "frames", (4, size // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
            blocks.append(np.concatenate([label, *tiles], 1))
    return np.concatenate(blocks)


def score_table(scores: Sequence[TrackingScore], supervised: str) -> Table:
    """The scores as a table in the terminal.

    Args:
        supervised: the features that the tracking losses act on; they are marked.
    """
    from rich.table import Table

    table = Table("features", "maps", "error %", "PCK", "centred error %", "centred PCK", "likeness", "contrast")
    for score in scores:
        name = f"{score.name} *" if score.name == supervised else score.name
        if score.name == STANDING_STILL:
            table.add_row(name, "", f"{score.error:.2f}", f"{score.pck:.2f}", "", "", "", "")
            continue
        table.add_row(name, f"{score.channels} x {score.height} x {score.width}", f"{score.error:.2f}", f"{score.pck:.2f}",
                      f"{score.centred_error:.2f}", f"{score.centred_pck:.2f}", f"{score.likeness:.2f}", f"{score.contrast:.2f}")
    return table
