"""What a motion is judged by: pictures, rigidity, tracks, smoothness. Plain functions of tensors, each a scalar.

The 4D-SDS loss (Eq. 11) is in `sds`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TRACK_SCALE = 2.0  # pixels: where the tracks' loss turns from squared to linear
PLACE_SCALE = 0.02  # canonical units: the same for tracks in space


def reconstruction_loss(shown: Tensor, wanted: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of the masked pictures (Eq. 10 of Track4DGen).

    Args:
        shown: [..., H, W, 3] rendered on black, which is the render times its own mask.
        wanted: [..., H, W, 3] sRGB.
        mask: [..., H, W] of the object in 0..1.
    """
    return (shown - wanted * mask[..., None]).square().mean()


def mask_loss(alpha: Tensor, mask: Tensor) -> Tensor:
    """Mean squared difference of silhouettes [..., H, W] (Animate3D's mask term)."""
    return (alpha - mask).square().mean()


def edge_rotations(rest: Tensor, posed: Tensor) -> Tensor:
    """Rotations that best take bundles of edges from rest to a pose (Sorkine and Alexa 2007).

    Args:
        rest: [..., K, 3]; posed: [..., K, 3]; an edge that is zero in both doesn't count.

    Returns:
        [..., 3, 3] proper rotations, without a gradient.
    """
    with torch.no_grad():
        U, _, V = torch.linalg.svd(rest.transpose(-1, -2) @ posed)
        proper = torch.ones_like(U[..., 0])  # [..., 3]
        proper[..., 2] = torch.linalg.det(U @ V).sign()
        return V.transpose(-1, -2) @ (proper[..., None] * U.transpose(-1, -2))


def _edges(rest: Tensor, posed: Tensor, neighbours: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Edges [..., S, K, 3] of the sampled vertices in `rest` and in `posed`; zero where there is no neighbour."""
    beside = neighbours[samples]  # [S, K]
    there = (beside >= 0)[..., None]
    beside = beside.clamp(min=0)
    still, moved = ((places[..., samples, None, :] - places[..., beside, :]) * there for places in (rest, posed))
    return still, moved


def arap_energy(rest: Tensor, posed: Tensor, neighbours: Tensor, samples: Tensor) -> Tensor:
    """As-rigid-as-possible energy as Animate3D has it: a sum over frames, samples and neighbours, in squared units.

    Args:
        rest: [N, 3]; posed: [F, N, 3].
        neighbours: [N, K] vertices beside each vertex, -1 for none.
        samples: [S] vertices that count, repeated ones repeatedly.
    """
    still, moved = _edges(rest, posed, neighbours, samples)
    return (moved - still @ edge_rotations(still, moved).transpose(-1, -2)).square().sum()


def rigidity_loss(rest: Tensor, posed: Tensor, neighbours: Tensor, samples: Tensor) -> Tensor:
    """As-rigid-as-possible energy per edge and relative to the edges' lengths.

    A mean, so it changes neither with the number of vertices, samples and frames nor with the size of the object; and it is zero
    for turns and shifts. Arguments as of `arap_energy`, but `rest` may also be [F, N, 3]: another pose for each frame.
    """
    still, moved = _edges(rest, posed, neighbours, samples)
    off = (moved - still @ edge_rotations(still, moved).transpose(-1, -2)).square().sum((-1, -2))  # [F, S]
    return (off / still.square().sum((-1, -2)).clamp(min=1e-12)).mean()


def isometry_loss(rest: Tensor, posed: Tensor, edges: Tensor) -> Tensor:
    """Mean squared relative change of the lengths of edges [E, 2], for instance of a region that the user has pinned."""
    if len(edges) == 0:
        return posed.new_zeros(())
    still = (rest[edges[:, 0]] - rest[edges[:, 1]]).norm(dim=-1).clamp(min=1e-6)  # [E]
    moved = (posed[:, edges[:, 0]] - posed[:, edges[:, 1]]).square().sum(-1).clamp(min=1e-12).sqrt()  # [F, E]
    return (moved / still - 1).square().mean()


def edges_within(edges: Tensor, pinned: Tensor) -> Tensor:
    """Those of the edges [E, 2] that have both ends among the pinned vertices [N] bool; [E', 2]."""
    return edges[pinned[edges].all(1)]


def smoothness_loss(posed: Tensor, loops: bool = False) -> Tensor:
    """Mean squared second difference over time of positions [F, N, 3]; zero below three frames."""
    if len(posed) < 3:
        return posed.new_zeros(())
    if loops:
        posed = torch.cat([posed[-1:], posed, posed[:1]])
    return (posed[2:] - 2 * posed[1:-1] + posed[:-2]).square().sum(-1).mean()


def track_loss(posed: Tensor, tracks: Tensor, weights: Tensor, viewmats: Tensor, Ks: Tensor) -> Tensor:
    """Huber distance in pixels between projected points and their tracks.

    Args:
        posed: [F, N, 3].
        tracks: [V, F, N, 2] pixels; weights: [V, F, N] in 0..1, 0 = not tracked there (its numbers don't matter).
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in the same pixels.

    Returns:
        the weighted mean; 0 without any track.
    """
    uv = project(posed, viewmats, Ks)[0].transpose(0, 1)  # [V, F, N, 2]
    return _weighted_huber(uv, tracks, weights, TRACK_SCALE)


def place_loss(posed: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Huber distance in space between points and their 3D tracks; posed and places [F, N, 3], weights [F, N]."""
    return _weighted_huber(posed, places, weights, PLACE_SCALE)


def _weighted_huber(positions: Tensor, wanted: Tensor, weights: Tensor, scale: float) -> Tensor:
    wanted = torch.where(weights[..., None] > 0, wanted, positions.detach())
    distance = (positions - wanted).square().sum(-1).clamp(min=1e-12).sqrt()
    return (functional.huber_loss(distance, torch.zeros_like(distance), reduction="none", delta=scale) * weights).sum() \
        / weights.sum().clamp(min=1e-6)


def project(points: Tensor, viewmats: Tensor, Ks: Tensor) -> tuple[Tensor, Tensor]:
    """Points [F, N, 3] to pixels [F, V, N, 2] and depths [F, V, N], differentiable."""
    local = torch.einsum("vij,fnj->fvni", viewmats[:, :3, :3], points) + viewmats[:, None, :3, 3]  # [F, V, N, 3]
    depth = local[..., 2]
    scale = torch.stack([Ks[:, 0, 0], Ks[:, 1, 1]], -1)[:, None]  # [V, 1, 2]
    return local[..., :2] / depth.clamp(min=1e-3)[..., None] * scale + Ks[:, None, :2, 2], depth


def ring_neighbours(edges: Tensor, count: int, width: int) -> Tensor:
    """Up to `width` vertices joined by an edge to each of `count` vertices, -1 where there are fewer; [count, width].

    Of more neighbours some are picked evenly, in the order of their indices.

    Args:
        edges: [E, 2] undirected, each once.
    """
    both = torch.cat([edges, edges.flip(1)])
    both = both[(both[:, 0] * count + both[:, 1]).argsort()]
    degree = torch.bincount(both[:, 0], minlength=count)  # [count]
    first = degree.cumsum(0) - degree
    slot = torch.arange(width)
    step = (degree.float() / width).clamp(min=1)[:, None]
    pick = (slot * step).long()  # [count, width]
    there = pick < degree[:, None]
    return torch.where(there, both[(first[:, None] + pick).clamp(max=max(len(both) - 1, 0)), 1], -1) if len(both) \
        else torch.full((count, width), -1)
