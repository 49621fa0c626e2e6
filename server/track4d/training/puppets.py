"""Puppets for a real clip: bodies made anew of simple solids that do what the pieces of the original do.

Where `bodies` bends a mesh, so that whoever learns from it may still know it again, a puppet shares nothing with it but how its
pieces are joined and how they turn: what moves as one is found in the clips, becomes an ellipsoid, a cylinder or a box of random
thickness and length, and hangs on its neighbour. Some lack a limb or an ear, others carry a thing that the original does not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree

from .bodies import canonical, nearest_rotations

POINTS = 1500  # of the surface, by which pieces are found
LOOKED_AT = 64  # poses, likewise
PIECES = (12, 28)  # at least, and fewer than
FEWEST = 10  # points of a piece
ROUNDS = 8
APART = 0.07  # canonical: points of a piece have another one nearer than this
FLAT = 0.03  # canonical: a piece turns but isn't stretched in directions in which it is thinner
LOST_SHARE = 0.35  # of puppets lack a limb
LARGEST_LOST = 0.12  # of all points, that the limb has
SMOOTH_SHARE = 0.5  # of puppets have a skin that bends at the joints
SHARPNESS = (1.0, 0.35, 0.15)  # exponents of a superellipsoid: round, a cylinder, a box
SAME_KIND = 0.7  # of a puppet's solids are of one kind
MOST_CARRIED = 3  # things
RINGS, SPOKES = 8, 10  # of a solid


@dataclass
class _Piece:
    """What moves as one.

    Attributes:
        points: [n, 3] of it at rest.
        maps: [P, 3, 3] in every pose, about `centre` [3], which lies at `places` [P, 3] then.
        scale: of it in the puppet.
        joint: [3] where it hangs on its neighbour at rest, `new_joint` in the puppet, `posed_joint` [P, 3] in every pose of that.
    """

    points: np.ndarray
    maps: np.ndarray
    centre: np.ndarray
    places: np.ndarray
    scale: float = 1.0
    joint: np.ndarray = field(init=False)
    new_joint: np.ndarray = field(init=False)
    posed_joint: np.ndarray = field(init=False)

    def hang(self, parent: _Piece | None) -> None:
        """Puts the piece where its neighbour is in the puppet; the largest hangs on nothing."""
        if parent is None:
            self.joint, self.new_joint, self.posed_joint = self.centre, self.centre, self.places
            return
        self.joint = _joint(parent.points, self.points)
        (self.new_joint,) = parent.resting(self.joint[None])
        apart = self._original(self.joint) - parent._original(self.joint)  # some have a gap there that opens and closes
        self.posed_joint = parent.moving(self.new_joint[None])[:, 0] + apart

    def resting(self, points: np.ndarray) -> np.ndarray:
        """Points of the original [N, 3] in the puppet."""
        return self.new_joint + self.scale * (points - self.joint)

    def moving(self, points: np.ndarray) -> np.ndarray:
        """Points of the puppet [N, 3] in every pose, [P, N, 3]."""
        return self.posed_joint[:, None] + (points - self.new_joint) @ self.maps.swapaxes(1, 2)

    def _original(self, point: np.ndarray) -> np.ndarray:
        return self.places + self.maps @ (point - self.centre)


def puppet(
    rest: np.ndarray, faces: np.ndarray, clips: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random puppet and its clips.

    Args:
        rest: [N, 3] canonical; faces: [T, 3].
        clips: [C, P, N, 3].

    Returns:
        rest [M, 3] float32, faces [S, 3] int32 and clips [C, P, M, 3] float32, canonical.
    """
    chosen, share = _scatter(rest, faces, rng)
    points = np.einsum("nk,nkc->nc", share, rest[chosen])
    poses = sum(share[:, k, None] * clips.reshape(-1, *rest.shape)[:, chosen[:, k]] for k in range(3))
    label = _segment(points, poses[:: max(1, len(poses) // LOOKED_AT)], int(rng.integers(*PIECES)), rng)
    pieces = [_fit(points[label == k], poses[:, label == k]) for k in np.unique(label)]
    order, parents = _tree(pieces)
    kept = _without_a_limb(pieces, order, parents, rng) if rng.random() < LOST_SHARE else set(order)
    thickness, sharpness = _draw_proportions(pieces, order, parents, rng)
    for k in order:
        pieces[k].hang(pieces[parents[k]] if parents[k] >= 0 else None)
    softness = rng.uniform(0.02, 0.06) if rng.random() < SMOOTH_SHARE else 0.0
    solids = [(k, *_solid(pieces[k].points, thickness[k], sharpness[k])) for k in order if k in kept]
    for _ in range(int(rng.integers(MOST_CARRIED + 1))):
        k = sorted(kept)[int(rng.integers(len(kept)))]
        solids.append((k, *_carried(pieces[k].points, rng)))
    bodies, motions, triangles, count = [], [], [], 0
    for k, vertices, sides in solids:
        neighbours = [other for other in kept if parents[other] == k or other == parents[k]] if softness else []
        body, motion = _skin([pieces[other] for other in (k, *neighbours)], vertices, softness)
        bodies.append(body)
        motions.append(motion)
        triangles.append(sides + count)
        count += len(vertices)
    body, moved = canonical(np.concatenate(bodies), np.concatenate(motions, 1))
    return body, np.concatenate(triangles).astype(np.int32), moved.reshape(*clips.shape[:2], -1, 3)


def _draw_proportions(
    pieces: list[_Piece], order: list[int], parents: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Scales of the pieces, alike on both sides, and so their thickness [K, 3] and the sharpness of their edges [K, 2]."""
    twins = _twins(pieces)
    by_depth = np.exp(rng.normal(0, 0.15, len(pieces)))
    thickness, sharpness = np.ones((len(pieces), 3)), np.ones((len(pieces), 2))
    depth = np.zeros(len(pieces), int)
    for k in order[1:]:
        depth[k] = depth[parents[k]] + 1
    kind = rng.choice(SHARPNESS, 2)
    for k in order:
        twin = twins[k]
        if 0 <= twin < k:
            pieces[k].scale, thickness[k], sharpness[k] = pieces[twin].scale, thickness[twin], sharpness[twin]
            continue
        pieces[k].scale = by_depth[depth[k]] * float(np.exp(rng.normal(0, 0.12))) if depth[k] else 1.0
        thickness[k] = rng.uniform(0.65, 1.15) * rng.uniform(0.85, 1.2, 3)
        sharpness[k] = kind if rng.random() < SAME_KIND else rng.choice(SHARPNESS, 2)
    return thickness, sharpness


def _skin(pieces: list[_Piece], vertices: np.ndarray, softness: float) -> tuple[np.ndarray, np.ndarray]:
    """A solid of the first piece, [N, 3] of the original: in the puppet [N, 3], in its poses [P, N, 3].

    Where another piece is nearer than the first by some of `softness` or more, it goes with that.
    """
    gaps = np.stack([cKDTree(piece.points).query(vertices)[0] for piece in pieces])
    weights = np.exp(-(((gaps - gaps[0]).clip(0) / max(softness, 1e-6)) ** 2))[..., None]
    weights /= weights.sum(0)
    resting = [piece.resting(vertices) for piece in pieces]
    body = sum(weight * each for weight, each in zip(weights, resting))
    return body, sum(weight * piece.moving(each) for weight, piece, each in zip(weights, pieces, resting))


def _scatter(rest: np.ndarray, faces: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Points all over the surface, more where it is finely meshed: corners [POINTS, 3] and their shares [POINTS, 3]."""
    corners = rest[faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    weight = np.sqrt(area)
    return faces[rng.choice(len(faces), POINTS, p=weight / weight.sum())], rng.dirichlet((1, 1, 1), POINTS).astype(np.float32)


def _segment(points: np.ndarray, poses: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Which piece each point belongs to, [N]: Lloyd's algorithm where a piece predicts its points by one rigid motion."""
    compact = rng.uniform(0.01, 0.05)
    features = np.concatenate([points * 0.5, *((poses - points)[:: max(1, len(poses) // 12)])], 1)
    centres = [int(rng.integers(len(points)))]
    gaps = np.full(len(points), np.inf)
    for _ in range(count - 1):
        gaps = np.minimum(gaps, ((features - features[centres[-1]]) ** 2).sum(1))
        centres.append(int(rng.choice(len(points), p=gaps / gaps.sum())))
    piece = ((features[:, None] - features[centres]) ** 2).sum(-1).argmin(1)
    for _ in range(ROUNDS):
        wrong = []
        for k in np.unique(piece):
            mine = piece == k
            if mine.sum() < FEWEST:
                continue
            centre, there = points[mine].mean(0), poses[:, mine].mean(1)
            turns = nearest_rotations((poses[:, mine] - there[:, None]).swapaxes(1, 2) @ (points[mine] - centre))
            error = (points - centre) @ turns.swapaxes(1, 2) - (poses - there[:, None])
            wrong.append(np.einsum("pnc,pnc->n", error, error) / len(poses) + compact * ((points - centre) ** 2).sum(-1))
        piece = np.argmin(wrong, 0)
    near = cKDTree(points).sparse_distance_matrix(cKDTree(points), APART, output_type="coo_matrix")
    alike = piece[near.row] == piece[near.col]  # two legs that move alike are two pieces all the same
    _, piece = connected_components(scipy.sparse.coo_array((np.ones(alike.sum()), (near.row[alike], near.col[alike])),
                                                           (len(points), len(points))), directed=False)
    few = np.bincount(piece)[piece] < FEWEST
    piece[few] = piece[~few][cKDTree(points[~few]).query(points[few])[1]]
    return piece


def _fit(points: np.ndarray, poses: np.ndarray) -> _Piece:
    """Rest points [n, 3] and [P, n, 3]: a linear map where they say enough, else a rotation."""
    centre, places = points.mean(0), poses.mean(1)
    around, moved = points - centre, poses - places[:, None]
    covariances, hold = moved.swapaxes(1, 2) @ around, len(points) * FLAT**2
    maps = (covariances + hold * nearest_rotations(covariances)) @ np.linalg.inv(around.T @ around + hold * np.eye(3))
    return _Piece(points, maps, centre, places)


def _tree(pieces: list[_Piece]) -> tuple[list[int], np.ndarray]:
    """The pieces from the largest outwards, and the neighbour each hangs on, -1 for the largest."""
    trees = [cKDTree(piece.points) for piece in pieces]
    gaps = np.array([[tree.query(piece.points)[0].min() for tree in trees] for piece in pieces]) + 1e-3
    far = np.linalg.norm(np.array([[a.centre - b.centre for a in pieces] for b in pieces]), axis=-1)
    root = int(np.argmax([len(piece.points) for piece in pieces]))
    order, parents = breadth_first_order(minimum_spanning_tree(gaps + 0.1 * far), root, directed=False)
    return [int(k) for k in order], np.maximum(parents, -1)


def _without_a_limb(pieces: list[_Piece], order: list[int], parents: np.ndarray, rng: np.random.Generator) -> set[int]:
    """All pieces but one small branch of the tree."""
    below = {k: {k} for k in order}
    for k in reversed(order):
        if parents[k] >= 0:
            below[int(parents[k])] |= below[k]
    total = sum(len(piece.points) for piece in pieces)
    small = [k for k in order[1:] if sum(len(pieces[j].points) for j in below[k]) < LARGEST_LOST * total]
    return set(order) - (below[small[int(rng.integers(len(small)))]] if small else set())


def _twins(pieces: list[_Piece]) -> np.ndarray:
    """The piece on the other side of each, -1 where there is none."""
    centres = np.array([piece.centre for piece in pieces])
    gaps, found = cKDTree(centres).query(centres * (1, -1, 1))
    mutual = (found[found] == np.arange(len(found))) & (found != np.arange(len(found))) & (gaps < 0.15)
    return np.where(mutual, found, -1)


def _joint(parent: np.ndarray, child: np.ndarray) -> np.ndarray:
    """Half-way between the few points of both that are nearest to each other, [3]."""
    gaps, nearest = cKDTree(parent).query(child)
    few = gaps.argsort()[:5]
    return (child[few].mean(0) + parent[nearest[few]].mean(0)) / 2


def _solid(points: np.ndarray, thickness: np.ndarray, sharpness: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A superellipsoid (Barr 1981) about points: vertices [M, 3] and faces."""
    centre = points.mean(0)
    axes = np.linalg.svd(points - centre, full_matrices=False)[2]
    axes[2] = np.cross(axes[0], axes[1])
    along = (points - centre) @ axes.T
    low, high = np.quantile(along, (0.02, 0.98), axis=0)
    # Along its axis a piece reaches into its neighbours.
    sizes = np.maximum((high - low) / 2 * np.clip(thickness, (0.9, 0, 0), 9) * (1.2, 1.1, 1.1) + (0.02, 0, 0), 0.015)
    shape, faces = _superellipsoid(*sharpness)
    return centre + ((low + high) / 2 + shape * sizes) @ axes, faces


def _carried(points: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Something carried by a piece: a horn, a hat, a shell."""
    at = points[int(rng.integers(len(points)))]
    axes = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    axes[2] *= np.sign(np.linalg.det(axes))
    sizes = np.exp(rng.uniform(np.log(0.02), np.log(0.14), 3))
    shape, faces = _superellipsoid(*rng.choice(SHARPNESS, 2))
    outwards = at - points.mean(0)
    return at + outwards / max(float(np.linalg.norm(outwards)), 1e-6) * sizes.min() + (shape * sizes) @ axes, faces


def _superellipsoid(sharpness: float, across: float) -> tuple[np.ndarray, np.ndarray]:
    """Of half extents 1, its first axis from pole to pole: vertices [RINGS * SPOKES + 2, 3] and faces, outwards."""

    def power(x: np.ndarray, exponent: float) -> np.ndarray:
        return np.sign(x) * np.abs(x) ** exponent

    lat = np.linspace(-np.pi / 2, np.pi / 2, RINGS + 2)[1:-1, None]
    lon = 2 * np.pi * np.arange(SPOKES) / SPOKES
    ring = power(np.cos(lat), sharpness)
    grid = np.stack(np.broadcast_arrays(power(np.sin(lat), sharpness), ring * power(np.cos(lon), across),
                                        ring * power(np.sin(lon), across)), -1)
    vertices = np.concatenate([grid.reshape(-1, 3), [[-1, 0, 0], [1, 0, 0]]])
    start, step = (np.arange(RINGS - 1) * SPOKES)[:, None], np.arange(SPOKES)
    following = (step + 1) % SPOKES
    a, b = (start + step).ravel(), (start + following).ravel()
    last = (RINGS - 1) * SPOKES
    faces = [np.stack([a, a + SPOKES, b], 1)[:, ::-1], np.stack([b, a + SPOKES, b + SPOKES], 1)[:, ::-1],
             np.stack([following, step, np.full(SPOKES, RINGS * SPOKES)], 1),
             np.stack([last + step, last + following, np.full(SPOKES, RINGS * SPOKES + 1)], 1)]
    return vertices, np.concatenate(faces)
