"""The normal equations of one Gauss-Newton step: unknowns are a rotation vector and a shift per node.

A surface point x = sum_a (R_a m_a + w_a p_a) moves by sum_a (omega_a x arm_a + w_a shift_a), where arm_a = R_a m_a is the
node's share of the point. Nodes are numbered along the surface, so that the matrix is banded: `band[c, r - c]` is row r >= c of
column c. One thread and no GIL: the registration runs two fits side by side.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numba import njit


@njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def place_points(starts, members, levers, weights, rotations, positions):
    """The arms R_a m_a of all entries [E, 3], and the points x [P, 3]; point i owns the entries starts[i]..starts[i + 1]."""
    arms, points = np.empty((members.shape[0], 3)), np.zeros((starts.shape[0] - 1, 3))
    for i in range(points.shape[0]):
        for a in range(starts[i], starts[i + 1]):
            R, p, m = rotations[members[a]], positions[members[a]], levers[a]
            for x in range(3):
                arms[a, x] = R[x, 0] * m[0] + R[x, 1] * m[1] + R[x, 2] * m[2]
                points[i, x] += arms[a, x] + weights[a] * p[x]
    return arms, points


@njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def add_pixels(points, viewmats, Ks, targets, weights, scale, information, pull):
    """Adds picture observations of points to their 3x3 information and to their pull (its residual times the Jacobian).

    `points` [P, 3], `targets` [V, P, 2] pixels, `weights` [V, P]; Geman-McClure weight of `scale` pixels.
    """
    for v in range(targets.shape[0]):
        M, K = viewmats[v], Ks[v]
        for i in range(points.shape[0]):
            if weights[v, i] <= 0:
                continue
            x, y, z = points[i, 0], points[i, 1], points[i, 2]
            depth = M[2, 0] * x + M[2, 1] * y + M[2, 2] * z + M[2, 3]
            if depth < 1e-3:
                continue
            u = K[0, 0] * (M[0, 0] * x + M[0, 1] * y + M[0, 2] * z + M[0, 3]) / depth
            w = K[1, 1] * (M[1, 0] * x + M[1, 1] * y + M[1, 2] * z + M[1, 3]) / depth
            eu, ew = u + K[0, 2] - targets[v, i, 0], w + K[1, 2] - targets[v, i, 1]
            weight = weights[v, i] * (scale**2 / (scale**2 + eu * eu + ew * ew)) ** 2
            for a in range(3):
                ju_a = (K[0, 0] * M[0, a] - u * M[2, a]) / depth
                jw_a = (K[1, 1] * M[1, a] - w * M[2, a]) / depth
                pull[i, a] += weight * (ju_a * eu + jw_a * ew)
                for b in range(3):
                    ju_b = (K[0, 0] * M[0, b] - u * M[2, b]) / depth
                    jw_b = (K[1, 1] * M[1, b] - w * M[2, b]) / depth
                    information[i, a, b] += weight * (ju_a * ju_b + jw_a * jw_b)


@njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def add_places(points, targets, weights, scale, information, pull):
    """Adds observed positions [P, 3] in space; `weights` [P], Geman-McClure weight of `scale` world units."""
    for i in range(points.shape[0]):
        if weights[i] <= 0:
            continue
        squared = 0.0
        for a in range(3):
            squared += (points[i, a] - targets[i, a]) ** 2
        weight = weights[i] * (scale**2 / (scale**2 + squared)) ** 2
        for a in range(3):
            information[i, a, a] += weight
            pull[i, a] += weight * (points[i, a] - targets[i, a])


@njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def add_points(band, gradient, starts, slots, arms, weights, information, pull):
    """Adds all surface points: J^T information J and J^T pull. Point i owns the entries starts[i]..starts[i + 1].

    The rows of a node in J^T are [arm]x, then its weight times the identity: half of the products are plain scalings.
    """
    pushed, block = np.empty((6, 3)), np.empty((6, 6))  # block[w, u]: row u of the matrix is contiguous in the band
    for i in range(information.shape[0]):
        L = information[i]
        if L[0, 0] + L[1, 1] + L[2, 2] == 0:
            continue
        p0, p1, p2 = pull[i, 0], pull[i, 1], pull[i, 2]
        for a in range(starts[i], starts[i + 1]):
            x, y, z, weight, first = arms[a, 0], arms[a, 1], arms[a, 2], weights[a], 6 * slots[a]
            for k in range(3):
                pushed[0, k] = y * L[2, k] - z * L[1, k]
                pushed[1, k] = z * L[0, k] - x * L[2, k]
                pushed[2, k] = x * L[1, k] - y * L[0, k]
                pushed[3, k], pushed[4, k], pushed[5, k] = weight * L[0, k], weight * L[1, k], weight * L[2, k]
            gradient[first] += y * p2 - z * p1
            gradient[first + 1] += z * p0 - x * p2
            gradient[first + 2] += x * p1 - y * p0
            gradient[first + 3] += weight * p0
            gradient[first + 4] += weight * p1
            gradient[first + 5] += weight * p2
            for c in range(starts[i], starts[i + 1]):
                second = 6 * slots[c]
                if second > first:
                    continue
                cx, cy, cz, other = arms[c, 0], arms[c, 1], arms[c, 2], weights[c]
                for u in range(6):
                    block[0, u] = cy * pushed[u, 2] - cz * pushed[u, 1]
                    block[1, u] = cz * pushed[u, 0] - cx * pushed[u, 2]
                    block[2, u] = cx * pushed[u, 1] - cy * pushed[u, 0]
                    block[3, u], block[4, u], block[5, u] = other * pushed[u, 0], other * pushed[u, 1], other * pushed[u, 2]
                for w in range(6):
                    column = band[second + w]
                    for u in range(6 if second < first else 0):
                        column[first - second - w + u] += block[w, u]
                    for u in range(w, 6 if second == first else 0):
                        column[u - w] += block[w, u]


@njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def _motion_rows(arm, weight, out):
    """The 6 rows of a node's Jacobian, transposed: what turning and shifting the node does to the point; [6, 3]."""
    out[:] = 0
    out[0, 1], out[0, 2] = -arm[2], arm[1]
    out[1, 0], out[1, 2] = arm[2], -arm[0]
    out[2, 0], out[2, 1] = -arm[1], arm[0]
    out[3, 0] = out[4, 1] = out[5, 2] = weight


@njit(cache=True, fastmath=True, nogil=True, error_model="numpy")
def add_edges(band, gradient, tails, heads, spokes, residuals, weights):
    """Adds the as-rigid-as-possible energy sum w |R_i d_ij - (p_j - p_i)|^2; `spokes` are R_i d_ij [E, 3]."""
    tail, rows = np.empty((6, 3)), np.zeros((12, 3))
    rows[9, 0] = rows[10, 1] = rows[11, 2] = -1
    index = np.empty(12, np.int64)
    for e in range(tails.shape[0]):
        _motion_rows(spokes[e], 1.0, tail)
        rows[:6] = tail
        for u in range(6):
            index[u], index[6 + u] = 6 * tails[e] + u, 6 * heads[e] + u
        for u in range(12):
            gradient[index[u]] += weights[e] * (rows[u, 0] * residuals[e, 0] + rows[u, 1] * residuals[e, 1]
                                                + rows[u, 2] * residuals[e, 2])
            for w in range(12):
                row, column = index[u], index[w]
                if row >= column:
                    band[column, row - column] += weights[e] * (rows[u, 0] * rows[w, 0] + rows[u, 1] * rows[w, 1]
                                                                + rows[u, 2] * rows[w, 2])


def solve_band(band: np.ndarray, gradient: np.ndarray, damping: float, scale: np.ndarray) -> np.ndarray:
    """The step -(H + damping D)^-1 g; H is `band` [n, width], D is diagonal, `scale` [n], and g is [n].

    All nan where that is not positive definite. Levenberg and Marquardt's D is the diagonal of H; without its stiff joints, what
    they join may move together freely.

    Solved in single precision: the next step corrects what that leaves.
    """
    damped = band.astype(np.float32)
    damped[:, 0] += damping * (1 + scale.astype(np.float32)) + 1e-6
    try:
        step = scipy.linalg.solveh_banded(damped.T, gradient.astype(np.float32), overwrite_ab=True, overwrite_b=True, lower=True,
                                          check_finite=False)
    except np.linalg.LinAlgError:
        return np.full_like(gradient, np.nan)
    return -step.astype(np.float64)
