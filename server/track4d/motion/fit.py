"""A mesh and a multi-view video of it in, its motion out (Stage Two)."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import numpy as np
import psutil
from threadpoolctl import threadpool_limits
from track4d_protocol.errors import InputError

from ..geometry import zbuffer
from ..geometry.mesh import Mesh, check_mesh, weld
from ..progress import Report, silent
from .appearance import estimate_shading
from .field import MotionField
from .footage import WORKING_SIZE, Footage, read_footage
from .nodes import LARGEST_SURFACE, build_nodes
from .register import COARSE, Look, Places, Pose, Registration

LEAST_OVERLAP = 0.7  # intersection over union of the silhouettes in frame 0
LEAST_PSNR = 12.0  # dB on the object in frame 0
RECALL = 2.0  # times its cost that a frame's fit may cost before it is tried again from an earlier frame that looks alike
LATE_ROUNDS = 3.0  # stiffness factor of the first round from such a start, or from a neighbour in time
LOST = 1.4  # times the cost of frame 0, whose pose is known: a frame that costs no more has lost nothing
CLEARLY = 0.97  # of a cost: where another start gets below, it is better
# What the fit takes at its peak, estimated; bytes.
STARTS = 2  # fitted side by side
PIXEL_BYTES = 4 * 36 + 80  # of a view's picture while it is rendered: fragments at twice the size, colours, flow
VERTEX_BYTES, TRIANGLE_BYTES = 1000, 500  # welding, edges, binding


@dataclass(frozen=True)
class FitPreset:
    """How much work the fit does.

    Attributes:
        nodes: control nodes on the surface.
        points: surface points that are matched.
        rounds: stiffness factor of each round of a frame; outlier tolerance falls with it.
        stiffness: weight of the as-rigid-as-possible energy at factor 1.
        steps: Gauss-Newton steps per round.
        track_rounds, track_stiffness: the same where 3D tracks say where the surface goes. Made-up tracks tear, so the stiffness
            grows in frames whose edges would change too much; `exact_stiffness` is for tracks that don't.
    """

    nodes: int = 200
    points: int = 1650
    rounds: tuple[float, ...] = (30, 10, 3, 1, 1)
    stiffness: float = 20.0
    steps: int = 2
    track_rounds: tuple[float, ...] = (3, 1)
    track_stiffness: float = 60.0
    exact_stiffness: float = 0.3


DEFAULT = FitPreset()
FAST = FitPreset(nodes=120, points=1200, rounds=(10, 3, 1), track_rounds=(1,))


@dataclass(frozen=True)
class Tracks3D:
    """Where each vertex goes according to the video generator.

    Attributes:
        positions: [F, N, 3] float32, canonical.
        confidence: [N] or [F, N] in 0..1; 0 = unknown.
        exact: measured, not made up: the surface follows them however it stretches.
    """

    positions: np.ndarray
    confidence: np.ndarray
    exact: bool = False


def fit_motion(mesh: Mesh, video: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, shading: np.ndarray | None = None,
               tracks: Tracks3D | None = None, preset: FitPreset = DEFAULT, seed: int = 0, report: Report = silent,
               masks: np.ndarray | None = None) -> MotionField:
    """Finds the motion of a mesh in a multi-view video.

    Args:
        mesh: canonical, textured, in the pose of frame 0.
        video: [V, F, H, W, 3 or 4] uint8 sRGB, straight alpha, or on a plain background without alpha.
        viewmats: [V, 4, 4] world-to-camera; Ks: [V, 3, 3] in pixels of the video.
        shading: [N, 3] factor on the texture; estimated from frame 0 where not given.
        tracks: where the vertices go, where that is known.
        preset: how much work to do.
        seed: of the surface points that are matched.
        report: called at least once per frame with "fit"; may raise `Cancelled`.
        masks: [V, F, H, W] bool, where the object is, for a video with neither alpha nor a plain background.

    Returns:
        The motion at the video's frames; frame 0 is the mesh as given. Its warnings say what could not be observed.

    Raises:
        InputError: a mesh without surface, a video that does not fit the cameras, has no mask or does not show the mesh, or a fit
            that needs more memory than there is.
    """
    check_mesh(mesh.vertices, mesh.faces)
    check_memory(np.shape(video), len(mesh.vertices), len(mesh.faces), preset.nodes)
    footage = read_footage(video, viewmats, Ks, masks)
    total = max(1, (footage.frames - 1) * len(preset.rounds if tracks is None else preset.track_rounds))
    report("fit", 0, total)
    if shading is None:
        shading = estimate_shading(mesh, footage.straight_views(), footage.viewmats, footage.Ks)
    _check_first_frame(mesh, footage, shading)
    report("fit", 0, total)

    first, welded = weld(mesh.vertices)
    surface = Mesh(mesh.vertices[first], welded[mesh.faces])
    nodes = build_nodes(surface, preset.nodes)
    report("fit", 0, total)
    stiffness = preset.stiffness
    if tracks is not None:
        stiffness = preset.exact_stiffness if tracks.exact else preset.track_stiffness
    registration = Registration(mesh, welded, nodes, footage, shading, preset.points, stiffness, preset.steps, seed)
    places = None if tracks is None else _sample_tracks(registration, tracks, footage.frames, len(mesh.vertices))

    # The two starts run side by side; threads inside of OpenCV and BLAS would only fight with them: on small systems
    # OpenBLAS's spinning threads made this function five times as expensive.
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1, "blas"):
            rounds = preset.rounds if tracks is None else preset.track_rounds
            return _follow(registration, rounds, places, tracks is not None and not tracks.exact, total, report)
    finally:
        cv2.setNumThreads(threads)


def _follow(registration: Registration, rounds: tuple[float, ...], places: list[Places] | None, torn: bool, total: int,
            report: Report) -> MotionField:
    """Fits one frame after the other, each from the extrapolated motion; `torn` places must not tear the surface."""
    footage, mesh = registration.footage, registration.mesh
    present = ~footage.lost.all(0)  # [F]
    pose = before = Pose.at_rest(registration.nodes)
    look = registration.look(pose)
    poses, costs = [pose], [registration.cost(look, 0)]
    views = np.zeros((footage.frames, len(mesh.vertices)), np.int64)
    views[0] = registration.evidence(pose, look, 0)
    done = 0
    with ThreadPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for frame in range(1, footage.frames):
            tracked = None if places is None else places[frame]
            if tracked is None and not present[frame]:
                poses.append(pose)
                costs.append(np.inf)
                done += len(rounds)
                report("fit", done, total)
                continue
            guess = pose.extrapolated(before)
            anchor = registration.points(guess) if footage.views == 1 and tracked is None else None
            if tracked is not None:
                starts = [registration.follow_places(guess, tracked)]
            else:
                starts = [registration.follow_flow(guess, frame, look, anchor, pool.map), guess]
            for rigidity in rounds:
                if len(starts) > 1 and rigidity <= COARSE:
                    starts = [_better(registration, starts, frame, pool)[1]]
                # Side by side are the starts, and where one is left its views.
                each = map if len(starts) > 1 else pool.map
                starts = list((pool.map if len(starts) > 1 else map)(
                    lambda start: registration.refine(start, frame, rigidity, tracked, anchor, each), starts))  # noqa: B023
                done += 1
                report("fit", done, total, _preview(look))
            if tracked is not None and torn:
                starts = [registration.held_together(start, tracked) for start in starts]
            before, (cost, pose, look) = pose, _better(registration, starts, frame, pool)
            poses.append(pose)
            costs.append(cost)
            views[frame] = registration.evidence(pose, look, frame)
            if tracked is None and anchor is None and _recall(registration, poses, costs, views, rounds, pool):
                before = pose = poses[frame]  # what was lost before says nothing of where the motion goes
                look = registration.look(pose)
    if places is None:
        poses = registration.steadied(poses)
        still = registration.still_pieces(poses)
        poses = [pose.held(still, poses[0]) for pose in poses]
    vertices = np.stack([mesh.vertices] + [registration.vertices(pose) for pose in poses[1:]])
    if places is None:
        _bridge_gaps(vertices, present)
    return MotionField(vertices, (1 - 0.5**views).astype(np.float32), warnings=_warnings(footage, views, registration.rejected))


def _better(registration: Registration, starts: list[Pose], frame: int, pool: ThreadPoolExecutor) -> tuple[float, Pose, Look]:
    """The pose that explains the video best, before it its cost, and what it looks like."""
    if len(starts) == 1:
        looks = [registration.look(starts[0], each=pool.map)]
    else:
        looks = list(pool.map(registration.look, starts))
    costs = [registration.cost(look, frame) for look in looks]
    best = int(np.argmin(costs))
    return costs[best], starts[best], looks[best]


def _recall(registration: Registration, poses: list[Pose], costs: list[float], views: np.ndarray, rounds: tuple[float, ...],
            pool: ThreadPoolExecutor) -> bool:
    """Fits the last frame again from an earlier one that looks alike, and from there the frames before it; changes the lists.

    A thin part that was lost once is carried along wrongly by every later frame. But motions come back to where they were: an
    earlier frame's pose costs no more here than it cost there plus what the pictures differ. Returns whether that helped.
    """
    frame, footage = len(poses) - 1, registration.footage
    alike = [costs[k] + footage.difference(k, frame) for k in range(frame - 1)]
    if not alike or costs[frame] < LOST * costs[0] or min(alike) > RECALL * costs[frame]:
        return False
    start, at = poses[int(np.argmin(alike))], frame
    while at > 0 and np.isfinite(costs[at]):
        targets, miss = registration.targets.get(at), registration.misses.get(at)
        for rigidity in (factor for factor in rounds if factor <= LATE_ROUNDS):
            start = registration.refine(start, at, rigidity, each=pool.map)
        cost, start, look = _better(registration, [start], at, pool)
        if cost > CLEARLY * costs[at]:
            if targets is not None and miss is not None:
                registration.targets[at], registration.misses[at] = targets, miss
            break
        poses[at], costs[at] = start, cost
        views[at] = registration.evidence(start, look, at)
        start = start if at == frame else start.extrapolated(poses[at + 1])
        at -= 1
    return at < frame


def _bridge_gaps(vertices: np.ndarray, present: np.ndarray) -> None:
    """Fills the frames [F] of `vertices` [F, N, 3] that no picture shows: half-way between their neighbours in time."""
    there = np.nonzero(present)[0]
    for frame in np.nonzero(~present)[0]:
        before, after = there[there < frame].max(), there[there > frame].min(initial=len(present))
        if after == len(present):
            vertices[frame] = vertices[before]
        else:
            share = np.float32((frame - before) / (after - before))
            vertices[frame] = (1 - share) * vertices[before] + share * vertices[after]


def _warnings(footage: Footage, views: np.ndarray, rejected: int) -> tuple[dict[str, str], ...]:
    """What the video did not show; views [F, N] is how many views see each vertex."""
    out = []
    if footage.lost.any():
        view, frame = np.argwhere(footage.lost)[0]
        out.append({"code": "lost_pictures", "message": f"{int(footage.lost.sum())} of the video's {footage.lost.size} pictures "
                    f"show nothing (the first: view {view}, frame {frame}).",
                    "action": "The other views and the frames beside carry the motion there; render those pictures again."})
    if footage.views == 1:
        unseen = float((views.max(0) == 0).mean())
        out.append({"code": "one_view", "message": "The video has one view: motion towards the camera and away from it was "
                    f"hardly observed, and {unseen:.0%} of the vertices never were; they follow their neighbours.",
                    "action": "Give a second view from the side for motion in depth."})
    if rejected:
        out.append({"code": "unstable_motion", "message": f"{rejected} steps of the fit would have thrown the surface about and "
                    "were damped or left out.", "action": "Look at the result; more views or a steadier video help."})
    return tuple(out)


def check_memory(video: tuple[int, ...], vertices: int, triangles: int, nodes: int) -> None:
    """Raises:
        InputError: the fit of this video [V, F, H, W, C] and mesh would not fit into the memory that is free.
    """
    if len(video) != 5:
        return  # `read_footage` says what is wrong
    views, frames = video[:2]
    size = min(max(video[2:4]), WORKING_SIZE)
    pictures = views * size**2 * (5 * frames + STARTS * PIXEL_BYTES)
    surface = vertices * (frames * (3 * 4 + 8 + 4 + 3 * 4) + VERTEX_BYTES) + triangles * TRIANGLE_BYTES
    proxy = min(vertices, 4 * LARGEST_SURFACE) * nodes * 3 * 4
    needed, free = pictures + surface + proxy, psutil.virtual_memory().available
    if needed > free:
        raise InputError("too_little_memory", f"The fit of {vertices} vertices, {views} views and {frames} frames needs about "
                         f"{needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
                         "Close other programs, decimate the mesh, or give fewer frames or views.")


def _preview(look: Look) -> np.ndarray:
    return (look.colors[0] * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _sample_tracks(registration: Registration, tracks: Tracks3D, frames: int, count: int) -> list[Places]:
    """The tracks at the surface points, frame by frame.

    Raises:
        InputError: the tracks don't have the video's frames or the mesh's vertices.
    """
    positions, confidence = np.asarray(tracks.positions, np.float64), np.asarray(tracks.confidence, np.float64)
    if positions.shape != (frames, count, 3) or confidence.shape not in ((count,), (frames, count)):
        raise InputError("bad_tracks", f"The tracks are {list(positions.shape)} with confidence {list(confidence.shape)}, "
                         f"the video has {frames} frames and the mesh {count} vertices.",
                         "Give positions [frames, vertices, 3] and confidence [vertices] or [frames, vertices].")
    confidence = np.broadcast_to(confidence, (frames, count))
    corners = positions[:, registration.corners]  # [F, P, 3, 3]
    known = np.isfinite(corners).all((2, 3))
    weights = np.where(known, confidence[:, registration.corners].min(2).clip(0, 1), 0)
    points = np.einsum("pk,fpkx->fpx", registration.barycentric, np.nan_to_num(corners))
    return [Places(*one) for one in zip(points, weights)]


def _check_first_frame(mesh: Mesh, footage: Footage, shading: np.ndarray) -> None:
    """Raises:
        InputError: frame 0 of the video does not show the mesh.
    """
    rgba = zbuffer.render(mesh, mesh.vertices[None], footage.viewmats, footage.Ks, footage.size, 2, shading)[0]
    drawn = rgba[..., 3] > 0.5
    masks = footage.masks[:, 0]
    if not drawn.any():
        raise InputError("video_mismatch", "None of the video's cameras sees the mesh.",
                         "Give the cameras that the video was made with, in the mesh's space.")
    for v in range(footage.views):
        if drawn[v].any() and not masks[v].any():
            raise InputError("empty_view", f"View {v} of the video shows nothing in frame 0.",
                             "Render that view again, or leave it and its camera out.")
    overlap = (drawn & masks).sum() / max((drawn | masks).sum(), 1)
    both = drawn & masks
    colors = zbuffer.over(rgba, 0.0)[both] * 255 - footage.colors[:, 0][both]
    psnr = 10 * np.log10(255**2 / max(float((colors**2).mean()), 1e-3)) if both.any() else 0.0
    if overlap < LEAST_OVERLAP or psnr < LEAST_PSNR:
        raise InputError("video_mismatch", f"Frame 0 of the video does not show this mesh: the silhouettes overlap by "
                         f"{overlap:.0%} and the colours agree to {psnr:.1f} dB (at least {LEAST_OVERLAP:.0%} and "
                         f"{LEAST_PSNR:.0f} dB are needed).",
                         "Use the video that was made from this mesh with these cameras, and give the mesh its pose of frame 0.")
