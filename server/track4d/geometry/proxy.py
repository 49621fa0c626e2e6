"""A coarse surface for a fine one: fewer vertices by edge collapses, and smooth weights that carry the fine surface along."""

from __future__ import annotations

from dataclasses import dataclass

import fast_simplification
import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components


@dataclass(frozen=True)
class Proxy:
    """A coarse surface and what it does to the fine one.

    Attributes:
        vertices: [C, 3] float64.
        edges: [E, 2] those of the coarse surface, exactly where the fine surface has a path.
        binding: [M, C] float64, rows sum to 1: the fine vertices follow these coarse ones.
    """

    vertices: np.ndarray
    edges: np.ndarray
    binding: sp.csr_matrix


def build_proxy(vertices: np.ndarray, faces: np.ndarray, edges: np.ndarray, count: int) -> Proxy:
    """Reduces a welded surface to about `count` vertices.

    Quadric edge collapses (Garland and Heckbert 1997, by fast-simplification) tell which coarse vertex each fine one went into,
    so two surfaces that face each other across a narrow gap stay apart. Vertices without a triangle stand for themselves.

    Args:
        vertices: [M, 3] welded.
        faces: [T, 3] any triangles, non-manifold and without area too.
        edges: [E, 2] of the triangles.
        count: vertices wanted.
    """
    vertices = vertices.astype(np.float64)
    proper = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    used, local = np.unique(faces[proper], return_inverse=True)
    local = local.reshape(-1, 3).astype(np.int32)
    wanted = max(4, round(len(local) * count / max(len(used), 1)))
    merged = np.zeros((0, 2), np.int64)
    if wanted < len(local):
        _, _, merged = fast_simplification.simplify(vertices[used].astype(np.float32), local, target_count=wanted,
                                                    return_collapses=True)
    pairs = used[merged]  # which vertex went into which
    joined = sp.csr_matrix((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(vertices),) * 2)
    _, cluster = connected_components(joined, directed=False)
    sizes = np.bincount(cluster)
    centres = np.stack([np.bincount(cluster, vertices[:, k]) for k in range(3)], 1) / sizes[:, None]
    low, high = np.sort(cluster[edges].astype(np.int64), 1).T
    keys = np.unique(low * len(sizes) + high)
    coarse = np.stack([keys // len(sizes), keys % len(sizes)], 1)
    coarse = coarse[coarse[:, 0] != coarse[:, 1]]
    return Proxy(centres, coarse, _smooth_binding(vertices, centres, coarse, cluster))


def _smooth_binding(vertices: np.ndarray, centres: np.ndarray, edges: np.ndarray, cluster: np.ndarray) -> sp.csr_matrix:
    """Weights [M, C] of each vertex on its own coarse vertex and on those beside it, falling to zero with the distance."""
    count = len(centres)
    beside = sp.csr_matrix((np.ones(2 * len(edges)), (edges.T.ravel(), edges[:, ::-1].T.ravel())), shape=(count, count))
    beside = (beside + sp.identity(count)).tocsr()
    pattern = beside[cluster].tocoo()
    distance = np.linalg.norm(vertices[pattern.row] - centres[pattern.col], axis=1)
    length = np.linalg.norm(centres[edges[:, 0]] - centres[edges[:, 1]], axis=1)
    longest = np.zeros(count)
    for end in (0, 1):
        np.maximum.at(longest, edges[:, end], length)
    own = pattern.col == cluster[pattern.row]
    weight = np.maximum(1 - distance / np.maximum(longest[pattern.col], 1e-12), 0) ** 2 + 1e-3 * own  # never all zero
    weights = sp.csr_matrix((weight, (pattern.row, pattern.col)), shape=(len(vertices), count))
    return (sp.diags(1 / np.asarray(weights.sum(1)).ravel()) @ weights).tocsr()
