"""Gaussians that are tied to a mesh's surface and move with it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.spatial import KDTree
from torch import Tensor

from ..geometry.mesh import Mesh, weld
from .rasterise.dense import rotation_matrices

RADIUS = 0.5  # standard deviation within the surface, in spacings: neighbours overlap without blurring the texture
RADIUS_RANGE = 0.35, 1.8  # of what the neighbours make of it, in RADIUS
NEIGHBOURS = 6
NEIGHBOUR_SPREAD = 0.75  # standard deviation, in spacings, of so many nearest neighbours along one axis of an even cover
THICKNESS = 0.06  # standard deviation across the surface, in spacings
OPACITY = 0.95
CANDIDATES = 4  # random places per Gaussian, of which those are taken that keep their distance
APART = 0.7  # that distance, in spacings
MOST_GROWTH = 4.0  # of a surface's lengths that Gaussians are prepared for
POSES = 16  # of a motion that are looked at


@dataclass
class Cloud:
    """Gaussians on the surface of a mesh; float32, indices int64.

    Attributes:
        triangles: [G] the triangle each Gaussian lies on.
        barycentric: [G, 3] where on the triangle.
        scales: [G, 3] standard deviations along the triangle's first edge, across it, and along its normal.
        opacities: [G] in 0..1.
        colors: [G, 3] sRGB in 0..1.
    """

    triangles: Tensor
    barycentric: Tensor
    scales: Tensor
    opacities: Tensor
    colors: Tensor

    def __len__(self) -> int:
        return len(self.triangles)

    def to(self, device: torch.device | str) -> Cloud:
        """The same cloud on another device."""
        return Cloud(*(getattr(self, field.name).to(device) for field in fields(self)))

    def pose(self, faces: np.ndarray | Tensor, vertices: Tensor) -> tuple[Tensor, Tensor]:
        """Where the Gaussians are when the mesh has these vertices.

        Args:
            faces: [T, 3] vertex indices.
            vertices: [F, N, 3].

        Returns:
            means [F, G, 3], differentiable, and quats [F, G, 4] wxyz, which follow the triangles without a gradient.
        """
        corner_indices = torch.as_tensor(faces, device=vertices.device)[self.triangles].long().reshape(-1)  # [3 G]
        corners = vertices.index_select(1, corner_indices).unflatten(1, (-1, 3))  # [F, G, 3, 3]
        means = (corners * self.barycentric[..., None]).sum(2)  # [F, G, 3]
        return means, triangle_quats(corners.detach())


def triangle_quats(corners: Tensor) -> Tensor:
    """Orientations of triangles: +x turned onto the first edge, +z onto the normal.

    Args:
        corners: [..., 3, 3], corner then coordinate.

    Returns:
        [..., 4] unit quaternions wxyz; the identity for a triangle without area.
    """
    edge, other = corners[..., 1, :] - corners[..., 0, :], corners[..., 2, :] - corners[..., 0, :]
    normal = torch.linalg.cross(edge, other)
    flat = normal.square().sum(-1, keepdim=True) < 1e-24  # [..., 1]
    x = torch.nn.functional.normalize(torch.where(flat, edge.new_tensor([1.0, 0, 0]), edge), dim=-1)
    z = torch.nn.functional.normalize(torch.where(flat, edge.new_tensor([0, 0, 1.0]), normal), dim=-1)
    y = torch.linalg.cross(z, x)
    # The rotation matrix has the columns x, y, z. Each row below is the quaternion times four of its own entries
    # (4 w q, 4 x q, ...); the one with the largest factor is far from 0 / 0.
    (x0, x1, x2), (y0, y1, y2), (z0, z1, z2) = x.unbind(-1), y.unbind(-1), z.unbind(-1)
    rows = [1 + x0 + y1 + z2, y2 - z1, z0 - x2, x1 - y0,
            y2 - z1, 1 + x0 - y1 - z2, x1 + y0, z0 + x2,
            z0 - x2, x1 + y0, 1 - x0 + y1 - z2, y2 + z1,
            x1 - y0, z0 + x2, y2 + z1, 1 - x0 - y1 + z2]
    candidates = torch.stack(rows, -1).unflatten(-1, (4, 4))  # [..., 4, 4]
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)  # [...]
    chosen = candidates.take_along_dim(best[..., None, None], dim=-2).squeeze(-2)  # [..., 4]
    return torch.nn.functional.normalize(chosen, dim=-1)


def seed_cloud(mesh: Mesh, count: int, generator: torch.Generator, motion: np.ndarray | None = None) -> Cloud:
    """Covers a mesh with flat ellipses: one on each vertex, the rest spread evenly over the surface between them.

    Vertices get at most half of the Gaussians (a random choice where there are more of them). Each ellipse reaches as far along
    and across its triangle's first edge as its neighbours lie apart there: less on thin parts and between many vertices.
    Gaussians keep their size, so where a motion stretches the surface they lie as close together, and reach as far, as its
    largest state needs.

    Args:
        mesh: with some area.
        count: number of Gaussians.
        generator: source of the random places.
        motion: [F, N, 3] what the vertices will do; they stay at rest where not given.

    Returns:
        a cloud of `count` Gaussians with the colours of the mesh's texture.
    """
    faces = torch.from_numpy(mesh.faces).long()  # [T, 3]
    rest = torch.from_numpy(mesh.vertices).float()
    poses = rest[None] if motion is None else torch.from_numpy(motion[_some(len(motion))]).float()
    corners = rest[faces].double()  # [T, 3, 3]
    areas = largest = _areas(corners)  # [T]
    for posed in poses:
        largest = torch.maximum(largest, _areas(posed[faces].double()))
    growth = (largest / areas.clamp(min=1e-12)).sqrt().clamp(max=MOST_GROWTH)  # [T], of lengths
    areas = areas * growth.square()
    vertex_triangles, vertex_weights = _vertex_samples(mesh, areas.numpy())
    keep = torch.randperm(len(vertex_triangles), generator=generator)[: count // 2]
    triangles, weights = _area_samples(areas, CANDIDATES * (count - len(keep)), generator)
    shuffled = torch.randperm(len(triangles), generator=generator)
    triangles = torch.cat([vertex_triangles[keep], triangles[shuffled]])  # [C]
    weights = torch.cat([vertex_weights[keep], weights[shuffled]])  # [C, 3]
    spacing = float((areas.sum() / count).sqrt())
    places = (corners[triangles] * weights[..., None]).sum(1).numpy()  # [C, 3]
    even = _spread(places, APART * spacing / growth[triangles].numpy(), len(keep), count)
    triangles, weights = triangles[even], weights[even]  # [G], [G, 3]

    uvs = (weights[..., None].numpy() * mesh.uvs[triangles.numpy()]).sum(1)  # [G, 2]
    colors = torch.from_numpy(mesh.corner_colors(uvs, triangles.numpy())).clamp(0, 1)  # [G, 3]
    cloud = Cloud(triangles, weights, torch.empty(count, 3), torch.full((count,), OPACITY), colors)
    cloud.scales = _scales(cloud, faces, rest, poses, spacing)
    return cloud


def _some(frames: int) -> np.ndarray:
    """At most `POSES` of the frames, spread over all."""
    return np.unique(np.linspace(0, frames - 1, min(frames, POSES)).round().astype(int))


def _areas(corners: Tensor) -> Tensor:
    """Of triangles [T, 3, 3]; [T]."""
    return torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=-1) / 2


def _spread(places: np.ndarray, apart: np.ndarray, fixed: int, count: int) -> np.ndarray:
    """Chooses `count` of the places [C, 3]: the first `fixed` ones, then what keeps its distance `apart` [C] from everything
    before it.

    Where that fills no more, the places follow that lie farthest from all chosen ones.
    """
    free, own = places[fixed:], apart[fixed:]
    gone = KDTree(places[:fixed]).query(free)[0] < own if fixed else np.zeros(len(free), bool)
    pairs = KDTree(free).query_pairs(own.max(), output_type="ndarray")  # the earlier place first
    pairs = pairs[np.linalg.norm(free[pairs[:, 0]] - free[pairs[:, 1]], axis=1) < own[pairs].mean(1)]
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    ends = np.searchsorted(pairs[:, 0], np.arange(len(free) + 1))
    for place in range(len(free)):
        if not gone[place]:
            gone[pairs[ends[place]:ends[place + 1], 1]] = True
    chosen = np.concatenate([np.arange(fixed), fixed + np.nonzero(~gone)[0]])[:count]
    others = np.setdiff1d(np.arange(fixed, len(places)), chosen)
    if len(chosen) < count:
        distance = KDTree(places[chosen]).query(places[others])[0] / apart[others]
        chosen = np.concatenate([chosen, others[np.argsort(-distance)[:count - len(chosen)]]])
    return chosen


def _scales(cloud: Cloud, faces: Tensor, rest: Tensor, poses: Tensor, spacing: float) -> Tensor:
    """Standard deviations [G, 3] of Gaussians from how far away their neighbours at `rest` [N, 3] get in `poses` [F, N, 3]."""
    means = cloud.pose(faces, rest[None])[0][0].numpy()  # [G, 3]
    count = min(NEIGHBOURS + 1, len(means))
    nearest = torch.from_numpy(KDTree(means).query(means, count)[1].reshape(len(means), count))  # [G, K]
    apart = torch.zeros(len(means), 2)  # squared
    for posed in poses:
        (places,), (quats,) = cloud.pose(faces, posed[None])  # [G, 3], [G, 4]
        axes = rotation_matrices(quats)[..., :2]  # [G, 3, 2]
        apart = torch.maximum(apart, ((places[nearest] - places[:, None]) @ axes).square().sum(1) / NEIGHBOURS)
    least, most = (RADIUS * spacing * limit for limit in RADIUS_RANGE)
    within = (RADIUS / NEIGHBOUR_SPREAD * apart.sqrt()).clamp(least, most)  # [G, 2]
    return torch.cat([within, torch.full((len(means), 1), THICKNESS * spacing)], 1)


def _vertex_samples(mesh: Mesh, areas: np.ndarray) -> tuple[Tensor, Tensor]:
    """For each place that has a vertex with a surface: its largest triangle [M], and the corner as weights [M, 3]."""
    _, place = weld(mesh.vertices)  # [N]
    corner_order = np.argsort(np.repeat(areas, 3), kind="stable")  # [3 T], small triangles first
    corner_order = corner_order[np.repeat(areas, 3)[corner_order] > 0]
    corner_of_place = np.full(place.max() + 1, -1)
    corner_of_place[place[mesh.faces.reshape(-1)[corner_order]]] = corner_order  # the last one written is the largest
    chosen = corner_of_place[corner_of_place >= 0]
    return torch.from_numpy(chosen // 3), torch.eye(3)[torch.from_numpy(chosen % 3)]


def _area_samples(areas: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Triangles [count] in proportion to their areas [T], stratified, and uniform places on them [count, 3]."""
    cumulative = areas.cumsum(0) / areas.sum()
    at = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    triangles = torch.searchsorted(cumulative, at).clamp(max=len(areas) - 1)
    uv = torch.rand(count, 2, generator=generator)
    uv = torch.where(uv.sum(1, keepdim=True) > 1, 1 - uv, uv)
    return triangles, torch.cat([1 - uv.sum(1, keepdim=True), uv], 1)
