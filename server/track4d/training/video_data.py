"""Training data of the multi-view video models: captioned clips from several cameras, with exact point tracks.

A source gives the n-th clip of an endless, shuffled sequence and nothing else: `Procedural` makes it on the spot, `Shards`
(shards.py) and `MVVideo` (mv_video.py) read it, `Mixture` takes turns. A batch is a function of (seed, step) alone, whoever
computes it, so that worker processes may run ahead and a training that is resumed sees the same data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from track4d_protocol import space
from track4d_protocol.errors import InputError

from ..geometry import zbuffer
from ..geometry.mesh import Mesh
from ..parallel import KERNEL_LOCK
from ..video.diffusion import frame_times
from .actions import NOUNS, draw_action, draw_prompt, draw_verb
from .objects import make_object
from .verbs import animate

GRID = 15  # queries along each side of a view's first frame (Track4DGen, section 3.2)
POINTS = 8  # of them per view in a training step (same section)
TOLERANCE = 0.02  # canonical units; a point may lie so far behind the surface in front of it and still be seen
VALIDATION_SHARE = 0.1  # of the rigs
AZIMUTH_JITTER = 11.25  # degrees; with ELEVATIONS as in MV-Video (Animate3D, data set card)
ELEVATIONS = (0.0, 30.0)
FIELDS_OF_VIEW = (30.0, 55.0)
FARTHEST = 2.2  # bounding sphere radii that the cameras still keep in the picture


@dataclass(frozen=True)
class ClipShape:
    """How clips are drawn: any numbers of views, frames, and pixels along each side.

    Attributes:
        surface: also which place on the object each pixel shows.
    """

    views: int = 4
    frames: int = 16
    size: int = 64
    surface: bool = False


@dataclass
class Clip:
    """A multi-view video with its tracks, compact.

    Attributes:
        video: [V, F, S, S, 4] uint8 sRGB, straight alpha.
        caption: what happens.
        viewmats: [V, 4, 4] float32 canonical world-to-camera; Ks: [V, 3, 3] float32 in pixels.
        tracks: [V, F, Q, 2] float32 pixel positions (centres at +0.5) of the Q queries of each view's first frame.
        visibility: [V, F, Q] bool.
        mask: [V, Q] bool, which queries exist: views see different parts of the grid on the object.
        surface: [V, F, S, S, 3] float16, the place on the object in the first frame, canonical, that each pixel's centre shows;
            pixels of any views and frames with the same value show the same point. Zeros off the object; None if not asked for.
        info: where it comes from: "model", "clip", "licence", "credit", ... where known.
    """

    video: np.ndarray
    caption: str
    viewmats: np.ndarray
    Ks: np.ndarray
    tracks: np.ndarray
    visibility: np.ndarray
    mask: np.ndarray
    surface: np.ndarray | None
    info: dict


@dataclass
class Batch:
    """What a training step gets.

    Attributes:
        video: [B, V, F, 4, H, W] float32 sRGB, premultiplied by alpha: colour + (1 - alpha) * grey is the object on grey.
        captions: B sentences.
        viewmats: [B, V, 4, 4] float32 canonical world-to-camera, OpenCV axes.
        Ks: [B, V, 3, 3] float32 in pixels.
        tracks: [B, V, F, P, 2] float32, x and y in pixels, centres at +0.5; divided by (W, H) they are in units of the picture.
        visibility: [B, V, F, P] bool; a point outside of the picture is not visible.
        mask: [B, V, P] bool, False where a view has fewer than P queries on the object; tracks are 0 there.
        surface: [B, V, F, 3, H, W] float16 as in `Clip`, where asked for.
    """

    video: Tensor
    captions: list[str]
    viewmats: Tensor
    Ks: Tensor
    tracks: Tensor
    visibility: Tensor
    mask: Tensor
    surface: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory; `DataLoader` calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        moved: dict[str, Any] = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


# (seed, position, shape) to the clip at that position of the source's endless sequence; must be picklable.
Source = Callable[[int, int, ClipShape], Clip]


def load_batches(
    source: Source,
    shape: ClipShape | Sequence[ClipShape],
    batch: int,
    seed: int,
    first: int,
    last: int,
    points: int = POINTS,
    workers: int = 1,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """The batches of steps `first` to `last` - 1 in order, made ahead by worker processes.

    Args:
        source: where the clips come from.
        shape: of the clips; several are taken in turn, step by step.
        batch: clips per step of this process.
        seed, first: step `first` of a resumed training gets what it would have got without the interruption.
        points: tracks per view, drawn anew for every clip.
        workers: processes; 0 computes in this one.
        rank, world: of this process among those that train together; each gets its own clips.

    Returns:
        an iterable of `Batch`, `last` - `first` long.
    """
    shapes = (shape,) if isinstance(shape, ClipShape) else tuple(shape)
    steps = _Steps(source, shapes, batch, seed, points, rank, world)
    return DataLoader(
        steps,
        batch_size=None,
        sampler=range(first, last),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # threads of Numba and OpenMP don't survive a fork
        prefetch_factor=4 if workers else None,
        pin_memory=torch.cuda.is_available(),
    )


@dataclass(frozen=True)
class _Steps(Dataset):
    source: Source
    shapes: tuple[ClipShape, ...]
    batch: int
    seed: int
    points: int
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch:
        start = (step * self.world + self.rank) * self.batch
        shape = self.shapes[step % len(self.shapes)]
        return make_batch(self.source, shape, self.seed, range(start, start + self.batch), self.points)


def make_batch(source: Source, shape: ClipShape, seed: int, positions: Sequence[int], points: int = POINTS) -> Batch:
    """The clips at these positions of a source's sequence, with `points` random tracks per view."""
    clips = [source(seed, position, shape) for position in positions]
    drawn = [_draw_tracks(clip, points, np.random.default_rng([seed, position, 1])) for clip, position in zip(clips, positions)]
    video = torch.from_numpy(np.stack([clip.video for clip in clips])).permute(0, 1, 2, 5, 3, 4).float() / 255
    video[:, :, :, :3] *= video[:, :, :, 3:]
    tracks, visibility, mask = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*drawn))
    surfaces = [clip.surface for clip in clips if clip.surface is not None]
    return Batch(
        video.contiguous(),
        [clip.caption for clip in clips],
        torch.from_numpy(np.stack([clip.viewmats for clip in clips])),
        torch.from_numpy(np.stack([clip.Ks for clip in clips])),
        tracks,
        visibility,
        mask,
        torch.from_numpy(np.stack(surfaces)).permute(0, 1, 2, 5, 3, 4) if surfaces else None,
    )


def _draw_tracks(clip: Clip, points: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`points` of each view's queries: tracks [V, F, P, 2], visibility [V, F, P], mask [V, P]."""
    views, frames, _, _ = clip.tracks.shape
    tracks, visibility = np.zeros((views, frames, points, 2), np.float32), np.zeros((views, frames, points), bool)
    mask = np.zeros((views, points), bool)
    for v in range(views):
        chosen = rng.permutation(np.flatnonzero(clip.mask[v]))[:points]
        tracks[v, :, : len(chosen)] = clip.tracks[v][:, chosen]
        visibility[v, :, : len(chosen)] = clip.visibility[v][:, chosen]
        mask[v, : len(chosen)] = True
    return tracks, visibility, mask


def shuffled(seed: int, position: int, count: int) -> int:
    """The index at a position of an endless sequence that goes through `count` clips in another order every time."""
    return int(np.random.default_rng([seed, position // count, count]).permutation(count)[position % count])


def evenly(rng: np.random.Generator, views: int, wanted: int) -> np.ndarray:
    """Which of the views, that go around the object, to take: all, or some as evenly as they come from a random one on.

    Raises:
        InputError: too_few_views.
    """
    if wanted > views:
        raise InputError("too_few_views", f"A clip has {views} views, the training asks for {wanted}.",
                         "Ask for less, or render the data set with more.")
    start = int(rng.integers(views)) if wanted < views else 0
    return (start + np.arange(wanted) * views // wanted) % views


def strided(rng: np.random.Generator, frames: int, wanted: int) -> np.ndarray:
    """Which of the frames to take: every k-th with the largest k there is room for, from a random one on.

    Raises:
        InputError: too_few_frames.
    """
    if wanted > frames:
        raise InputError("too_few_frames", f"A clip has {frames} frames, the training asks for {wanted}.",
                         "Ask for less, or render the data set with more.")
    stride = frames // wanted
    return int(rng.integers(frames - stride * (wanted - 1))) + stride * np.arange(wanted)


def fit_clip(clip: Clip, shape: ClipShape, rng: np.random.Generator) -> Clip:
    """A stored clip with fewer views, frames or pixels: every k-th view and frame from a random first one, pictures reduced.

    Raises:
        InputError: too_few_views, too_few_frames, clip_too_small.
    """
    views, frames, size = clip.video.shape[:3]
    if shape.size > size:
        raise InputError("clip_too_small", f"A clip has {size} pixels, the training asks for {shape.size}.",
                         "Ask for less, or render the data set with more.")
    v, f = evenly(rng, views, shape.views), strided(rng, frames, shape.frames)
    video, surface, scale = clip.video[v][:, f], clip.surface, shape.size / size
    surface = surface[v][:, f] if surface is not None else None
    if shape.size != size:
        video = np.stack([[reduced(picture, shape.size) for picture in view] for view in video])
        at = ((np.arange(shape.size) + 0.5) / scale).astype(int)
        surface = surface[:, :, at][:, :, :, at] if surface is not None else None
    return Clip(
        video,
        clip.caption,
        clip.viewmats[v],
        zbuffer.scale_intrinsics(clip.Ks[v], scale),
        clip.tracks[v][:, f] * np.float32(scale),
        clip.visibility[v][:, f],
        clip.mask[v] & clip.visibility[v, f[0]],  # a query is seen in the first frame
        surface,
        clip.info,
    )


def reduced(picture: np.ndarray, size: int) -> np.ndarray:
    """A straight-alpha picture [S, S, 4] uint8 at another size; colours count as much as their alpha."""
    alpha = picture[..., 3:] / np.float32(255)
    small = cv2.resize(np.concatenate([picture[..., :3] * alpha, alpha], -1), (size, size), interpolation=cv2.INTER_AREA)
    colors, alpha = small[..., :3] / np.maximum(small[..., 3:], 1e-6), small[..., 3:] * 255
    return (np.concatenate([colors, alpha], -1).clip(0, 255) + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class Mixture:
    """Two sources in turn; `share` of the clips are the second's, evenly spread."""

    first: Source
    second: Source
    share: float

    def __call__(self, seed: int, position: int, shape: ClipShape) -> Clip:
        done = math.floor(position * self.share)
        if math.floor((position + 1) * self.share) > done:
            return self.second(seed, done, shape)
        return self.first(seed, position - done, shape)


# Clips made on the spot


@dataclass(frozen=True)
class Procedural:
    """Random objects that do what a random sentence says, before jittered orbit cameras.

    Attributes:
        validation: another sequence, which shares no object with the training's.
    """

    validation: bool = False

    def __call__(self, seed: int, position: int, shape: ClipShape) -> Clip:
        rng = np.random.default_rng([seed, position, 2 + self.validation])
        thing = make_object(rng)
        action, size, pace = draw_action(rng, draw_verb(rng, thing))
        caption = draw_prompt(rng, NOUNS[thing.plan], action.verb, size, pace)
        vertices = animate(thing, action, frame_times(shape.frames).numpy())  # [F, N, 3]
        mesh = Mesh(thing.vertices, thing.faces, textures=[np.ones((1, 1, 3), np.float32)])
        viewmats, Ks = draw_cameras(rng, shape, reach(vertices))
        return draw_clip(mesh, vertices, viewmats, Ks, shape, caption, {"model": thing.plan}, thing.colors)


def reach(vertices: np.ndarray) -> float:
    """The largest distance of any vertex [F, N, 3] from the origin, at least 1 and at most `FARTHEST`."""
    return float(np.clip(np.linalg.norm(vertices, axis=-1).max(), 1, FARTHEST))


def orbit_cameras(shape: ClipShape, radius: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """The cameras of a capture, stepped back so that a sphere of this radius is in the picture.

    Returns:
        viewmats [V, 4, 4], Ks [V, 3, 3], float32.
    """
    azimuths = np.arange(shape.views) * 360 / shape.views
    return space.orbit_viewmats(azimuths, distance=space.DISTANCE * radius), space.intrinsics(shape.size, shape.views)


def draw_cameras(rng: np.random.Generator, shape: ClipShape, radius: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Orbit cameras with one random start, elevation and field of view; the object is as large as in a capture.

    Args:
        radius: of the sphere about the origin to keep in the picture.

    Returns:
        viewmats [V, 4, 4], Ks [V, 3, 3], float32.
    """
    azimuths = np.arange(shape.views) * 360 / shape.views + rng.uniform(-AZIMUTH_JITTER, AZIMUTH_JITTER)
    angle = rng.uniform(*FIELDS_OF_VIEW)
    room = space.DISTANCE * math.sin(math.radians(space.FIELD_OF_VIEW) / 2)  # of the capture: a little more than 1
    distance = room * rng.uniform(1, 1.15) * radius / math.sin(math.radians(angle) / 2)
    viewmats = space.orbit_viewmats(azimuths, rng.uniform(*ELEVATIONS), distance)
    return viewmats, space.intrinsics(shape.size, shape.views, angle)


def draw_clip(
    mesh: Mesh,
    vertices: np.ndarray,
    viewmats: np.ndarray,
    Ks: np.ndarray,
    shape: ClipShape,
    caption: str,
    info: dict,
    shading: np.ndarray | None = None,
) -> Clip:
    """Pictures of a moving mesh, with the exact tracks of the query grid.

    Args:
        mesh: gives triangles, uvs and textures.
        vertices: [F, N, 3] canonical.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of `shape.size`.
        shading: [N] or [N, 3] factor on the texture's colours; None for 1.
    """
    rgba = zbuffer.render(mesh, vertices, viewmats, Ks, shape.size, shading=shading)  # [F, V, S, S, 4]
    video = np.empty((len(viewmats), len(vertices), shape.size, shape.size, 4), np.uint8)
    _straight_bytes(rgba, video)
    fragments = zbuffer.rasterise(vertices, mesh.faces, viewmats, Ks, shape.size)
    surface = None
    if shape.surface:
        places = np.zeros((*fragments.faces.shape, 3), np.float32)
        _places(fragments.faces, fragments.weights, mesh.faces, np.ascontiguousarray(vertices[0], np.float32), places)
        places = places.reshape(len(vertices), len(viewmats), shape.size, shape.size, 3)
        surface = np.ascontiguousarray(places.swapaxes(0, 1), np.float16)
    tracks, visibility, mask = exact_tracks(mesh.faces, vertices, viewmats, Ks, fragments)
    return Clip(video, caption, viewmats, Ks, tracks, visibility, mask, surface, info)


@njit(cache=True, error_model="numpy")
def _straight_bytes(rgba, video):
    """Premultiplied [F, V, S, S, 4] in 0..1 to [V, F, S, S, 4] uint8 with straight alpha."""
    half = np.float32(0.5)
    for f in range(rgba.shape[0]):
        for v in range(rgba.shape[1]):
            for y in range(rgba.shape[2]):
                for x in range(rgba.shape[3]):
                    alpha = rgba[f, v, y, x, 3]
                    scale = np.float32(255) / alpha if alpha > 0 else np.float32(0)
                    for c in range(3):
                        video[v, f, y, x, c] = np.uint8(min(rgba[f, v, y, x, c] * scale, np.float32(255)) + half)
                    video[v, f, y, x, 3] = np.uint8(alpha * np.float32(255) + half)


@njit(cache=True, error_model="numpy")
def _places(faces, weights, triangles, rest, places):
    """What `zbuffer.interpolate` gives for three values, without its temporary arrays."""
    for b in range(faces.shape[0]):
        for y in range(faces.shape[1]):
            for x in range(faces.shape[2]):
                t = faces[b, y, x]
                if t < 0:
                    continue
                w1, w2 = weights[b, y, x, 0], weights[b, y, x, 1]
                i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
                for c in range(3):
                    places[b, y, x, c] = (1 - w1 - w2) * rest[i, c] + w1 * rest[j, c] + w2 * rest[k, c]


# Exact tracks


def query_grid(size: int) -> np.ndarray:
    """Pixels (column, row) under the 15 x 15 grid over a picture, row by row; [GRID * GRID, 2] int64."""
    ticks = ((np.arange(GRID) + 0.5) * size / GRID).astype(np.int64)
    return np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)


def exact_tracks(
    faces: np.ndarray, vertices: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, fragments: zbuffer.Fragments
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the surface points under the first frame's query grid go.

    A query is attached to the triangle that its pixel's centre shows and moves with it. It is visible where no triangle lies
    in front of it: the one that the z-buffer has in its pixel is taken as a plane, so that a slanted surface doesn't hide itself.

    Args:
        faces: [T, 3]; vertices: [F, N, 3]; viewmats: [V, 4, 4]; Ks: [V, 3, 3].
        fragments: of all frames, from `rasterise` with these cameras.

    Returns:
        tracks [V, F, Q, 2] float32, visibility [V, F, Q] bool, mask [V, Q] bool, where Q is the most that any view has.
    """
    views, frames, size = len(viewmats), len(vertices), fragments.faces.shape[1]
    column, row = query_grid(size).T
    hit = [np.flatnonzero(fragments.faces[v, row, column] >= 0) for v in range(views)]  # frame 0 comes first
    most = max(map(len, hit))
    tracks, visibility = np.zeros((views, frames, most, 2), np.float32), np.zeros((views, frames, most), bool)
    mask = np.arange(most) < np.array([len(on) for on in hit])[:, None]
    faces = np.ascontiguousarray(faces, np.int32)
    for v, on in enumerate(hit):
        face, weights = fragments.faces[v, row[on], column[on]], fragments.weights[v, row[on], column[on]]
        weights = np.concatenate([1 - weights.sum(1, keepdims=True), weights], 1)
        points = (vertices[:, faces[face]] * weights[:, :, None]).sum(2)  # [F, Q, 3]
        uv, depth = zbuffer.project(points, viewmats[v : v + 1], Ks[v : v + 1])
        screen, far = zbuffer.project(vertices, viewmats[v : v + 1], Ks[v : v + 1])
        seen = fragments.faces.reshape(frames, views, size, size)[:, v]
        tracks[v, :, : len(on)] = uv[:, 0]
        with KERNEL_LOCK:
            _in_front(uv[:, 0], depth[:, 0], face, np.ascontiguousarray(seen), faces, screen[:, 0], far[:, 0],
                      np.float32(TOLERANCE), visibility[v, :, : len(on)])
    return tracks, visibility, mask


@njit(cache=True, error_model="numpy")
def _in_front(uv, depth, own, seen, triangles, screen, far, tolerance, visible):
    for f in range(uv.shape[0]):
        for q in range(uv.shape[1]):
            x, y = uv[f, q, 0], uv[f, q, 1]
            column, row = int(math.floor(x)), int(math.floor(y))
            if depth[f, q] < zbuffer.NEAR or min(column, row) < 0 or max(column, row) >= seen.shape[1]:
                continue
            t = seen[f, row, column]
            if t < 0 or t == own[q]:  # on the outline the pixel's centre may miss the object
                visible[f, q] = True
                continue
            i, j, k = triangles[t, 0], triangles[t, 1], triangles[t, 2]
            ax, ay = screen[f, i, 0], screen[f, i, 1]
            bx, by = screen[f, j, 0] - ax, screen[f, j, 1] - ay
            cx, cy = screen[f, k, 0] - ax, screen[f, k, 1] - ay
            area = bx * cy - by * cx
            u, w = ((x - ax) * cy - (y - ay) * cx) / area, ((y - ay) * bx - (x - ax) * by) / area
            ti, tj, tk = 1 / far[f, i], 1 / far[f, j], 1 / far[f, k]
            inverse = min(max((1 - u - w) * ti + u * tj + w * tk, min(ti, tj, tk)), max(ti, tj, tk))
            visible[f, q] = 1 / inverse > depth[f, q] - tolerance
