"""Other bodies for a real clip: the same mesh with other proportions, doing what the original does.

A motion is carried over as rotations: every edge of the other body turns as the original's edge does, and keeps what it
stretches by (deformation gradients, Sumner and Popovic 2004, on the edges of a graph).
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import splu
from scipy.spatial import cKDTree

from ..geometry.mesh import weld

BRIDGES = 6  # edges between two pieces of the mesh that touch
TOUCHING = 0.03  # gap between them
BIG_HEADS = 0.4  # share of bodies whose upper part is larger, as cartoon characters have it
HOLD = 1e-3  # of every vertex to where its displacement alone would take it


def other_body(rest: np.ndarray, faces: np.ndarray, clips: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random other body and its clips.

    Args:
        rest: [N, 3] canonical; faces: [T, 3].
        clips: [C, P, N, 3].

    Returns:
        rest [N, 3] and clips [C, P, N, 3], float32, canonical.
    """
    first, inverse = weld(rest)
    places, edges = rest[first].astype(np.float64), _edges(rest[first], inverse[faces])
    body = reshape(places, rng)
    poses = clips.reshape(-1, *rest.shape[:2])[:, first].astype(np.float64)
    moved = transfer(places, body, edges, poses)
    other, motion = canonical(body, moved)
    return other[inverse], motion[:, inverse].reshape(clips.shape)


def canonical(body: np.ndarray, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A body [N, 3] and its poses [P, N, 3], centred and scaled so that the body fits the unit sphere; float32."""
    middle = (body.min(0) + body.max(0)) / 2
    size = np.linalg.norm(body - middle, axis=1).max()
    return ((body - middle) / size).astype(np.float32), ((poses - middle) / size).astype(np.float32)


def nearest_rotations(maps: np.ndarray) -> np.ndarray:
    """To linear maps [N, 3, 3], or to covariances of points and what they became (Kabsch 1976); [N, 3, 3]."""
    left, _, right = np.linalg.svd(maps)
    left[np.linalg.det(left @ right) < 0, :, 2] *= -1
    return left @ right


def reshape(places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other proportions: longer and shorter, broader here and thinner there, and a slight wobble; [N, 3] to [N, 3]."""
    x, y, z = places.T
    bulge = [1 + rng.uniform(-0.35, 0.35) * np.sin(math.pi * z + rng.uniform(0, 2 * math.pi)) for _ in range(2)]
    lengths = [rng.uniform(-0.45, 0.45) * np.sin(math.pi * axis + rng.uniform(0, 2 * math.pi)) / math.pi for axis in (x, z)]
    span = 1 + rng.uniform(-0.3, 0.3) * np.cos(math.pi * y)  # alike on both sides
    points = np.stack([(x + lengths[0]) * bulge[0], y * bulge[1] * span, z + lengths[1]], 1) * rng.uniform(0.75, 1.3, 3)
    if rng.random() < BIG_HEADS:
        start, growth, axis = rng.uniform(0.3, 0.7), rng.uniform(0.3, 1.3), np.average(points, 0, np.clip(z - 0.3, 1e-3, 1))
        above = np.clip((z - start) / 0.2, 0, 1)
        points[:, :2] += (points[:, :2] - axis[:2] * (1, 0)) * (growth * above)[:, None]
        points[:, 2] += growth * np.clip(z - start, 0, None)
    wave, phase = rng.normal(size=(3, 3)) * 3.5, rng.uniform(0, 2 * math.pi, 3)
    return points + rng.uniform(0, 0.03) * np.sin(points @ wave + phase)


def transfer(places: np.ndarray, body: np.ndarray, edges: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Poses of another body.

    Args:
        places: [M, 3], the body whose poses are known; body: [M, 3], the other one, vertex by vertex.
        edges: [E, 2] of a graph over the vertices.
        poses: [P, M, 3].

    Returns:
        [P, M, 3]; where `body` is `places`, the poses themselves.
    """
    count, (i, j) = len(places), edges.T
    along, other = places[i] - places[j], body[i] - body[j]  # [E, 3]
    ratio = np.linalg.norm(other, axis=1) / np.maximum(np.linalg.norm(along, axis=1), 1e-9)
    ratio = np.clip(ratio, 0.3, 3)[:, None]
    ends, edge = np.concatenate([i, j]), np.tile(np.arange(len(edges)), 2)
    collect = scipy.sparse.csr_array((np.ones(len(ends)), (ends, edge)), (count, len(edges)))
    difference = scipy.sparse.csr_array((np.repeat([1.0, -1.0], len(edges)), (edge, ends)), (len(edges), count))
    solve = splu((difference.T @ difference + HOLD * scipy.sparse.eye_array(count)).tocsc()).solve
    moved = np.empty_like(poses)
    for k, pose in enumerate(poses):
        now = pose[i] - pose[j]
        covariance = collect @ (now[:, :, None] * along[:, None]).reshape(len(edges), 9)  # [M, 9]
        turns = nearest_rotations(covariance.reshape(-1, 3, 3))
        turn = turns[i] / 2 + turns[j] / 2  # [E, 3, 3]
        rotated = np.einsum("eab,eb->ea", turn, other) + ratio * (now - np.einsum("eab,eb->ea", turn, along))
        moved[k] = solve(difference.T @ rotated + HOLD * (body + pose - places))
    return moved


def _edges(places: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Edges [E, 2] of the mesh, and bridges between pieces that touch or that nothing else joins."""
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    sides = sides[sides[:, 0] != sides[:, 1]]
    graph = scipy.sparse.coo_array((np.ones(len(sides)), sides.T), (len(places), len(places)))
    pieces, piece = connected_components(graph, directed=False)
    found = [np.empty((0, 2), int)]
    for label in range(pieces if pieces > 1 else 0):
        mine, others = np.nonzero(piece == label)[0], np.nonzero(piece != label)[0]
        _, near = cKDTree(places[others]).query(places[mine], k=min(8, len(others)))
        found.append(np.stack([np.repeat(mine, near.size // len(mine)), others[near.reshape(-1)]], 1))
    between = np.unique(np.sort(np.concatenate(found), axis=1), axis=0)
    gaps = np.linalg.norm(places[between[:, 0]] - places[between[:, 1]], axis=1)
    between, gaps = between[gaps.argsort()], np.sort(gaps)
    joined = np.arange(pieces)
    kept: dict[tuple[int, int], int] = {}
    bridges = np.zeros(len(between), bool)
    for k, (one, other) in enumerate(piece[between]):
        pair = (min(one, other), max(one, other))
        if kept.get(pair, 0) == 0 and gaps[k] > TOUCHING and joined[one] == joined[other]:
            continue
        kept[pair] = kept.get(pair, 0) + 1
        bridges[k] = kept[pair] <= BRIDGES
        if joined[one] != joined[other]:
            joined[joined == joined[one]] = joined[other]
    every = np.sort(np.concatenate([sides, between[bridges]]), axis=1)
    return np.unique(every, axis=0)
