"""Control nodes: a few hundred rigid frames on the surface that carry every vertex.

A vertex is the blend of what its nearest nodes do with it, x = sum_k w_k (R_k (x0 - g_k) + p_k): linear in the stacked
rotations and positions, so posing the mesh is one sparse product (embedded deformation, Sumner et al. 2007). Distances run along
the surface, so a hand on a hip does not stick to it. The graph between nodes carries the as-rigid-as-possible energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree

BLENDED = 4  # nodes per vertex
NEIGHBOURS = 6  # edges per node in the node graph
LARGEST_SURFACE = 20_000  # vertices; larger surfaces are represented by clusters of vertices


@dataclass(frozen=True)
class ControlNodes:
    """Nodes of a surface at rest.

    Attributes:
        rest: [K, 3] float64 positions.
        skinning: [M, 4K] float32; `skinning @ stacked(rotations, positions)` are the surface's vertices.
        edges: [E, 2] directed node pairs, both directions.
        offsets: [E, 3] float64 rest position of the second node relative to the first.
        stiffness: [E] float64, 1 / squared length (a little regularised), which makes the energy relative to the edge's length.
    """

    rest: np.ndarray
    skinning: sp.csr_matrix
    edges: np.ndarray
    offsets: np.ndarray
    stiffness: np.ndarray

    def pose(self, rotations: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Vertices [M, 3] float32 for node rotations [K, 3, 3] and positions [K, 3]."""
        stacked = np.concatenate([rotations.transpose(0, 2, 1), positions[:, None]], 1).reshape(-1, 3)  # [4K, 3]
        return self.skinning @ stacked.astype(np.float32)


def surface_graph(vertices: np.ndarray, edges: np.ndarray) -> sp.csr_matrix:
    """Edge lengths of a surface whose separate pieces are bridged at their closest places; symmetric [M, M], connected.

    Args:
        vertices: [M, 3], welded.
        edges: [E, 2].
    """
    while True:
        graph = sp.csr_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(vertices),) * 2)
        count, labels = connected_components(graph, directed=False)
        if count == 1:
            break
        edges = np.concatenate([edges, _bridges(vertices, labels)])
    edges = np.unique(np.sort(edges, 1), axis=0)
    lengths = np.linalg.norm(vertices[edges[:, 0]].astype(np.float64) - vertices[edges[:, 1]], axis=1) + 1e-6
    return sp.csr_matrix((np.tile(lengths, 2), (edges.T.ravel(), edges[:, ::-1].T.ravel())), shape=(len(vertices),) * 2)


def _bridges(vertices: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Pairs that join each piece but the largest to the rest where it is closest; [B, 2]."""
    sizes = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    pieces = np.split(order, np.cumsum(sizes)[:-1])
    everything = cKDTree(vertices)
    pairs = []
    for piece, members in enumerate(pieces):
        if piece == np.argmax(sizes):
            continue
        if len(members) <= 256:  # its own vertices can hide the others from a query for at most this many neighbours
            distance, other = everything.query(vertices[members], k=len(members) + 1)
            distance = np.where(labels[other] == piece, np.inf, distance)
            nearest = distance.argmin(1)[:, None]
            distance, other = np.take_along_axis(distance, nearest, 1)[:, 0], np.take_along_axis(other, nearest, 1)[:, 0]
        else:
            rest = np.nonzero(labels != piece)[0]
            distance, other = cKDTree(vertices[rest]).query(vertices[members])
            other = rest[other]
        closest = np.argsort(distance)[:max(BLENDED, len(members) // 10)]
        closest = closest[distance[closest] <= distance[closest[0]] * 1.5 + 0.01]
        pairs.append(np.stack([members[closest], other[closest]], 1))
    return np.concatenate(pairs)


def _cluster(vertices: np.ndarray, normals: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A coarse surface: vertices of one grid cell that face the same way become one.

    Two surfaces that face each other across a narrow gap stay apart, and the coarse edges are exactly those of the fine surface.

    Returns:
        centres [C, 3], coarse edges [E', 2], and the cluster of each vertex [M].
    """
    cell = float(np.ptp(vertices, axis=0).max()) / 48
    facing = np.abs(normals).argmax(1)
    facing = 2 * facing + (np.take_along_axis(normals, facing[:, None], 1)[:, 0] > 0)
    while True:
        keys = np.concatenate([np.floor((vertices - vertices.min(0)) / cell).astype(np.int64), facing[:, None]], 1)
        _, cluster, sizes = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
        if len(sizes) <= LARGEST_SURFACE:
            break
        cell *= 1.25
    cluster = cluster.reshape(-1)
    centres = np.stack([np.bincount(cluster, vertices[:, k]) for k in range(3)], 1) / sizes[:, None]
    coarse = np.unique(np.sort(cluster[edges], 1), axis=0)
    return centres, coarse[coarse[:, 0] != coarse[:, 1]], cluster


def _spread(vertices: np.ndarray, centres: np.ndarray, edges: np.ndarray, cluster: np.ndarray) -> sp.csr_matrix:
    """Smooth weights [M, C] of each vertex on its own cluster and the clusters beside it."""
    count = len(centres)
    beside = sp.csr_matrix((np.ones(2 * len(edges)), (edges.T.ravel(), edges[:, ::-1].T.ravel())), shape=(count, count))
    beside = (beside + sp.identity(count)).tocsr()
    pattern = beside[cluster].tocoo()
    distance = np.linalg.norm(vertices[pattern.row] - centres[pattern.col], axis=1)
    reach = 1.5 * np.linalg.norm(centres[edges[:, 0]] - centres[edges[:, 1]], axis=1).mean()
    own = pattern.col == cluster[pattern.row]
    weight = np.maximum(1 - distance / reach, 0) ** 2 + 1e-3 * own  # never all zero
    weights = sp.csr_matrix((weight, (pattern.row, pattern.col)), shape=(len(vertices), count))
    return sp.diags(1 / np.asarray(weights.sum(1)).ravel()) @ weights


def build_nodes(vertices: np.ndarray, normals: np.ndarray, edges: np.ndarray, count: int) -> ControlNodes:
    """Places nodes evenly over a surface.

    Args:
        vertices: [M, 3] welded positions at rest; separate pieces and loose vertices are allowed.
        normals: [M, 3] (only large surfaces need them).
        edges: [E, 2].
        count: nodes wanted; a surface with fewer vertices gets one per vertex.
    """
    spread = None
    points = vertices.astype(np.float64)
    if len(points) > LARGEST_SURFACE:
        points, edges, cluster = _cluster(points, normals, edges)
        spread = _spread(vertices, points, edges, cluster)
    count = min(count, len(points))
    graph = surface_graph(points, edges)

    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmax())]
    distances = np.empty((count, len(points)), np.float32)  # [K, C] along the surface
    distances[0] = dijkstra(graph, indices=chosen[0])
    nearest = distances[0].copy()
    for k in range(1, count):  # farthest point sampling
        chosen.append(int(nearest.argmax()))
        distances[k] = dijkstra(graph, indices=chosen[k])
        nearest = np.minimum(nearest, distances[k])
    rest = points[chosen]

    blended = min(BLENDED, count)
    order = np.argsort(distances, axis=0)[:blended + 1]  # [5, C]
    near = np.take_along_axis(distances, order, 0)
    weight = np.maximum(1 - near[:blended] / (near[-1:] + 1e-9), 1e-4) ** 2
    weight = weight / weight.sum(0)
    columns = np.repeat(np.arange(len(points)), blended)
    weights = sp.csr_matrix((weight.T.ravel(), (columns, order[:blended].T.ravel())), shape=(len(points), count))
    skinning = _affine(vertices, rest, weights if spread is None else spread @ weights)

    between = distances[:, chosen]
    neighbour = np.argsort(between, axis=1)[:, 1:NEIGHBOURS + 1]
    pairs = np.stack([np.repeat(np.arange(count), neighbour.shape[1]), neighbour.ravel()], 1)
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    offsets = rest[pairs[:, 1]] - rest[pairs[:, 0]]
    squared = (offsets**2).sum(1)
    stiffness = 1 / (squared + 0.1 * squared.mean()) if len(pairs) else np.zeros(0)
    return ControlNodes(rest, skinning, pairs, offsets, stiffness)


def _affine(vertices: np.ndarray, rest: np.ndarray, weights: sp.spmatrix) -> sp.csr_matrix:
    """The matrix [M, 4K] that takes rows (R_k^T, p_k) to vertices, from blend weights [M, K]."""
    weights = weights.tocoo()
    lever = (vertices[weights.row] - rest[weights.col]) * weights.data[:, None]  # [nnz, 3]
    values = np.concatenate([lever, weights.data[:, None]], 1).astype(np.float32)
    columns = 4 * weights.col[:, None] + np.arange(4)
    rows = np.repeat(weights.row, 4)
    return sp.csr_matrix((values.ravel(), (rows, columns.ravel())), shape=(len(vertices), 4 * len(rest)))
