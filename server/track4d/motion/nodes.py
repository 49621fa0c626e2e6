"""Control nodes: a few hundred rigid frames on the surface that carry every vertex.

A vertex is the blend of what its nearest nodes do with it, x = sum_k w_k (R_k (x0 - g_k) + p_k): linear in the stacked
rotations and positions, so posing the mesh is one sparse product (embedded deformation, Sumner et al. 2007). Distances run along
the surface, so a hand on a hip does not stick to it. The graph between nodes carries the as-rigid-as-possible energy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import trimesh
from scipy.sparse.csgraph import connected_components, dijkstra
from scipy.spatial import cKDTree

from ..geometry.mesh import Mesh
from ..geometry.proxy import build_proxy

BLENDED = 4  # nodes per vertex
NEIGHBOURS = 6  # edges per node in the node graph
LONG_EDGE = 4.0  # node spacings: longer edges are split, so that large triangles can carry nodes and bridges
GLUE = 3e4  # stiffness of a bridge between pieces relative to an edge: pictures don't tear it, and hardly move it when damped
LARGEST_SURFACE = 20_000  # vertices; larger surfaces are represented by a decimated one


@dataclass(frozen=True)
class ControlNodes:
    """Nodes of a surface at rest.

    Attributes:
        rest: [K, 3] float64 positions.
        skinning: [M, 4K] float32; `skinning @ stacked(rotations, positions)` are the surface's vertices.
        edges: [E, 2] directed node pairs, both directions.
        offsets: [E, 3] float64 rest position of the second node relative to the first.
        stiffness: [E] float64, 1 / squared length (a little regularised), which makes the energy relative to the edge's length;
            more for bridges between pieces.
        piece: [K] which separate piece of the surface each node is on.
    """

    rest: np.ndarray
    skinning: sp.csr_matrix
    edges: np.ndarray
    offsets: np.ndarray
    stiffness: np.ndarray
    piece: np.ndarray

    @property
    def bridges(self) -> np.ndarray:
        """Which edges go from piece to piece; [E] bool."""
        return self.piece[self.edges[:, 0]] != self.piece[self.edges[:, 1]]

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


def _fine_graph(points: np.ndarray, faces: np.ndarray, edges: np.ndarray, spacing: float) -> tuple[np.ndarray, np.ndarray]:
    """Points and edges of the surface with long edges split: large triangles get places inside where nodes and bridges can be.

    Returns:
        [M', 3] points, the given ones first, and [E', 2] edges.
    """
    while len(faces) and len(points) < LARGEST_SURFACE:
        corners = points[faces]
        longest = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=2).max(1)
        large = np.nonzero(longest > LONG_EDGE * spacing)[0]
        if len(large) == 0:
            break
        points, faces = trimesh.remesh.subdivide(points, faces, face_index=large)
        split = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), 1)
        edges = np.concatenate([edges, split])
    edges = np.unique(np.sort(edges, 1), axis=0)
    return points, edges[edges[:, 0] != edges[:, 1]]


def build_nodes(surface: Mesh, count: int) -> ControlNodes:
    """Places nodes evenly over a surface.

    A separate piece that is large enough for a few nodes is carried by its own nodes only, so that a wheel doesn't smear the body
    beside it; smaller pieces go with what is nearest to them.

    Args:
        surface: welded, at rest; separate pieces and loose vertices are allowed.
        count: nodes wanted; a surface with fewer vertices gets one per vertex.
    """
    vertices, faces, edges = surface.vertices.astype(np.float64), surface.faces, surface.edges()
    edges = edges[edges[:, 0] != edges[:, 1]]
    if len(vertices) > LARGEST_SURFACE:
        proxy = build_proxy(vertices, faces, edges, LARGEST_SURFACE // 2)
        points, edges, binding = proxy.vertices, proxy.edges, proxy.binding
    else:
        corners = vertices[faces]
        area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1).sum() / 2
        points, edges = _fine_graph(vertices, faces, edges, float(np.sqrt(area / count)))
        binding = sp.identity(len(points), format="csr")[:len(vertices)]
    _, piece = connected_components(sp.csr_matrix((np.ones(len(edges)), edges.T), shape=(len(points),) * 2), directed=False)
    graph = surface_graph(points, edges)
    chosen, distances = _place(points, graph, piece, min(count, len(points)))
    rest = points[chosen]
    skinning = _affine(vertices, rest, (binding @ _blend(distances)).tocsr())
    pairs = _node_pairs(distances[:, chosen], graph, piece, distances.argmin(0))
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    offsets = rest[pairs[:, 1]] - rest[pairs[:, 0]]
    squared = (offsets**2).sum(1)
    stiffness = 1 / (squared + 0.1 * squared.mean()) if len(pairs) else np.zeros(0)
    nodes = ControlNodes(rest, skinning, pairs, offsets, stiffness, piece[chosen])
    stiffness[nodes.bridges] *= GLUE
    return nodes


def _place(points: np.ndarray, graph: sp.csr_matrix, piece: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Farthest point sampling along the surface: the chosen points [K] and everyone's distance to them, [K, C].

    Pieces that got fewer than `BLENDED` nodes lose them; the others are infinitely far from the nodes of other pieces. Not
    so where most nodes are on small pieces, as on the leaves of a tree.
    """
    chosen = [int(np.linalg.norm(points - points.mean(0), axis=1).argmax())]
    distances = np.empty((count, len(points)), np.float32)  # [K, C] along the surface
    distances[0] = dijkstra(graph, indices=chosen[0])
    nearest = distances[0].copy()
    for k in range(1, count):  # farthest point sampling
        chosen.append(int(nearest.argmax()))
        distances[k] = dijkstra(graph, indices=chosen[k])
        nearest = np.minimum(nearest, distances[k])
    own_nodes = np.bincount(piece[chosen], minlength=piece.max() + 1) >= BLENDED  # of each piece
    kept = own_nodes[piece[chosen]]
    if kept.mean() > 0.5:
        chosen, distances = np.array(chosen)[kept], distances[kept]
        distances[:, own_nodes[piece]] = np.where(piece[chosen][:, None] == piece[None, own_nodes[piece]],
                                                  distances[:, own_nodes[piece]], np.float32(np.inf))
    return np.asarray(chosen), distances


def _blend(distances: np.ndarray) -> sp.csr_matrix:
    """Weights [C, K] of the nearest nodes of each point, (1 - d / d5)^2 with d5 the distance of the next one; from [K, C]."""
    count, points = distances.shape
    blended = min(BLENDED, count)
    order = np.argsort(distances, axis=0)[:blended + 1]  # [5, C]
    near = np.take_along_axis(distances, order, 0)
    reach = np.where(np.isfinite(near[-1]), near[-1], 1.5 * np.where(np.isfinite(near), near, 0).max(0)) + 1e-9
    weight = np.where(np.isfinite(near[:blended]), np.maximum(1 - near[:blended] / reach, 1e-4) ** 2, 0)
    weight = weight / weight.sum(0)
    weights = sp.csr_matrix((weight.T.ravel(), (np.repeat(np.arange(points), blended), order[:blended].T.ravel())),
                            shape=(points, count))
    weights.eliminate_zeros()
    return weights


def _node_pairs(between: np.ndarray, graph: sp.csr_matrix, piece: np.ndarray, closest: np.ndarray) -> np.ndarray:
    """Pairs of nodes: the nearest ones on the same piece, and those beside a bridge between pieces; [E, 2].

    Args:
        between: [K, K] distances, infinite from piece to piece.
        graph: [C, C] of the bridged surface; piece: [C]; closest: [C] the node that is nearest to each point.
    """
    neighbour = np.argsort(between, axis=1)[:, 1:NEIGHBOURS + 1]
    pairs = np.stack([np.repeat(np.arange(len(between)), neighbour.shape[1]), neighbour.ravel()], 1)
    pairs = pairs[np.isfinite(between[pairs[:, 0], pairs[:, 1]])]
    ends = np.stack(graph.nonzero(), 1)
    ends = ends[piece[ends[:, 0]] != piece[ends[:, 1]]]
    across = np.unique(closest[ends], axis=0)
    return np.concatenate([pairs, across[across[:, 0] < across[:, 1]]])


def _affine(vertices: np.ndarray, rest: np.ndarray, weights: sp.spmatrix) -> sp.csr_matrix:
    """The matrix [M, 4K] that takes rows (R_k^T, p_k) to vertices, from blend weights [M, K]."""
    weights = weights.tocoo()
    lever = (vertices[weights.row] - rest[weights.col]) * weights.data[:, None]  # [nnz, 3]
    values = np.concatenate([lever, weights.data[:, None]], 1).astype(np.float32)
    columns = 4 * weights.col[:, None] + np.arange(4)
    rows = np.repeat(weights.row, 4)
    return sp.csr_matrix((values.ravel(), (rows, columns.ravel())), shape=(len(vertices), 4 * len(rest)))
