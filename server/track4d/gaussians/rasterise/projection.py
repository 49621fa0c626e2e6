"""Gaussians to screen ellipses, and the way back for gradients (EWA splatting, Zwicker et al. 2001).

A Gaussian with mean m, rotation R(q) and scales s has the covariance S = M M^T with M = R(q) diag(s). A camera x = W
m + t with focal lengths f sees it, to first order, as the 2D Gaussian with covariance

    C = T S T^T + EPS2D I,   T = J W,   T_0 = f_x / z (W_0 - u W_2),   T_1 = f_y / z (W_1 - v W_2)

where W_k are rows of W and (u, v) = (x / z, y / z) clamped to a slightly widened picture, so that Gaussians beside
the camera don't blow up. The blend needs the conic C^-1 = [[a, b], [b, c]], the centre in pixels and the depth z.

The kernels work on blocks of 16 Gaussians held as columns in one 1-D buffer (`block[FIELD + lane]`). Offsets are
compile-time constants and unsigned, and the inner loop has exactly 16 turns: that is the shape which LLVM turns into
vector code without alias checks or wrap-around of negative indices.
"""

import math

import numpy as np
from numba import prange

from .constants import ALPHA_CUT, CLAMP_MARGIN, EPS2D, NEAR
from .kernels import helper, kernel, parallel_kernel
from .lanes import LANES

BLOCKS_PER_TASK = 16  # enough work for a thread to be worth its start

_ZERO, _HALF, _ONE, _TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
_NEAR, _EPS2D = np.float32(NEAR), np.float32(EPS2D)
_LOG_CUT = np.float32(math.log(ALPHA_CUT))
_TINY, _TINY_DETERMINANT = np.float32(1e-30), np.float32(1e-10)


def _fields(first: int, count: int) -> list[np.uint64]:
    """Offsets of `count` columns of a block, from column `first` on."""
    return [np.uint64(LANES * (first + k)) for k in range(count)]


# The columns of a block: first what goes in, then what comes out, then gradients.
MEAN_X, MEAN_Y, MEAN_Z = _fields(0, 3)
QUAT_W, QUAT_X, QUAT_Y, QUAT_Z = _fields(3, 4)
SCALE_X, SCALE_Y, SCALE_Z = _fields(7, 3)
(LOG_OPACITY,) = _fields(10, 1)
COV_XX, COV_XY, COV_XZ, COV_YY, COV_YZ, COV_ZZ = _fields(11, 6)
SCREEN_X, SCREEN_Y, CONIC_A, CONIC_B, CONIC_C, DEPTH = _fields(17, 6)
LEFT, RIGHT, TOP, BOTTOM = _fields(23, 4)
D_COV_XX, D_COV_XY, D_COV_XZ, D_COV_YY, D_COV_YZ, D_COV_ZZ = _fields(27, 6)
D_MEAN_X, D_MEAN_Y, D_MEAN_Z = _fields(33, 3)
D_SCALE_X, D_SCALE_Y, D_SCALE_Z = _fields(36, 3)
D_QUAT_W, D_QUAT_X, D_QUAT_Y, D_QUAT_Z = _fields(39, 4)
BLOCK_SIZE = 43 * LANES
SUMS_START, SUMS_STOP = int(D_COV_XX), int(D_SCALE_X)  # the gradients that add up over the views

SCREEN_GRADIENTS = 9  # columns that the blend hands back: screen x, y; conic a, b, c; red, green, blue; opacity


@helper
def _unit_quaternion(block, i):
    """The quaternion of one lane over its length, and one over that length."""
    w, x, y, z = block[QUAT_W + i], block[QUAT_X + i], block[QUAT_Y + i], block[QUAT_Z + i]
    inverse = _ONE / np.float32(math.sqrt(w * w + x * x + y * y + z * z + _TINY))
    return w * inverse, x * inverse, y * inverse, z * inverse, inverse


@helper
def _rotation(w, x, y, z):
    """Rows of the rotation matrix of a unit quaternion."""
    return (_ONE - _TWO * (y * y + z * z), _TWO * (x * y - w * z), _TWO * (x * z + w * y),
            _TWO * (x * y + w * z), _ONE - _TWO * (x * x + z * z), _TWO * (y * z - w * x),
            _TWO * (x * z - w * y), _TWO * (y * z + w * x), _ONE - _TWO * (x * x + y * y))


@kernel
def covariances(block):
    """COV = M M^T, M = R(q) diag(s), for 16 Gaussians."""
    for lane in range(LANES):
        i = np.uint64(lane)
        w, x, y, z, _ = _unit_quaternion(block, i)
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(w, x, y, z)
        sx, sy, sz = block[SCALE_X + i], block[SCALE_Y + i], block[SCALE_Z + i]
        m00, m01, m02 = r00 * sx, r01 * sy, r02 * sz
        m10, m11, m12 = r10 * sx, r11 * sy, r12 * sz
        m20, m21, m22 = r20 * sx, r21 * sy, r22 * sz
        block[COV_XX + i] = m00 * m00 + m01 * m01 + m02 * m02
        block[COV_XY + i] = m00 * m10 + m01 * m11 + m02 * m12
        block[COV_XZ + i] = m00 * m20 + m01 * m21 + m02 * m22
        block[COV_YY + i] = m10 * m10 + m11 * m11 + m12 * m12
        block[COV_YZ + i] = m10 * m20 + m11 * m21 + m12 * m22
        block[COV_ZZ + i] = m20 * m20 + m21 * m21 + m22 * m22


@helper
def _load_camera(viewmat, K, size):
    """Rotation, translation, intrinsics, and the limits of x / z and y / z, as scalars."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    margin_x = np.float32(CLAMP_MARGIN) * _HALF * size / fx
    margin_y = np.float32(CLAMP_MARGIN) * _HALF * size / fy
    return (viewmat[0, 0], viewmat[0, 1], viewmat[0, 2], viewmat[1, 0], viewmat[1, 1], viewmat[1, 2],
            viewmat[2, 0], viewmat[2, 1], viewmat[2, 2], viewmat[0, 3], viewmat[1, 3], viewmat[2, 3], fx, fy, cx, cy,
            -cx / fx - margin_x, (size - cx) / fx + margin_x, -cy / fy - margin_y, (size - cy) / fy + margin_y)


@helper
def _camera_point(block, i, w00, w01, w02, w10, w11, w12, w20, w21, w22, tx, ty, tz):
    """One mean in camera space: x / z, y / z, z and 1 / z; the 1 / z is finite for Gaussians that aren't drawn."""
    mx, my, mz = block[MEAN_X + i], block[MEAN_Y + i], block[MEAN_Z + i]
    x = w00 * mx + w01 * my + w02 * mz + tx
    y = w10 * mx + w11 * my + w12 * mz + ty
    z = w20 * mx + w21 * my + w22 * mz + tz
    inverse = _ONE / (z if z > _NEAR else _ONE)
    return x * inverse, y * inverse, z, inverse


@helper
def _times_covariance(block, i, x, y, z):
    """S (x, y, z) for the covariance S of one lane."""
    xx, xy, xz = block[COV_XX + i], block[COV_XY + i], block[COV_XZ + i]
    yy, yz, zz = block[COV_YY + i], block[COV_YZ + i], block[COV_ZZ + i]
    return xx * x + xy * y + xz * z, xy * x + yy * y + yz * z, xz * x + yz * y + zz * z


@helper
def _conic(t00, t01, t02, t10, t11, t12, u00, u01, u02, u10, u11, u12):
    """The inverse of C = T U^T + EPS2D I, for U = T S: its entries a, b, c; and the entries xx, yy of C."""
    xx = t00 * u00 + t01 * u01 + t02 * u02 + _EPS2D
    xy = t00 * u10 + t01 * u11 + t02 * u12
    yy = t10 * u10 + t11 * u11 + t12 * u12 + _EPS2D
    inverse = _ONE / max(xx * yy - xy * xy, _TINY_DETERMINANT)
    return yy * inverse, -xy * inverse, xx * inverse, xx, yy


@helper
def _round_down(x):
    """The whole number not above x >= 0, as a float."""
    return np.float32(np.int32(x))


@helper
def _round_up(x):
    """The whole number not below x >= 0, as a float."""
    down = np.float32(np.int32(x))
    return down + _ONE if x > down else down


@kernel
def project_block(block, viewmat, K, size):
    """SCREEN, CONIC and DEPTH of 16 Gaussians in one view, and the box of pixels where alpha >= ALPHA_CUT.

    The box is LEFT <= x < RIGHT, TOP <= y < BOTTOM in whole pixels; RIGHT is 0 for a Gaussian that can't be seen.
    """
    (w00, w01, w02, w10, w11, w12, w20, w21, w22, tx, ty, tz, fx, fy, cx, cy,
     left, right, top, bottom) = _load_camera(viewmat, K, size)
    for lane in range(LANES):
        i = np.uint64(lane)
        x, y, z, inverse = _camera_point(block, i, w00, w01, w02, w10, w11, w12, w20, w21, w22, tx, ty, tz)
        u, v = max(min(x, right), left), max(min(y, bottom), top)
        ax, ay = fx * inverse, fy * inverse
        t00, t01, t02 = ax * (w00 - u * w20), ax * (w01 - u * w21), ax * (w02 - u * w22)
        t10, t11, t12 = ay * (w10 - v * w20), ay * (w11 - v * w21), ay * (w12 - v * w22)
        u00, u01, u02 = _times_covariance(block, i, t00, t01, t02)
        u10, u11, u12 = _times_covariance(block, i, t10, t11, t12)
        a, b, c, xx, yy = _conic(t00, t01, t02, t10, t11, t12, u00, u01, u02, u10, u11, u12)
        spread = _TWO * max(block[LOG_OPACITY + i] - _LOG_CUT, _ZERO)
        half_width, half_height = np.float32(math.sqrt(spread * xx)), np.float32(math.sqrt(spread * yy))
        x, y = fx * x + cx, fy * y + cy
        seen = (z > _NEAR) & (block[LOG_OPACITY + i] >= _LOG_CUT) & (a * c - b * b > _ZERO)
        block[LEFT + i] = _round_up(min(max(x - half_width - _HALF, _ZERO), size))
        block[RIGHT + i] = _round_down(min(max(x + half_width + _HALF, _ZERO), size)) if seen else _ZERO
        block[TOP + i] = _round_up(min(max(y - half_height - _HALF, _ZERO), size))
        block[BOTTOM + i] = _round_down(min(max(y + half_height + _HALF, _ZERO), size))
        block[SCREEN_X + i] = x
        block[SCREEN_Y + i] = y
        block[CONIC_A + i] = a
        block[CONIC_B + i] = b
        block[CONIC_C + i] = c
        block[DEPTH + i] = z


@kernel
def project_block_backward(block, viewmat, K, size):
    """Adds one view's share to D_MEAN and D_COV, from the gradients held in SCREEN and CONIC.

    With G the gradient of the conic as a symmetric matrix (the one of b halved), that of C is P = -C^-1 G C^-1, that of
    S is T^T P T, and that of T is 2 P T S. T depends on the mean through 1 / z and, where not clamped, through u, v.
    """
    (w00, w01, w02, w10, w11, w12, w20, w21, w22, tx, ty, tz, fx, fy, cx, cy,
     left, right, top, bottom) = _load_camera(viewmat, K, size)
    for lane in range(LANES):
        i = np.uint64(lane)
        x, y, z, inverse = _camera_point(block, i, w00, w01, w02, w10, w11, w12, w20, w21, w22, tx, ty, tz)
        u, v = max(min(x, right), left), max(min(y, bottom), top)
        ax, ay = fx * inverse, fy * inverse
        t00, t01, t02 = ax * (w00 - u * w20), ax * (w01 - u * w21), ax * (w02 - u * w22)
        t10, t11, t12 = ay * (w10 - v * w20), ay * (w11 - v * w21), ay * (w12 - v * w22)
        u00, u01, u02 = _times_covariance(block, i, t00, t01, t02)
        u10, u11, u12 = _times_covariance(block, i, t10, t11, t12)
        a, b, c, _, _ = _conic(t00, t01, t02, t10, t11, t12, u00, u01, u02, u10, u11, u12)

        # P = -C^-1 G C^-1 = [[p_xx, p_xy / 2], [p_xy / 2, p_yy]]
        g_a, g_b, g_c = block[CONIC_A + i], _HALF * block[CONIC_B + i], block[CONIC_C + i]
        h00, h01 = a * g_a + b * g_b, a * g_b + b * g_c
        h10, h11 = b * g_a + c * g_b, b * g_b + c * g_c
        p_xx, p_xy, p_yy = -(h00 * a + h01 * b), -_TWO * (h00 * b + h01 * c), -(h10 * b + h11 * c)

        # T^T P T; an entry off the diagonal stands for two, so its sum below is taken once
        half = _HALF * p_xy
        block[D_COV_XX + i] += p_xx * t00 * t00 + p_xy * t00 * t10 + p_yy * t10 * t10
        block[D_COV_XY + i] += p_xx * t00 * t01 + half * (t00 * t11 + t01 * t10) + p_yy * t10 * t11
        block[D_COV_XZ + i] += p_xx * t00 * t02 + half * (t00 * t12 + t02 * t10) + p_yy * t10 * t12
        block[D_COV_YY + i] += p_xx * t01 * t01 + p_xy * t01 * t11 + p_yy * t11 * t11
        block[D_COV_YZ + i] += p_xx * t01 * t02 + half * (t01 * t12 + t02 * t11) + p_yy * t11 * t12
        block[D_COV_ZZ + i] += p_xx * t02 * t02 + p_xy * t02 * t12 + p_yy * t12 * t12

        # 2 P T S, then through T to u, v and z
        d00, d01, d02 = _TWO * p_xx * u00 + p_xy * u10, _TWO * p_xx * u01 + p_xy * u11, _TWO * p_xx * u02 + p_xy * u12
        d10, d11, d12 = _TWO * p_yy * u10 + p_xy * u00, _TWO * p_yy * u11 + p_xy * u01, _TWO * p_yy * u12 + p_xy * u02
        d_u = -ax * (d00 * w20 + d01 * w21 + d02 * w22)
        d_v = -ay * (d10 * w20 + d11 * w21 + d12 * w22)
        d_scale = d00 * t00 + d01 * t01 + d02 * t02 + d10 * t10 + d11 * t11 + d12 * t12
        d_u = d_u if u == x else _ZERO
        d_v = d_v if v == y else _ZERO
        d_x = (d_u + fx * block[SCREEN_X + i]) * inverse
        d_y = (d_v + fy * block[SCREEN_Y + i]) * inverse
        d_z = -(d_scale * inverse + d_x * x + d_y * y)
        block[D_MEAN_X + i] += w00 * d_x + w10 * d_y + w20 * d_z
        block[D_MEAN_Y + i] += w01 * d_x + w11 * d_y + w21 * d_z
        block[D_MEAN_Z + i] += w02 * d_x + w12 * d_y + w22 * d_z


@kernel
def covariances_backward(block):
    """D_SCALE and D_QUAT from D_COV: the gradient of M is 2 D_COV M."""
    for lane in range(LANES):
        i = np.uint64(lane)
        w, x, y, z, inverse = _unit_quaternion(block, i)
        r00, r01, r02, r10, r11, r12, r20, r21, r22 = _rotation(w, x, y, z)
        sx, sy, sz = block[SCALE_X + i], block[SCALE_Y + i], block[SCALE_Z + i]
        xx, xy, xz = block[D_COV_XX + i], block[D_COV_XY + i], block[D_COV_XZ + i]
        yy, yz, zz = block[D_COV_YY + i], block[D_COV_YZ + i], block[D_COV_ZZ + i]
        # columns of 2 D_COV R; times the scales they are the gradient of M
        e00, e10, e20 = xx * r00 + xy * r10 + xz * r20, xy * r00 + yy * r10 + yz * r20, xz * r00 + yz * r10 + zz * r20
        e01, e11, e21 = xx * r01 + xy * r11 + xz * r21, xy * r01 + yy * r11 + yz * r21, xz * r01 + yz * r11 + zz * r21
        e02, e12, e22 = xx * r02 + xy * r12 + xz * r22, xy * r02 + yy * r12 + yz * r22, xz * r02 + yz * r12 + zz * r22
        two_x, two_y, two_z = _TWO * sx, _TWO * sy, _TWO * sz
        block[D_SCALE_X + i] = two_x * (e00 * r00 + e10 * r10 + e20 * r20)
        block[D_SCALE_Y + i] = two_y * (e01 * r01 + e11 * r11 + e21 * r21)
        block[D_SCALE_Z + i] = two_z * (e02 * r02 + e12 * r12 + e22 * r22)
        # gradient of R, then of the unit quaternion, then of the quaternion as given (its length doesn't matter)
        two_x, two_y, two_z = two_x * sx, two_y * sy, two_z * sz
        g00, g10, g20 = e00 * two_x, e10 * two_x, e20 * two_x
        g01, g11, g21 = e01 * two_y, e11 * two_y, e21 * two_y
        g02, g12, g22 = e02 * two_z, e12 * two_z, e22 * two_z
        d_w = _TWO * (x * (g21 - g12) + y * (g02 - g20) + z * (g10 - g01))
        d_x = _TWO * (-_TWO * x * (g11 + g22) + y * (g01 + g10) + z * (g02 + g20) + w * (g21 - g12))
        d_y = _TWO * (x * (g01 + g10) - _TWO * y * (g00 + g22) + z * (g12 + g21) + w * (g02 - g20))
        d_z = _TWO * (x * (g02 + g20) + y * (g12 + g21) - _TWO * z * (g00 + g11) + w * (g10 - g01))
        along = d_w * w + d_x * x + d_y * y + d_z * z
        block[D_QUAT_W + i] = (d_w - along * w) * inverse
        block[D_QUAT_X + i] = (d_x - along * x) * inverse
        block[D_QUAT_Y + i] = (d_y - along * y) * inverse
        block[D_QUAT_Z + i] = (d_z - along * z) * inverse


@helper
def _load(block, field, values, first, columns):
    """16 rows of `values` [N, C] from `first` on into fields from `field` on; past the end the last row is repeated."""
    last = np.uint64(values.shape[0] - 1)
    for lane in range(LANES):
        row = min(np.uint64(first) + np.uint64(lane), last)
        for k in range(columns):
            block[field + np.uint64(LANES * k + lane)] = values[row, np.uint64(k)]


@helper
def _store(block, field, values, first, count, columns):
    """The first `count` lanes of fields from `field` on into rows of `values` [N, C]."""
    for lane in range(count):
        row = np.uint64(first + lane)
        for k in range(columns):
            values[row, np.uint64(k)] = block[field + np.uint64(LANES * k + lane)]


@kernel
def load_gaussians(block, means, quats, scales, first):
    """Fills a block with the Gaussians from row `first` of [N, 3], [N, 4] and [N, 3] on, and with their covariances."""
    _load(block, MEAN_X, means, first, 3)
    _load(block, QUAT_W, quats, first, 4)
    _load(block, SCALE_X, scales, first, 3)
    covariances(block)


@kernel
def load_opacities(block, log_opacities, first):
    """Adds logarithms of opacities [N, 1] to a block."""
    _load(block, LOG_OPACITY, log_opacities, first, 1)


@parallel_kernel
def project_backward(means, quats, scales, viewmats, Ks, size, d_screen, d_means, d_quats, d_scales, d_colors,
                     d_opacities):
    """Gradients of the Gaussians from those on the screen, summed over the pictures that share them.

    Args:
        means: [F, N, 3]; quats: [F, N, 4]; scales: [F or 1, N, 3].
        viewmats: [V, 4, 4]; Ks: [V, 3, 3]; size: float32, in pixels.
        d_screen: [F * V, N, 9], see `SCREEN_GRADIENTS`.
        d_means: [F, N, 3] out; d_quats: [F, N, 4] out.
        d_scales: [F or 1, N, 3] in and out, added to; d_colors: [F or 1, V or 1, N, 3] likewise; d_opacities: [N] likewise, of
            what the last column of `d_screen` is the gradient of.
    """
    frames, gaussians, _ = means.shape
    views = viewmats.shape[0]
    blocks = (gaussians + LANES - 1) // LANES
    for task in prange((blocks + BLOCKS_PER_TASK - 1) // BLOCKS_PER_TASK):
        block = np.empty(BLOCK_SIZE, np.float32)
        for k in range(task * BLOCKS_PER_TASK, min(blocks, (task + 1) * BLOCKS_PER_TASK)):
            first = k * LANES
            count = min(LANES, gaussians - first)
            for f in range(frames):
                own_scales = min(f, scales.shape[0] - 1)
                load_gaussians(block, means[f], quats[f], scales[own_scales], first)
                for j in range(SUMS_START, SUMS_STOP):
                    block[j] = _ZERO
                for v in range(views):
                    gradients = d_screen[f * views + v]
                    _load(block, SCREEN_X, gradients, first, 5)
                    project_block_backward(block, viewmats[v], Ks[v], size)
                    d_color = d_colors[min(f, d_colors.shape[0] - 1), min(v, d_colors.shape[1] - 1)]
                    for n in range(first, first + count):
                        for channel in range(3):
                            d_color[n, channel] += gradients[n, 5 + channel]
                        d_opacities[n] += gradients[n, 8]
                covariances_backward(block)
                _store(block, D_MEAN_X, d_means[f], first, count, 3)
                _store(block, D_QUAT_W, d_quats[f], first, count, 4)
                d_scale = d_scales[own_scales]
                for n in range(count):
                    for axis in range(3):
                        d_scale[first + n, axis] += block[D_SCALE_X + np.uint64(LANES * axis + n)]
