"""The motion field corrects a registered motion, all frames at once.

The registration is right to about a pixel. A hex-plane field adds a correction: each surface point shall have in every view and
frame the colour that it was rendered with there, the surface staying as rigid as it can. The mesh is rendered anew a few times,
so points carry colours as pictures show them. A part of the pictures is held out, and only a correction that makes these look
better is kept.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from track4d_protocol.space import BACKGROUND

from ..geometry import zbuffer
from ..geometry.mesh import Mesh, weld
from ..progress import Report, silent
from .checkpoint import Run
from .field import BLOCK, HybridField, MotionField
from .footage import Footage
from .hexplane import PAPER_PLANES, HexPlaneSize
from .hybrid_features import WIDTH, hybrid_features, reduced_planes, visible_by_rays
from .losses import (
    edges_within,
    isometry_loss,
    place_loss,
    project,
    rigidity_loss,
    ring_neighbours,
    smoothness_loss,
)
from .register import sample_surface

COLOR_SCALE = 0.05  # sRGB difference beyond which a point's colour counts as an outlier
HIDDEN = 0.03  # a point this far behind the surface is hidden, canonical units
HELD_OUT = 4  # one picture of this many is held out
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the correction that are tried on the held-out pictures
LEAST_GAIN = 0.005  # by which the held-out pictures must get better, a share of their difference
MORE_STRETCH = 0.05  # by which the 99th percentile of the edges' change may grow
RING = 6  # neighbours per vertex for the rigidity
FLAT = 0.002  # a window's loss must fall by this share, or the optimisation is over
MARGIN = 2  # pixels around the object that are left as they are: its soft edge
MOST_FRAMES = 15  # that take part in one step
MOVES = 1e-5  # canonical units: what the registration has moved less was held still, because nothing says that it moves


@dataclass(frozen=True)
class RefinePreset:
    """How much work the correction of a registered motion does.

    Attributes:
        rounds: how often the mesh is rendered anew; 0 = no correction.
        steps: Adam steps per round.
        points: surface points whose colours are compared.
        compared: of these per step.
        rigid_samples: vertices per step whose surroundings shall stay rigid.
        rigidity: weight of rigidity against the still object, next to the colours' loss, which lies in 0..1.
        steadiness: of rigidity against the registered pose of the same frame, which may be stretched.
        smoothness, tracks, pinned: weights of the other losses.
        planes: the hex-planes.
        plane_rate, head_rate: learning rates.
        distil: steps that first teach the field the registered motion; 0 = it starts still and learns the correction alone.
    """

    rounds: int = 3
    steps: int = 50
    points: int = 3000
    compared: int = 1000
    rigid_samples: int = 128
    rigidity: float = 1.0
    steadiness: float = 2.0
    smoothness: float = 0.0
    tracks: float = 10.0
    pinned: float = 10.0
    planes: HexPlaneSize = PAPER_PLANES
    plane_rate: float = 0.01
    head_rate: float = 1e-3
    distil: int = 0


@dataclass(frozen=True)
class Places:
    """Where points go, with weights in 0..1: positions [F, N, 3] canonical, weights [N] or [F, N]."""

    positions: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Refined:
    """A corrected motion.

    Attributes:
        field: the motion; the registered one itself where no correction stood the test.
        network: the correction, continuous in time.
        share: of the correction that was taken, 0..1.
        before, after: how the held-out pictures differ from the video, for the registered motion and for this one.
        steps: that were done.
    """

    field: MotionField
    network: HybridField
    share: float
    before: float
    after: float
    steps: int


def refine_motion(mesh: Mesh, field: MotionField, footage: Footage, shading: np.ndarray, preset: RefinePreset,
                  features: Tensor | None = None, tracks: Places | None = None, pinned: np.ndarray | None = None, seed: int = 0,
                  checkpoint: Path | None = None, every: int = 50, report: Report = silent) -> Refined:
    """Corrects a registered motion by a field that sees all frames at once.

    Args:
        mesh: canonical, textured; field: its registered motion.
        footage: the video that it was registered to.
        shading: [N, 3] factor on the texture.
        preset: how much work to do.
        features: [V, F, C, h, w] of the video model, which join the hex-planes' (Eq. 6 of Track4DGen).
        tracks: where vertices go, where that is known.
        pinned: [N] bool, vertices of regions that must not change their shape.
        seed: of the start and of the random choices.
        checkpoint: file that the state goes to every `every` steps, and comes from if it exists.
        report: called at every step with "refine"; may raise `Cancelled`.

    Raises:
        InputError: features that don't fit the video, a checkpoint of other work.
    """
    generator = torch.Generator().manual_seed(seed)
    network = HybridField(preset.planes, 0 if features is None else WIDTH, periodic=field.loops, generator=generator)
    total = preset.rounds * preset.steps
    if footage.frames < 2 or total == 0:
        return Refined(field, network, 0.0, 0.0, 0.0, 0)
    scene = _Scene(mesh, field, footage, shading, preset, seed)
    if not scene.moves.any():
        return Refined(field, network, 0.0, 0.0, 0.0, 0)
    if features is not None:
        scene.read_features(features)
    if preset.distil:
        distil(network, scene.rest, scene.places, scene.times, preset, generator, scene.diffusion)
        scene.origin = copy.deepcopy(network)
    goal = None if tracks is None else scene.goal(tracks)
    pins = None if pinned is None else edges_within(scene.edges, torch.from_numpy(np.asarray(pinned, bool)[scene.first]))
    signature = f"refinement of {len(mesh.vertices)} vertices, {footage.views} x {footage.frames} pictures, {preset}, seed {seed}"
    run = Run(network, _adam(network, preset), generator, signature)
    if checkpoint is not None:
        run.resume(checkpoint)
    while run.step < total:
        report("refine", run.step, total)
        if run.step % preset.steps == 0:
            if run.step and run.is_flat(preset.steps, FLAT):
                break
            run.kept = scene.look(network)
        run.advance(scene.loss(network, run, goal, pins))
        if checkpoint is not None and run.step % every == 0:
            run.save(checkpoint)
    vertices, share, before, after = scene.tested(network)
    report("refine", total, total)
    return Refined(replace(field, vertices=vertices), network, share, before, after, run.step)


def object_pictures(footage: Footage) -> np.ndarray:
    """The video with plain grey around the object, whatever was there; [V, F, S, S, 3] float32 sRGB."""
    pictures = footage.colors.astype(np.float32) / 255
    margin = np.ones((2 * MARGIN + 1, 2 * MARGIN + 1), np.uint8)
    for view, masks in zip(pictures, footage.masks.astype(np.uint8)):
        for picture, mask in zip(view, masks):
            picture[cv2.dilate(mask, margin) == 0] = BACKGROUND
    return pictures


def distil(network: HybridField, rest: Tensor, places: Tensor, times: Tensor, preset: RefinePreset, generator: torch.Generator,
           diffusion: Tensor | None = None) -> float:
    """Teaches a field a motion by regression; returns the root mean squared error at the end, in canonical units.

    Args:
        rest: [P, 3] points in the still object; places: [F, P, 3] where they are at the times [F].
        preset: gives steps and rates; diffusion: [F, P, D] features of the points.
    """
    optimiser = _adam(network, preset)
    loss = places.new_zeros(())
    for _ in range(preset.distil):
        chosen = torch.randint(len(rest), (min(len(rest), 1024),), generator=generator)
        moved = network.move(rest[chosen], times, None if diffusion is None else diffusion[:, chosen])
        loss = (moved - places[:, chosen]).square().sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach().sqrt())


def _adam(network: HybridField, preset: RefinePreset) -> torch.optim.Optimizer:
    heads = [parameter for name, parameter in network.named_parameters() if not name.startswith("planes")]
    return torch.optim.Adam([{"params": network.planes.parameters(), "lr": preset.plane_rate},
                             {"params": heads, "lr": preset.head_rate}], eps=1e-15)


class _Scene:
    """What the refinement compares: welded vertices [M], points on their triangles [P], and the pictures."""

    def __init__(self, mesh: Mesh, field: MotionField, footage: Footage, shading: np.ndarray, preset: RefinePreset,
                 seed: int) -> None:
        self.mesh, self.field, self.footage, self.shading, self.preset = mesh, field, footage, shading, preset
        self.first, self.welded = weld(mesh.vertices)
        triangle, barycentric = sample_surface(mesh.vertices, mesh.faces, preset.points, seed)
        shuffled = np.random.default_rng(seed).permutation(preset.points)
        self.corners = torch.from_numpy(self.welded[mesh.faces[triangle[shuffled]]]).long()  # [P, 3]
        self.barycentric = torch.from_numpy(barycentric[shuffled]).float()  # [P, 3]
        edges = torch.from_numpy(Mesh(mesh.vertices[self.first], self.welded[mesh.faces]).edges())
        self.edges = edges[edges[:, 0] != edges[:, 1]]
        self.neighbours = ring_neighbours(self.edges, len(self.first), RING)  # [M, K]
        self.rest = torch.from_numpy(mesh.vertices[self.first])  # [M, 3]
        self.places = torch.from_numpy(field.vertices[:, self.first])  # [F, M, 3]
        self.moves = ((self.places - self.rest).abs().amax((0, 2)) > MOVES)[:, None]  # [M, 1]
        self.times = torch.from_numpy(field.times).float()  # [F]
        self.viewmats = torch.from_numpy(footage.viewmats).float()
        self.Ks = torch.from_numpy(footage.Ks).float()
        self.pictures = object_pictures(footage)  # [V, F, S, S, 3]
        self.video = torch.from_numpy(np.ascontiguousarray(self.pictures.transpose(1, 0, 4, 2, 3)))  # [F, V, 3, S, S]
        view, frame = np.ogrid[:footage.views, :footage.frames]
        self.held_out = ((view + frame) % HELD_OUT == 0) & (frame > 0) & ~footage.lost  # [V, F]
        self.diffusion: Tensor | None = None  # [F, M, D]
        self.origin: HybridField | None = None  # the field at the start, where it has been taught the registered motion

    def points(self, vertices: Tensor, corners: Tensor, chosen: slice = slice(None)) -> Tensor:
        """Points whose corners are rows of vertices [F, ..., 3]; [F, P', 3]."""
        return (vertices[:, corners] * self.barycentric[chosen, :, None]).sum(2)

    def goal(self, tracks: Places) -> tuple[Tensor, Tensor]:
        """Tracked positions [F, M, 3] of the welded vertices and their weights [F, M]."""
        positions = np.asarray(tracks.positions, np.float32)[:, self.first]
        weights = np.broadcast_to(np.asarray(tracks.weights, np.float32), tracks.positions.shape[:2])[:, self.first]
        known = np.isfinite(positions).all(-1)
        return torch.from_numpy(np.nan_to_num(positions)), torch.from_numpy(np.where(known, weights, 0).astype(np.float32))

    def read_features(self, features: Tensor) -> None:
        """Hybrid features of all vertices, read where the registration has them."""
        footage = self.footage
        seen = visible_by_rays(self.field.vertices, self.mesh.faces, self.places.numpy(), footage.viewmats)  # [F, V, M]
        self.diffusion = hybrid_features(reduced_planes(features), self.places, torch.from_numpy(seen), self.viewmats, self.Ks,
                                         footage.size)

    def _visible(self, vertices: np.ndarray, points: Tensor) -> Tensor:
        """Which points [F, P, 3] are visible when the mesh has these vertices [F, N, 3]; [F, V, P] bool."""
        footage = self.footage
        depth = zbuffer.rasterise(vertices, self.mesh.faces, footage.viewmats, footage.Ks, footage.size).inverse_depth
        return torch.from_numpy(zbuffer.visible(points.numpy(), depth, footage.viewmats, footage.Ks, HIDDEN))

    def correction(self, network: HybridField, sites: Tensor, frames: slice) -> Tensor:
        """What the field adds to the registered places of some vertices [S], nothing where they are still; [F', S, 3]."""
        rest, times = self.rest[sites], self.times[frames]
        diffusion = None if self.diffusion is None else self.diffusion[frames][:, sites]
        start = rest if self.origin is None else self.origin.move(rest, times, diffusion).detach()
        return (network.move(rest, times, diffusion) - start) * self.moves[sites]

    def corrections(self, network: HybridField) -> Tensor:
        """The same for all vertices and frames, without a gradient; frame 0 stays as it is. [F, M, 3]."""
        out = torch.zeros_like(self.places)
        with torch.no_grad():
            for some in torch.arange(len(self.rest)).split(BLOCK):
                out[1:, some] = self.correction(network, some, slice(1, None))
        return out

    def look(self, network: HybridField) -> dict[str, Tensor]:
        """Renders the present motion.

        Returns:
            "colors" [F, V, P, 3] of the points in these renders; "seen" [F, V, P], which can be compared with the video.
        """
        footage = self.footage
        posed = self.places + self.corrections(network)  # [F, M, 3]
        points = self.points(posed, self.corners)  # [F, P, 3]
        uv = project(points, self.viewmats, self.Ks)[0]  # [F, V, P, 2]
        colors, seen = torch.zeros(*uv.shape[:3], 3), torch.zeros(uv.shape[:3], dtype=torch.bool)
        for f in range(1, footage.frames):
            vertices = posed[f:f + 1, self.welded].numpy()
            rgba = zbuffer.render(self.mesh, vertices, footage.viewmats, footage.Ks, footage.size, 2, self.shading)[0]
            colors[f] = self._sample(torch.from_numpy(zbuffer.over(rgba, BACKGROUND)).permute(0, 3, 1, 2), uv[f])
            inside = self._sample(torch.from_numpy(footage.masks[:, f, None].astype(np.float32)), uv[f])[..., 0] > 0.9  # [V, P]
            seen[f] = self._visible(vertices, points[f:f + 1])[0] & inside & ~torch.from_numpy(self.held_out[:, f, None])
        return {"colors": colors, "seen": seen}

    def _sample(self, pictures: Tensor, uv: Tensor) -> Tensor:
        """Pictures [B, C, S, S] at pixels [B, P, 2], bilinear; [B, P, C]."""
        places = (uv / self.footage.size * 2 - 1)[:, None]
        return functional.grid_sample(pictures, places, padding_mode="border", align_corners=False)[:, :, 0].transpose(1, 2)

    def loss(self, network: HybridField, run: Run, goal: tuple[Tensor, Tensor] | None, pins: Tensor | None) -> Tensor:
        """The weighted sum of all losses on a random part of frames, points and vertices."""
        preset, generator = self.preset, run.generator

        def some(count: int, size: int) -> slice:
            size = min(count, size)
            start = int(torch.randint(count - size + 1, (1,), generator=generator))
            return slice(start, start + size)

        moving = some(self.footage.frames - 1, MOST_FRAMES)
        frames = slice(1 + moving.start, 1 + moving.stop)
        chosen = some(preset.points, preset.compared)
        samples = torch.randint(len(self.first), (preset.rigid_samples,), generator=generator)
        beside = self.neighbours[samples]  # [S, K]
        sites, row = torch.unique(torch.cat([self.corners[chosen].flatten(), samples, beside.clamp(min=0).flatten()]),
                                  return_inverse=True)
        corner_rows, sample_rows, beside_rows = row.split([3 * preset.compared, len(samples), beside.numel()])
        posed = self.places[frames][:, sites] + self.correction(network, sites, frames)  # [F', sites, 3]

        points = self.points(posed, corner_rows.reshape(-1, 3), chosen)  # [F', P', 3]
        loss = self._color_loss(points, run.kept["colors"][frames, :, chosen], run.kept["seen"][frames, :, chosen], frames)
        neighbours = torch.full((len(sites), beside.shape[1]), -1)
        neighbours[sample_rows] = torch.where(beside >= 0, beside_rows.reshape(beside.shape), -1)
        for weight, before in ((preset.rigidity, self.rest[sites]), (preset.steadiness, self.places[frames][:, sites])):
            if weight:
                loss = loss + weight * rigidity_loss(before, posed, neighbours, sample_rows)
        if preset.smoothness:
            loss = loss + preset.smoothness * smoothness_loss(posed)
        if goal is not None:
            loss = loss + preset.tracks * place_loss(posed, goal[0][frames][:, sites], goal[1][frames][:, sites])
        if pins is not None and len(pins):
            ends = pins[torch.randint(len(pins), (preset.rigid_samples,), generator=generator)].flatten()  # [2 S]
            held = self.places[frames][:, ends] + self.correction(network, ends, frames)
            loss = loss + preset.pinned * isometry_loss(self.rest[ends], held, torch.arange(len(ends)).reshape(-1, 2))
        return loss

    def _color_loss(self, points: Tensor, colors: Tensor, seen: Tensor, frames: slice) -> Tensor:
        """How much points [F', P', 3] have other colours in the video than [F', V, P', 3]; 0..1, outliers count little."""
        uv = project(points, self.viewmats, self.Ks)[0]  # [F', V, P', 2]
        found = self._sample(self.video[frames].flatten(0, 1), uv.flatten(0, 1))  # [F' V, P', 3]
        squared = (found - colors.flatten(0, 1)).square().sum(-1)  # [F' V, P']
        seen = seen.flatten(0, 1)
        return (squared / (squared + COLOR_SCALE**2) * seen).sum() / seen.sum().clamp(min=1)

    def tested(self, network: HybridField) -> tuple[np.ndarray, float, float, float]:
        """The registered motion with as much of the correction as the held-out pictures want.

        Returns:
            vertices [F, N, 3], the share of the correction, and the pictures' difference without and with it.
        """
        corrections = self.corrections(network).numpy()[:, self.welded]
        before, stretch = self._difference(self.field.vertices), self._stretch(self.field.vertices)
        best = (self.field.vertices, 0.0, before)
        for share in SHARES:
            vertices = self.field.vertices + np.float32(share) * corrections
            if not np.isfinite(vertices).all() or self._stretch(vertices) > stretch + MORE_STRETCH:
                continue
            difference = self._difference(vertices)
            if difference < min(best[2], (1 - LEAST_GAIN) * before):
                best = (vertices, share, difference)
        return best[0], best[1], before, best[2]

    def _difference(self, vertices: np.ndarray) -> float:
        """How much renders differ from the held-out pictures: colour plus half the silhouette, per pixel of the object."""
        footage, off, area = self.footage, 0.0, 0.0
        for f in range(1, footage.frames):
            v = np.nonzero(self.held_out[:, f])[0]
            if len(v) == 0:
                continue
            cameras = footage.viewmats[v], footage.Ks[v], footage.size
            rgba = zbuffer.render(self.mesh, vertices[f:f + 1], *cameras, 2, self.shading)[0]
            mask = footage.masks[v, f]
            off += float(np.abs(zbuffer.over(rgba, BACKGROUND) - self.pictures[v, f]).mean(-1).sum())
            off += 0.5 * float(np.abs(rgba[..., 3] - mask).sum())
            area += float(mask.sum())
        return off / max(area, 1.0)

    def _stretch(self, vertices: np.ndarray) -> float:
        """99th percentile over edges and frames of how much longer or shorter an edge became, as a ratio."""
        surface = vertices[:, self.first]
        ends = self.edges.numpy()
        lengths = np.linalg.norm(surface[:, ends[:, 0]] - surface[:, ends[:, 1]], axis=-1)  # [F, E]
        real = lengths[0] > 1e-4
        ratio = np.maximum(lengths[1:, real], 1e-9) / lengths[0, real]
        return float(np.quantile(np.maximum(ratio, 1 / ratio), 0.99)) if ratio.size else 1.0
