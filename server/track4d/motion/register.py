"""Sequential Gauss-Newton registration of a mesh to a multi-view video.

Frame by frame: render the present estimate, match the render with the video by optical flow, pull the silhouette and what flow
lost to pixels of the same colour, and move the control nodes so that the surface follows while staying as rigid as possible. The
stiffness and the tolerance for outliers fall from round to round, the resolution grows. Rigidity is robust: an edge that the
video stretches far gives way (a bar grows, a joint bends) instead of holding everything back. Every tolerance is in pixels of a
256-pixel picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import scipy.sparse as sp
from scipy.ndimage import distance_transform_edt
from scipy.sparse.csgraph import reverse_cuthill_mckee
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from track4d_protocol.space import BACKGROUND

from ..geometry import zbuffer
from ..geometry.mesh import Mesh
from ..tracking.flow import bilinear, match_points, to_grey
from .equations import add_edges, add_pixels, add_places, add_points, place_points, solve_band
from .footage import Footage
from .nodes import ControlNodes

FLOW_SCALE = 4.0  # pixels: the final Geman-McClure scale of matches
NO_OUTLIERS = 1e6  # pixels: a scale at which every target counts fully
COVER_SCALE = 12.0  # pixels: of pulls onto mask pixels that nothing covers
COVER_REACH = 25.0  # pixels
SILHOUETTE_WEIGHT = 0.5
BORDER = 4.0  # pixels at the picture's edge where the silhouette says nothing: the object may go on outside
FLOW_TOLERANCE = 1.0  # pixels, forward-backward
WARM_UP = ((30.0, 12.0), (10.0, 6.0), (3.0, 3.0))  # stiffness and outlier scale when tracks or flow give a start
EXTRAPOLATION = 0.7  # share of the last motion that is expected to go on
LARGEST_STRETCH = 1.5  # of the edges, 99th percentile, where tracks carry the fit
STIFFER = (2.0, 4.0, 8.0, 16.0, 32.0)  # stiffness factors tried to get there
COARSE = 1.5  # rounds that are stiffer than this look at fewer pixels and match colours
COLOR_REACH = 40.0  # pixels: how far the pulls of the coarse rounds reach in place and colour
COLOR_PIXELS = 120.0  # pixels that the difference between black and white counts as there
UNLIKE = 50  # difference (0..255) to the video beyond which a pixel is not explained
STRAIN = 0.5  # of an edge between nodes, relative to its length: where its stiffness has fallen to a quarter
LEAST_STIFFNESS = 0.02  # share that stays at any strain
LARGEST_SHIFT = 1.0  # canonical units per step: further, the step is rejected
DAMPING = (1e-3, 1e-1, 10.0)  # tried in this order until a step is sane
CLEAN_MISS = 0.3  # pixels that the matches of a clean video lie off
MOST_CAUTION = 5.0
STEADY_SWEEPS = 4  # over the frames of a noisy video
STEADINESS = 0.33  # weight of squared accelerations relative to matches that lie a pixel off
STEADY_STIFFNESS = 20.0  # stiffness factor where matches lie a pixel off
EVIDENCE = 1.05  # a piece moves if that explains the pixels that it changes so many times better than rest
SLIGHT = 2.0  # pixels that a bridge may move and still be at rest
DEPTH_HOLD = 0.02  # weight of the depth at which a single camera saw a point before, relative to a match
LARGEST_TURN = 1.0  # radians per step
HIDDEN = 0.03  # a point this far behind the surface is hidden, canonical units
PIXELS_PER_UNIT = 117.0  # of a 256-pixel picture at the orbit cameras' distance: brings places in space to pixels


@dataclass(frozen=True)
class Pose:
    """Where the nodes are: rotations [K, 3, 3] and positions [K, 3], float64."""

    rotations: np.ndarray
    positions: np.ndarray

    @classmethod
    def at_rest(cls, nodes: ControlNodes) -> Pose:
        return cls(np.tile(np.eye(3), (len(nodes.rest), 1, 1)), nodes.rest.copy())

    def extrapolated(self, before: Pose) -> Pose:
        """The pose after this one if part of the motion since `before` goes on."""
        turn = Rotation.from_matrix(self.rotations @ before.rotations.transpose(0, 2, 1)).as_rotvec() * EXTRAPOLATION
        return Pose(Rotation.from_rotvec(turn).as_matrix() @ self.rotations,
                    self.positions + EXTRAPOLATION * (self.positions - before.positions))

    def held(self, still: np.ndarray, rest: Pose) -> Pose:
        """The pose with the nodes of `still` [K] bool at rest."""
        return Pose(np.where(still[:, None, None], rest.rotations, self.rotations),
                    np.where(still[:, None], rest.positions, self.positions))


@dataclass(frozen=True)
class Look:
    """What the cameras see of a pose.

    Attributes:
        colors: [V, S, S, 3] float32 sRGB on grey; alpha: [V, S, S].
        inverse_depth: [V, S, S].
        uv: [V, P, 2] float32 pixel positions of the surface points; visible: [V, P] bool.
    """

    colors: np.ndarray
    alpha: np.ndarray
    inverse_depth: np.ndarray
    uv: np.ndarray
    visible: np.ndarray


@dataclass
class Targets:
    """Pixel positions [V, P, 2] that points should have, weights [V, P], and the Geman-McClure scale in pixels at 256."""

    uv: np.ndarray
    weights: np.ndarray
    scale: float

    @classmethod
    def none(cls, uv: np.ndarray, scale: float) -> Targets:
        return cls(uv.copy(), np.zeros(uv.shape[:2], np.float32), scale)


@dataclass(frozen=True)
class Places:
    """Positions in space [P, 3] that the surface points should have in a frame, with weights [P]."""

    positions: np.ndarray
    weights: np.ndarray


def sample_surface(vertices: np.ndarray, faces: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Area-weighted, stratified points on a surface: triangle [P] and barycentric coordinates [P, 3]."""
    generator = np.random.default_rng(seed)
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    share = np.cumsum(area) / area.sum()
    triangle = np.searchsorted(share, (np.arange(count) + generator.random(count)) / count).clip(0, len(faces) - 1)
    uv = generator.random((count, 2))
    uv = np.where(uv.sum(1, keepdims=True) > 1, 1 - uv, uv)
    return triangle, np.concatenate([1 - uv.sum(1, keepdims=True), uv], 1)


class Registration:
    """Everything that stays the same from frame to frame.

    Args:
        mesh: canonical, textured; frame 0 of the video shows it.
        welded: [N] index of the surface vertex of each mesh vertex.
        nodes: carry the surface vertices.
        footage: the video.
        shading: [N, 3] factor on the texture.
        points: how many surface points are matched.
        stiffness: weight of the as-rigid-as-possible energy in the last rounds.
        steps: Gauss-Newton steps per round.
        seed: of the surface points.
    """

    def __init__(self, mesh: Mesh, welded: np.ndarray, nodes: ControlNodes, footage: Footage, shading: np.ndarray, points: int,
                 stiffness: float, steps: int, seed: int) -> None:
        self.mesh, self.welded, self.nodes, self.footage, self.shading = mesh, welded, nodes, footage, shading
        self.stiffness, self.steps = stiffness, steps
        # Pinhole matrices in pixels at 256, in which all residuals are.
        self.Ks = zbuffer.scale_intrinsics(footage.Ks, 1 / footage.unit).astype(np.float64)
        # Flow is computed at about 512 pixels.
        self.upsampling = int(np.clip(round(512 / footage.size), 2, 4))

        triangle, barycentric = sample_surface(mesh.vertices, mesh.faces, points, seed)
        self.corners, self.barycentric = mesh.faces[triangle], barycentric  # [P, 3] each
        rows = np.repeat(np.arange(points), 3)
        samples = sp.csr_matrix((barycentric.ravel(), (rows, welded[self.corners].ravel())),
                                shape=(points, nodes.skinning.shape[0]))
        # Points are linear in the nodes too: point i has the entries starts[i]..starts[i + 1] of members, levers and weights.
        count = len(nodes.rest)
        shares = (samples @ nodes.skinning).toarray().reshape(points, count, 4)  # [P, K, 4]
        used = np.abs(shares).sum(2) > 0
        self.starts = np.concatenate([[0], np.cumsum(used.sum(1))])
        row, self.members = np.nonzero(used)
        used_shares = shares[row, self.members].astype(np.float64)
        self.levers, self.weights = np.ascontiguousarray(used_shares[:, :3]), np.ascontiguousarray(used_shares[:, 3])

        # Numbering the nodes along the surface keeps the matrix of the normal equations banded.
        incidence = sp.csr_matrix((np.ones(len(row)), (row, self.members)), shape=(points, count))
        tails, heads = nodes.edges.T
        coupled = (incidence.T @ incidence + sp.csr_matrix((np.ones(len(tails)), (tails, heads)), shape=(count, count))).tocsr()
        self.slot = np.empty(count, np.int64)
        self.slot[reverse_cuthill_mckee(coupled, symmetric_mode=True)] = np.arange(count)
        linked = coupled.tocoo()
        self.band_width = 6 * (int(np.abs(self.slot[linked.row] - self.slot[linked.col]).max()) + 1)

        edges = np.unique(np.sort(welded[mesh.edges()], 1), axis=0)
        rest = self.nodes.pose(Pose.at_rest(nodes).rotations, nodes.rest)
        self.edges = edges[np.linalg.norm(rest[edges[:, 0]] - rest[edges[:, 1]], axis=1) > 1e-4]
        self.rest_lengths = self._edge_lengths(rest)
        uvs = np.einsum("pk,pkx->px", barycentric, mesh.uvs[triangle]).astype(np.float32)
        light = np.einsum("pk,pkc->pc", barycentric, shading.reshape(len(shading), -1)[self.corners])  # [P, 1 or 3]
        self.colors = (mesh.corner_colors(uvs, triangle) * light).clip(0, 1)  # [P, 3]
        # Of each frame's last round: the targets, and how many pixels the matches lay off, which is the video's noise.
        self.targets: dict[int, list[Targets]] = {}
        self.misses: dict[int, float] = {}
        self.rejected = 0  # steps that would have thrown nodes about
        self._pixels_by_color = lru_cache(maxsize=2 * footage.views)(self._index_colors)
        self._nearest_inside = lru_cache(maxsize=2 * footage.views)(self._measure_masks)

    # ---- poses

    def points(self, pose: Pose) -> np.ndarray:
        """Positions of the surface points; [P, 3] float64."""
        return self._arms_and_points(pose)[1]

    def _arms_and_points(self, pose: Pose) -> tuple[np.ndarray, np.ndarray]:
        return place_points(self.starts, self.members, self.levers, self.weights, pose.rotations, pose.positions)

    def vertices(self, pose: Pose) -> np.ndarray:
        """Positions of the mesh's vertices; [N, 3] float32."""
        return self.nodes.pose(pose.rotations, pose.positions)[self.welded]

    # ---- pictures

    def look(self, pose: Pose, samples: int = 2, each: Callable = map) -> Look:
        """Renders a pose with `samples` subpixels along each axis of a pixel; `each` maps over the views."""
        footage, vertices = self.footage, self.vertices(pose)[None]
        points = self.points(pose)[None].astype(np.float32)

        def view(v: int) -> tuple[np.ndarray, ...]:
            camera = footage.viewmats[v:v + 1], footage.Ks[v:v + 1]
            rgba, inverse_depth = zbuffer.render_with_depth(self.mesh, vertices, *camera, footage.size, samples, self.shading)
            visible = zbuffer.visible(points, inverse_depth[0], *camera, HIDDEN)
            return zbuffer.over(rgba[0, 0], BACKGROUND), rgba[0, 0, ..., 3], inverse_depth[0, 0], visible[0, 0]

        colors, alpha, inverse_depth, visible = (np.stack(k) for k in zip(*each(view, range(footage.views)), strict=True))
        uv, _ = zbuffer.project(points, footage.viewmats, footage.Ks)
        return Look(colors, alpha, inverse_depth, uv[0], visible)

    def cost(self, look: Look, frame: int) -> float:
        """How much a render differs from the pictures that are there: colour plus half the silhouette, per object pixel."""
        there = ~self.footage.lost[:, frame]
        masks = self.footage.masks[there, frame]
        colors = np.abs(look.colors[there] * 255 - self.footage.colors[there, frame]).sum() / (3 * 255)
        silhouettes = np.abs(look.alpha[there] - masks).sum()
        return float(colors + 0.5 * silhouettes) / max(int(masks.sum()), 1)

    def evidence(self, pose: Pose, look: Look, frame: int) -> np.ndarray:
        """How many views see each vertex where the video has the object; [N] int."""
        vertices, footage = self.vertices(pose)[None], self.footage
        visible = zbuffer.visible(vertices, look.inverse_depth, footage.viewmats, footage.Ks, HIDDEN)[0]  # [V, N]
        uv, _ = zbuffer.project(vertices, footage.viewmats, footage.Ks)
        pixel = np.floor(uv[0]).astype(np.int64).clip(0, footage.size - 1)
        on_object = footage.masks[np.arange(footage.views)[:, None], frame, pixel[..., 1], pixel[..., 0]]
        return (visible & on_object).sum(0)

    def still_pieces(self, poses: list[Pose]) -> np.ndarray:
        """Which nodes are on pieces that the video gives no evidence of moving; [K] bool.

        A piece stays where it is at rest if that explains the video about as well as its fitted motion, in the frames in which it
        moved most: a wheel without marks looks the same at any angle, and what flow makes of it is noise. The larger pieces are
        asked first, and what hangs on a moving piece goes with it.
        """
        nodes, rest = self.nodes, Pose.at_rest(self.nodes)
        away = np.stack([np.linalg.norm(pose.positions - nodes.rest, axis=1) for pose in poses])  # [F, K]
        still = np.zeros(len(nodes.rest), bool)
        tails, heads = nodes.edges.T
        for piece in np.argsort(-np.bincount(nodes.piece), kind="stable"):
            on = nodes.piece == piece
            larger = np.bincount(nodes.piece)[nodes.piece] > on.sum()
            neighbours = heads[on[tails] & larger[heads]]
            carried = (away[:, neighbours].max(initial=0) > SLIGHT / PIXELS_PER_UNIT) and not still[neighbours].all()
            if not on.any() or carried:
                continue
            fitted_error = rest_error = 0.0
            for frame in np.argsort(-away[:, on].mean(1))[:3]:
                pose = poses[frame]
                looks = [self.look(one, 1) for one in (pose, pose.held(on, rest))]
                differ = np.abs(looks[0].colors - looks[1].colors).max(-1) > 1 / 255
                differ &= ~self.footage.lost[:, frame, None, None]
                for_fit, for_rest = (np.abs(look.colors[differ] * 255 - self.footage.colors[:, frame][differ]).sum()
                                     for look in looks)
                fitted_error, rest_error = fitted_error + for_fit, rest_error + for_rest
            still[on] = rest_error <= EVIDENCE * fitted_error
        return still

    # ---- observations

    def flow_targets(self, look: Look, frame: int, outliers: float, upsampling: int, each: Callable = map) -> Targets:
        """Where optical flow from the render to the video takes the visible points; `each` maps over the views.

        The coarse rounds' tolerance for outliers spares them the check by the way back.
        """
        footage = self.footage
        targets = Targets.none(look.uv, FLOW_SCALE * outliers)
        tolerance = None if outliers > COARSE else FLOW_TOLERANCE * footage.unit

        def match(v: int) -> None:
            seen = np.nonzero(look.visible[v])[0]
            window = _window(footage.masks[v, frame] | (look.alpha[v] > 0.3), round(12 * footage.unit))
            if len(seen) == 0 or window is None or not footage.masks[v, frame].any():
                return
            render = to_grey((look.colors[v][window] * 255 + 0.5).clip(0, 255).astype(np.uint8))
            corner = np.array([window[1].start, window[0].start], np.float32)
            matched, good = match_points(render, footage.grey[v, frame][window], look.uv[v, seen] - corner, tolerance, upsampling)
            self._accept(targets, v, frame, seen, matched + corner, good)

        list(each(match, range(footage.views)))
        return targets

    def video_flow_targets(self, look: Look, frame: int, each: Callable = map) -> Targets:
        """Where the video's flow from the frame before takes the points that are visible there; `each` maps over the views."""
        footage, lost = self.footage, self.footage.lost
        targets = Targets.none(look.uv, FLOW_SCALE)

        def match(v: int) -> None:
            seen = np.nonzero(look.visible[v])[0]
            window = _window(footage.masks[v, frame - 1] | footage.masks[v, frame], round(12 * footage.unit))
            if len(seen) == 0 or window is None or lost[v, frame - 1] or lost[v, frame]:
                return
            corner = np.array([window[1].start, window[0].start], np.float32)
            matched, good = match_points(footage.grey[v, frame - 1][window], footage.grey[v, frame][window],
                                         look.uv[v, seen] - corner, 1.5 * FLOW_TOLERANCE * footage.unit, self.upsampling)
            self._accept(targets, v, frame, seen, matched + corner, good)

        list(each(match, range(footage.views)))
        return targets

    def _accept(self, targets: Targets, view: int, frame: int, points: np.ndarray, matched: np.ndarray, good: np.ndarray) -> None:
        mask = self.footage.masks[view, frame].astype(np.float32)
        targets.uv[view, points] = matched
        targets.weights[view, points] = good & (bilinear(mask, matched) > 0.5)

    def pulls(self, look: Look, frame: int, outliers: float, matched: np.ndarray) -> list[Targets]:
        """Where points should go that flow does not tell.

        Points outside of the mask go to the nearest pixel inside; pixels that nothing explains call the nearest visible point. In
        the coarse rounds "nearest" counts colour as well as place, and points that flow lost look for their colour too: a thin
        leg that swings further than its width is found by what it looks like.

        Args:
            outliers: factor on the outlier scale; above `COARSE` colours count.
            matched: [V, P] bool, points that flow has matched.
        """
        footage, unit, coarse = self.footage, self.footage.unit, outliers > COARSE
        scale, reach = COVER_SCALE * outliers, (COLOR_REACH if coarse else COVER_REACH) * unit
        inwards, cover, lost = Targets.none(look.uv, NO_OUTLIERS), Targets.none(look.uv, scale), Targets.none(look.uv, scale)
        hue = COLOR_PIXELS * unit if coarse else 0.0
        for v in range(footage.views):
            mask = footage.masks[v, frame]
            if not mask.any():
                continue
            uv, seen = look.uv[v], np.nonzero(look.visible[v])[0]
            inner = self._within(uv)
            distance, nearest = self._nearest_inside(v, frame)
            column, row = np.floor(uv).astype(np.int64).clip(0, footage.size - 1).T
            outside = inner & (distance[row, column] > 0.8 * unit)
            inwards.uv[v, outside] = nearest[::-1, row[outside], column[outside]].T + 0.5
            inwards.weights[v, outside] = SILHOUETTE_WEIGHT
            features = np.concatenate([uv, hue * self.colors], 1)  # [P, 5]
            if coarse:
                astray = np.nonzero(inner & (look.visible[v] | outside) & ~matched[v])[0]
                tree, places = self._pixels_by_color(v, frame)
                distance, pixel = tree.query(features[astray], distance_upper_bound=reach)
                astray, pixel = astray[np.isfinite(distance)], pixel[np.isfinite(distance)]
                lost.uv[v, astray] = places[pixel]
                lost.weights[v, astray] = SILHOUETTE_WEIGHT
                inwards.weights[v, astray] = 0

            row, column = np.nonzero(mask)
            unlike = look.alpha[v, row, column] < 0.3
            if coarse:
                differences = np.abs(look.colors[v, row, column] * 255 - footage.colors[v, frame, row, column])
                unlike |= (differences > UNLIKE).any(1)
            row, column = row[unlike], column[unlike]
            pixels = np.stack([column, row], 1) + 0.5
            inner = self._within(pixels)
            pixels, colors = pixels[inner], footage.colors[v, frame, row[inner], column[inner]]
            if len(pixels) <= 4 or len(seen) == 0:
                continue
            few = np.linspace(0, len(pixels) - 1, min(len(pixels), 400)).astype(int)
            wanted = np.concatenate([pixels, hue / 255 * colors], 1)[few]
            distance, caller = cKDTree(features[seen]).query(wanted, distance_upper_bound=reach)
            called = np.isfinite(distance) & (distance > unit)
            calls = np.bincount(caller[called], minlength=len(seen))
            mean = np.stack([np.bincount(caller[called], wanted[called, k], len(seen)) for k in range(2)], 1)
            some = calls > 0
            cover.uv[v, seen[some]] = mean[some] / calls[some, None]
            cover.weights[v, seen[some]] = SILHOUETTE_WEIGHT
        return [inwards, cover, lost]

    def _within(self, uv: np.ndarray) -> np.ndarray:
        """Which positions [..., 2] are not so near to the picture's edge that the object may go on outside."""
        border = BORDER * self.footage.unit
        return ((uv > border) & (uv < self.footage.size - border)).all(-1)

    def _index_colors(self, view: int, frame: int) -> tuple[cKDTree, np.ndarray]:
        """The object's pixels by place and colour, and their places [Q, 2]."""
        row, column = np.nonzero(self.footage.masks[view, frame])
        few = np.linspace(0, len(row) - 1, min(len(row), 3000)).astype(int)
        row, column = row[few], column[few]
        places = np.stack([column, row], 1) + 0.5
        hue = COLOR_PIXELS * self.footage.unit / 255 * self.footage.colors[view, frame, row, column]
        return cKDTree(np.concatenate([places, hue], 1)), places

    def _measure_masks(self, view: int, frame: int) -> tuple[np.ndarray, np.ndarray]:
        """Distance [S, S] to the mask and the mask pixel (row, column) that is nearest [2, S, S]."""
        return distance_transform_edt(~self.footage.masks[view, frame], return_indices=True)

    # ---- solving

    def solve(self, pose: Pose, targets: list[Targets], rigidity: float, places: Places | None = None,
              outliers: float = 1.0, anchor: np.ndarray | None = None, expected: tuple[np.ndarray, float] | None = None,
              steps: int | None = None) -> Pose:
        """A few Gauss-Newton steps towards targets in the pictures and places in space.

        Args:
            rigidity: factor on the stiffness.
            places: tracked places, which may tear, so rigidity is not robust with them; outliers: factor on their outlier scale.
            anchor: [P, 3] points whose depth holds back that of the surface points, where a single camera can't tell it.
            expected: [P, 3] where the frames beside let the points be, and its weight relative to a match.
            steps: how many; the preset's if None.
        """
        nodes, count, unit = self.nodes, len(self.nodes.rest), self.footage.unit
        tails, heads = nodes.edges.T
        slots, bridges = self.slot[nodes.edges], nodes.bridges
        for _ in range(steps or self.steps):
            arms, points = self._arms_and_points(pose)
            information, pull = np.zeros((len(points), 3, 3)), np.zeros((len(points), 3))
            for target in targets:
                add_pixels(points, self.footage.viewmats, self.Ks, target.uv.astype(np.float64) / unit,
                           target.weights.astype(np.float64), target.scale, information, pull)
            if places is not None:
                add_places(points, places.positions, places.weights * PIXELS_PER_UNIT**2,
                           FLOW_SCALE * outliers / PIXELS_PER_UNIT, information, pull)
            if anchor is not None:
                view = self.footage.viewmats[0]
                ray = points + view[:3, :3].T @ view[:3, 3]
                ray /= np.linalg.norm(ray, axis=1, keepdims=True)
                hold = DEPTH_HOLD * PIXELS_PER_UNIT**2 * ray
                information += hold[:, :, None] * ray[:, None]
                pull += hold * ((points - anchor) * ray).sum(1, keepdims=True)
            if expected is not None:
                information += expected[1] * PIXELS_PER_UNIT**2 * np.eye(3)
                pull += expected[1] * PIXELS_PER_UNIT**2 * (points - expected[0])
            band, gradient = np.zeros((6 * count, self.band_width)), np.zeros(6 * count)
            add_points(band, gradient, self.starts, self.slot[self.members], arms, self.weights, information, pull)
            spokes = np.einsum("eij,ej->ei", pose.rotations[tails], nodes.offsets)
            residuals = spokes - (pose.positions[heads] - pose.positions[tails])
            weights = self.stiffness * rigidity * nodes.stiffness
            if places is None:
                strain = (residuals**2).sum(1) / np.maximum((nodes.offsets**2).sum(1), 1e-12)
                weights = weights * np.where(bridges, 1, np.maximum(
                    (STRAIN**2 / (STRAIN**2 + strain)) ** 2, LEAST_STIFFNESS))
            own = ~bridges
            add_edges(band, gradient, slots[own, 0], slots[own, 1], spokes[own], residuals[own], weights[own])
            unglued = band[:, 0].copy()
            add_edges(band, gradient, slots[bridges, 0], slots[bridges, 1], spokes[bridges], residuals[bridges], weights[bridges])
            # Glued pieces keep up with tracks, as one would. After a video they move slowly: its coarse matches are often wrong.
            step = self._sane_step(band, gradient, band[:, 0] if places is None else unglued)
            if step is None:
                break
            pose = Pose(Rotation.from_rotvec(step[:, :3]).as_matrix() @ pose.rotations, pose.positions + step[:, 3:])
        return pose

    def _sane_step(self, band: np.ndarray, gradient: np.ndarray, scale: np.ndarray) -> np.ndarray | None:
        """Turns and shifts [K, 6] of the nodes; damped more as long as they throw nodes about, None if nothing helps.

        Args: `scale` [6 K] of the damping, as `solve_band` has it.
        """
        for damping in DAMPING:
            step = solve_band(band, gradient, damping, scale).reshape(-1, 6)[self.slot]
            step /= max(1.0, float(np.linalg.norm(step[:, :3], axis=1).max()) / LARGEST_TURN)
            if np.linalg.norm(step[:, 3:], axis=1).max() < LARGEST_SHIFT:  # not if any is nan
                return step
            self.rejected += 1
        return None

    def refine(self, pose: Pose, frame: int, rigidity: float, places: Places | None = None,
               anchor: np.ndarray | None = None, each: Callable = map) -> Pose:
        """One round: look, match (`each` maps over the views), solve."""
        coarse, outliers = rigidity > COARSE, float(np.clip(rigidity, 1, 8))
        look = self.look(pose, 1 if coarse else 2, each)
        flow = self.flow_targets(look, frame, outliers, 1 if coarse else self.upsampling, each)
        matched = flow.weights > 0
        if not coarse and matched.any():
            self.misses[frame] = float(np.median(np.linalg.norm(flow.uv - look.uv, axis=2)[matched])) / self.footage.unit
        targets = [flow, *self.pulls(look, frame, outliers, matched)]
        if not coarse and places is None:
            self.targets[frame] = targets
            rigidity *= self.caution(frame)
        return self.solve(pose, targets, rigidity, places, outliers, anchor)

    def caution(self, frame: int) -> float:
        """How much stiffer the surface is in a frame because the frames before missed the video: factor from 1 on."""
        misses = [miss for at, miss in self.misses.items() if at < frame]
        return float(np.clip(np.median(misses) / CLEAN_MISS, 1, MOST_CAUTION)) if misses else 1.0

    def steadied(self, poses: list[Pose]) -> list[Pose]:
        """The poses of a noisy video, fitted once more to what was matched, stiffer and with small accelerations.

        The noise that `misses` tells sets both weights: a video whose matches lie within a fraction of a pixel stays as it was
        fitted, because smoothing would only take from it. Gauss-Seidel on the sum of squared second differences.
        """
        frames = len(poses)
        noise = float(np.median(list(self.misses.values()))) if self.misses else 0.0
        if noise <= CLEAN_MISS or frames < 3:
            return poses
        second = np.diff(np.eye(frames), 2, axis=0)
        coupling = second.T @ second
        poses, points = list(poses), np.stack([self.points(pose) for pose in poses])  # [F, P, 3]
        for _ in range(STEADY_SWEEPS):
            for frame in range(1, frames):
                own, beside = coupling[frame, frame], np.where(np.arange(frames) == frame, 0, coupling[frame])
                expected = -np.tensordot(beside, points, 1) / own, STEADINESS * noise**2 * own
                poses[frame] = self.solve(poses[frame], self.targets.get(frame, []), max(1.0, STEADY_STIFFNESS * noise**2),
                                          expected=expected, steps=1)
                points[frame] = self.points(poses[frame])
        return poses

    def follow_flow(self, pose: Pose, frame: int, before: Look, anchor: np.ndarray | None = None, each: Callable = map) -> Pose:
        """Moves an extrapolated pose by the video's own flow since the look at the frame before; `each` maps over the views."""
        flow = self.video_flow_targets(before, frame, each)
        for rigidity, outliers in WARM_UP:
            pose = self.solve(pose, [replace(flow, scale=FLOW_SCALE * outliers)], rigidity, anchor=anchor)
        return pose

    def follow_places(self, pose: Pose, places: Places) -> Pose:
        """Moves an extrapolated pose to tracked places."""
        for rigidity, outliers in WARM_UP:
            pose = self.solve(pose, [], rigidity, places, outliers)
        return pose

    def held_together(self, pose: Pose, places: Places) -> Pose:
        """The pose, made stiffer until few edges of the surface are stretched: tracks may tear what no video could."""
        for rigidity in STIFFER:
            if self.stretch(pose) < LARGEST_STRETCH:
                break
            pose = self.solve(pose, [], rigidity, places)
        return pose

    def stretch(self, pose: Pose) -> float:
        """99th percentile over the edges of how many times longer or shorter they are than at rest."""
        ratio = self._edge_lengths(self.nodes.pose(pose.rotations, pose.positions)) / self.rest_lengths
        return float(np.quantile(np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)), 0.99))

    def _edge_lengths(self, surface: np.ndarray) -> np.ndarray:
        return np.linalg.norm(surface[self.edges[:, 0]] - surface[self.edges[:, 1]], axis=1)


def _window(mask: np.ndarray, margin: int) -> tuple[slice, slice] | None:
    """The rows and columns around a mask, or None where it is empty."""
    rows, columns = (np.nonzero(mask.any(axis))[0] for axis in (1, 0))
    if len(rows) == 0:
        return None
    return tuple(slice(max(0, k[0] - margin), k[-1] + margin + 1) for k in (rows, columns))  # type: ignore[return-value]
