"""Screen ellipses to pictures on the CPU, forward and backward; one thread a picture.

A picture is drawn in four steps: drop what can't be seen and sort the rest by depth; list, for each tile of 64 x 64
pixels, the splats that touch it, front to back; blend them. At a pixel at distance d from its centre, a splat with
opacity o and conic [[a, b], [b, c]] has

    alpha = min(o exp(-(a dx^2 + 2 b dx dy + c dy^2) / 2), ALPHA_MAX),   0 below ALPHA_CUT
    weight = alpha T,   then T <- T (1 - alpha)

with T the light that still gets through. The exponent is kept in powers of two, so that o is one more summand:
alpha = 2^(log2 o - (a/2 dx^2 + b dx dy + c/2 dy^2) log2 e).

Backward runs front to back as well. With q = colour . d_picture and R = the sum of weight q over what lies behind
(including the background), d alpha = T q - R / (1 - alpha); R starts as picture . d_picture - T_end d_coverage and
shrinks splat by splat. So nothing has to be stored per pixel and no T has to be divided back. The gradients of centre
and conic are the six moments of h = alpha d_alpha over the pixels: 1, dx, dy, dx^2, dx dy, dy^2.

Splats are visited splat by splat, not pixel by pixel, in strips of 16 pixels that start where the splat's box starts.
Those strips (`blend_strip`, `blend_strip_backward`) are where the time goes. They are vector code as long as three
things hold: the loop has exactly 16 turns; all planes of a tile lie in one 1-D buffer at constant unsigned offsets;
and exp2 is arithmetic instead of a call. `tests/server/test_rasterise.py` looks at the machine code.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic

from .constants import ALPHA_CUT, ALPHA_MAX, NEAR, TRANSMITTANCE_STOP
from .projection import SCREEN_GRADIENTS

LANES = 16
TILE = 64  # pixels; 16 and 32 were slower, as more splats then lie in several tiles
TILE_SHIFT = 6  # TILE = 1 << TILE_SHIFT
PITCH = TILE + LANES  # a strip may run over the tile's edge
CHECK_EVERY = 64  # splats between two looks at whether a tile is opaque

SPLAT = np.dtype({  # one cache line
    "names": ["x", "y", "a", "b", "c", "log_opacity", "red", "green", "blue",
              "left", "right", "top", "bottom", "index"],
    "formats": [np.float32] * 9 + [np.int32] * 5,
    "itemsize": 64,
})

_ZERO, _HALF, _ONE = np.float32(0), np.float32(0.5), np.float32(1)
_LOG2_E, _LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
_LOG_CUT, _LOG2_CUT = np.float32(math.log(ALPHA_CUT)), np.float32(math.log2(ALPHA_CUT))
_MAX, _STOP, _NEAR = np.float32(ALPHA_MAX), np.float32(TRANSMITTANCE_STOP), np.float32(NEAR)
_LOWEST_EXPONENT = np.float32(-60)

# Offsets of the planes in one row of a tile. Forward: T (negative once the pixel is opaque), red, green, blue.
# Backward: T (0 once the pixel is opaque), R, and the picture's gradient.
PLANE_1, PLANE_2, PLANE_3, PLANE_4 = (np.uint64(PITCH * k) for k in range(1, 5))
FORWARD_ROW, BACKWARD_ROW = 4 * PITCH, 5 * PITCH

# Offsets in the sums over the rows of a strip: colour, and h, h dy, h dy^2 (the powers of dx are the same in all rows).
SUM_RED, SUM_GREEN, SUM_BLUE, SUM_H, SUM_HY, SUM_HYY = (np.uint64(LANES * k) for k in range(6))
SUMS = 6 * LANES

_helper = njit(fastmath=True, error_model="numpy", inline="always")
_kernel = njit(fastmath=True, error_model="numpy", cache=True)
_parallel_kernel = njit(parallel=True, fastmath=True, error_model="numpy", cache=True, nogil=True)


@intrinsic
def _int_as_float(typing_context, bits):
    """The float32 with these 32 bits."""
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())
    return types.float32(types.int32), codegen


@intrinsic
def _float_as_int(typing_context, value):
    """The 32 bits of a float32."""
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))
    return types.int32(types.float32), codegen


@_helper
def _exp2(x):
    """2^x for -126 < x <= 0, to 4e-7: a polynomial on [-1/2, 1/2], shifted by adding to the exponent bits."""
    whole = np.int32(x - _HALF)
    rest = x - np.float32(whole)
    p = rest * np.float32(1.3333558e-3) + np.float32(9.6181291e-3)
    p = p * rest + np.float32(5.5504109e-2)
    p = p * rest + np.float32(2.4022651e-1)
    p = p * rest + np.float32(6.9314718e-1)
    p = p * rest + _ONE
    bits = _float_as_int(p) + np.int32(whole << np.int32(23))  # type: ignore[call-arg]
    return _int_as_float(np.int32(bits))  # type: ignore[call-arg]


@_kernel
def _select(screen, conics, depths, log_opacities, colors, size, splats, keys):
    """Fills `splats` and their depth keys with what may touch the picture; returns how many.

    The box holds every pixel centre where alpha >= ALPHA_CUT. Bits of positive floats sort like the floats.
    """
    count, edge = 0, np.float32(size)
    for n in range(log_opacities.shape[0]):
        log_opacity, depth = log_opacities[n], depths[n, 0]
        if log_opacity < _LOG_CUT or not depth > _NEAR:
            continue
        a, b, c = conics[n, 0], conics[n, 1], conics[n, 2]
        determinant = a * c - b * b
        if not determinant > _ZERO:
            continue
        spread = np.float32(2) * (log_opacity - _LOG_CUT) / determinant
        half_width, half_height = np.float32(math.sqrt(spread * c)), np.float32(math.sqrt(spread * a))
        x, y = screen[n, 0], screen[n, 1]
        left = np.int32(min(max(math.ceil(x - half_width - _HALF), _ZERO), edge))
        right = np.int32(min(max(math.floor(x + half_width + _HALF), _ZERO), edge))
        top = np.int32(min(max(math.ceil(y - half_height - _HALF), _ZERO), edge))
        bottom = np.int32(min(max(math.floor(y + half_height + _HALF), _ZERO), edge))
        if left >= right or top >= bottom:
            continue
        splat = splats[count]
        splat.x, splat.y = x, y
        splat.a, splat.b, splat.c = _HALF * a * _LOG2_E, b * _LOG2_E, _HALF * c * _LOG2_E
        splat.log_opacity = log_opacity * _LOG2_E
        splat.red, splat.green, splat.blue = colors[n, 0], colors[n, 1], colors[n, 2]
        splat.left, splat.right, splat.top, splat.bottom = left, right, top, bottom
        splat.index = n
        keys[count] = np.uint32(_float_as_int(depth))  # type: ignore[call-arg]
        count += 1
    return count


@_kernel
def _order(keys, count):
    """Indices that sort `keys` [count] uint32; a stable radix sort, three passes of 11 bits."""
    histograms = np.zeros((3, 2048), np.int32)
    for n in range(count):
        key = keys[n]
        histograms[0, key & np.uint32(2047)] += 1
        histograms[1, (key >> np.uint32(11)) & np.uint32(2047)] += 1
        histograms[2, key >> np.uint32(22)] += 1
    order, order_out = np.arange(count).astype(np.int32), np.empty(count, np.int32)
    keys_in, keys_out = keys, np.empty(count, np.uint32)
    for digit in range(3):
        total = 0
        for k in range(2048):
            here = histograms[digit, k]
            histograms[digit, k] = total
            total += here
        shift = np.uint32(11 * digit)
        for n in range(count):
            k = (keys_in[n] >> shift) & np.uint32(2047)
            place = histograms[digit, k]
            histograms[digit, k] = place + 1
            keys_out[place] = keys_in[n]
            order_out[place] = order[n]
        keys_in, keys_out = keys_out, keys_in
        order, order_out = order_out, order
    return order


@_kernel
def _sorted_splats(screen, conics, depths, log_opacities, colors, size, splats):
    """Fills the first rows of `splats` with what may touch the picture, front to back; returns how many."""
    gaussians = log_opacities.shape[0]
    unsorted, keys = np.empty(gaussians, SPLAT), np.empty(gaussians, np.uint32)
    count = _select(screen, conics, depths, log_opacities, colors, size, unsorted, keys)
    order = _order(keys, count)
    for k in range(count):
        splats[k] = unsorted[order[k]]
    return count


@_kernel
def _tile_lists(splats, tiles_across):
    """The splats of each tile, front to back.

    Returns:
        starts [tiles + 1] and entries [E] int32: tile t has the splats entries[starts[t]:starts[t + 1]].
    """
    starts = np.zeros(tiles_across * tiles_across + 1, np.int32)
    for k in range(splats.shape[0]):
        splat = splats[k]
        for row in range(splat.top >> TILE_SHIFT, ((splat.bottom - 1) >> TILE_SHIFT) + 1):
            for column in range(splat.left >> TILE_SHIFT, ((splat.right - 1) >> TILE_SHIFT) + 1):
                starts[row * tiles_across + column + 1] += 1
    for tile in range(tiles_across * tiles_across):
        starts[tile + 1] += starts[tile]
    entries, fill = np.empty(starts[-1], np.int32), starts.copy()
    for k in range(splats.shape[0]):
        splat = splats[k]
        for row in range(splat.top >> TILE_SHIFT, ((splat.bottom - 1) >> TILE_SHIFT) + 1):
            for column in range(splat.left >> TILE_SHIFT, ((splat.right - 1) >> TILE_SHIFT) + 1):
                tile = row * tiles_across + column
                entries[fill[tile]] = k
                fill[tile] += 1
    return starts, entries


@_kernel
def blend_strip(tile, start, dx, dy, a, b, c, log_opacity, red, green, blue):
    """Blends one splat into 16 pixels of one row; `dx` belongs to the first, `start` is where that lies in `tile`."""
    slope = b * dy
    top = log_opacity - c * dy * dy
    start = np.uint64(start)
    for lane in range(LANES):
        i = start + np.uint64(lane)
        x = dx + np.float32(lane)
        exponent = top - (a * x + slope) * x
        alpha = min(_exp2(max(exponent, _LOWEST_EXPONENT)), _MAX)
        alpha = alpha if exponent >= _LOG2_CUT else _ZERO
        light = tile[i]
        weight = alpha * max(light, _ZERO)
        left_over = max(light, _ZERO) - weight
        stop = left_over <= _STOP
        weight = _ZERO if stop else weight
        tile[i] = -abs(light) if stop else left_over
        tile[i + PLANE_1] += weight * red
        tile[i + PLANE_2] += weight * green
        tile[i + PLANE_3] += weight * blue


@_kernel
def blend_strip_backward(tile, start, sums, dx, dy, a, b, c, log_opacity, red, green, blue):
    """Adds the gradients of one splat from 16 pixels of one row to `sums`, and takes its share out of R."""
    slope = b * dy
    top = log_opacity - c * dy * dy
    start = np.uint64(start)
    for lane in range(LANES):
        j = np.uint64(lane)
        i = start + j
        x = dx + np.float32(lane)
        exponent = top - (a * x + slope) * x
        unclamped = _exp2(max(exponent, _LOWEST_EXPONENT))
        alpha = min(unclamped, _MAX)
        alpha = alpha if exponent >= _LOG2_CUT else _ZERO
        light = tile[i]
        weight = alpha * light
        left_over = light - weight
        stop = left_over <= _STOP
        tile[i] = _ZERO if stop else left_over
        weight = _ZERO if stop else weight
        d_red, d_green, d_blue = tile[i + PLANE_2], tile[i + PLANE_3], tile[i + PLANE_4]
        own = weight * (d_red * red + d_green * green + d_blue * blue)
        behind = tile[i + PLANE_1] - own
        tile[i + PLANE_1] = behind
        h = own - alpha * behind / (_ONE - alpha)
        h = _ZERO if stop else h
        h = _ZERO if unclamped > _MAX else h
        sums[SUM_RED + j] += weight * d_red
        sums[SUM_GREEN + j] += weight * d_green
        sums[SUM_BLUE + j] += weight * d_blue
        hy = h * dy
        sums[SUM_H + j] += h
        sums[SUM_HY + j] += hy
        sums[SUM_HYY + j] += hy * dy


@_kernel
def _opaque(tile, height, width, row_length):
    """Whether no pixel of the tile lets light through any more."""
    for y in range(height):
        most = _ZERO
        for x in range(width):
            most = max(most, tile[y * row_length + x])
        if most > _ZERO:
            return False
    return True


@_kernel
def _blend_tile(tile, tile_x, tile_y, width, height, splats, entries):
    """Blends the splats `entries` into a tile, until it is opaque."""
    for y in range(height):
        row = y * FORWARD_ROW
        for x in range(FORWARD_ROW):
            tile[row + x] = _ONE if x < width else _ZERO
    for e in range(entries.shape[0]):
        splat = splats[entries[e]]
        left, right = max(splat.left - tile_x, 0), min(splat.right - tile_x, width)
        top, bottom = max(splat.top - tile_y, 0), min(splat.bottom - tile_y, height)
        a, b, c, log_opacity = splat.a, splat.b, splat.c, splat.log_opacity
        red, green, blue = splat.red, splat.green, splat.blue
        first_dx, first_dy = np.float32(tile_x) + _HALF - splat.x, np.float32(tile_y) + _HALF - splat.y
        for x in range(left, right, LANES):
            dx = np.float32(x) + first_dx
            for y in range(top, bottom):
                blend_strip(tile, y * FORWARD_ROW + x, dx, np.float32(y) + first_dy, a, b, c, log_opacity,
                            red, green, blue)
        if e % CHECK_EVERY == CHECK_EVERY - 1 and _opaque(tile, height, width, FORWARD_ROW):
            break


@_kernel
def _write_tile(tile, tile_x, tile_y, width, height, background, image, coverage):
    for y in range(height):
        for x in range(width):
            i = y * FORWARD_ROW + x
            light = abs(tile[i])
            coverage[tile_y + y, tile_x + x] = _ONE - light
            for k in range(3):
                image[tile_y + y, tile_x + x, k] = tile[i + (k + 1) * PITCH] + light * background[k]


@_parallel_kernel
def draw(screen, conics, depths, log_opacities, colors, background, splats, counts, image, coverage):
    """Pictures of projected Gaussians.

    Args:
        screen: [B, N, 2]; conics: [B, N, 3]; depths: [B, N, 1], from `projection.project`.
        log_opacities: [N] natural logarithms; colors: [F or 1, N, 3] with B = F V; background: [3].
        splats: [B, N] `SPLAT` out; counts: [B] int32 out, how many of them are set; both are for `draw_backward`.
        image: [B, H, H, 3] out; coverage: [B, H, H] out, 1 - T.
    """
    pictures, size = image.shape[0], np.int32(image.shape[1])
    views = pictures // colors.shape[0]
    tiles_across = (size + TILE - 1) >> TILE_SHIFT
    for p in prange(pictures):
        counts[p] = _sorted_splats(screen[p], conics[p], depths[p], log_opacities, colors[p // views], size, splats[p])
        starts, entries = _tile_lists(splats[p, :counts[p]], tiles_across)
        tile = np.empty(TILE * FORWARD_ROW, np.float32)
        for t in range(tiles_across * tiles_across):
            tile_x, tile_y = (t % tiles_across) * TILE, (t // tiles_across) * TILE
            width, height = min(TILE, size - tile_x), min(TILE, size - tile_y)
            _blend_tile(tile, tile_x, tile_y, width, height, splats[p], entries[starts[t]:starts[t + 1]])
            _write_tile(tile, tile_x, tile_y, width, height, background, image[p], coverage[p])


@_kernel
def _read_gradient_tile(tile, tile_x, tile_y, width, height, image, coverage, d_image, d_coverage):
    """Sets T = 1, R and the picture's gradient; zeros beside the picture."""
    for y in range(height):
        row = y * BACKWARD_ROW
        for x in range(width):
            py, px = tile_y + y, tile_x + x
            d_red, d_green, d_blue = d_image[py, px, 0], d_image[py, px, 1], d_image[py, px, 2]
            shown = image[py, px, 0] * d_red + image[py, px, 1] * d_green + image[py, px, 2] * d_blue
            tile[row + x] = _ONE
            tile[row + PITCH + x] = shown - (_ONE - coverage[py, px]) * d_coverage[py, px]
            tile[row + 2 * PITCH + x] = d_red
            tile[row + 3 * PITCH + x] = d_green
            tile[row + 4 * PITCH + x] = d_blue
        for x in range(width, PITCH):
            for k in range(5):
                tile[row + k * PITCH + x] = _ZERO


@_kernel
def _blend_tile_backward(tile, sums, tile_x, tile_y, width, height, splats, entries, moments):
    """Adds what a tile's pixels say about the splats `entries` to `moments`; order and end are `_blend_tile`'s."""
    for e in range(entries.shape[0]):
        k = entries[e]
        splat = splats[k]
        left, right = max(splat.left - tile_x, 0), min(splat.right - tile_x, width)
        top, bottom = max(splat.top - tile_y, 0), min(splat.bottom - tile_y, height)
        a, b, c, log_opacity = splat.a, splat.b, splat.c, splat.log_opacity
        red, green, blue = splat.red, splat.green, splat.blue
        first_dx, first_dy = np.float32(tile_x) + _HALF - splat.x, np.float32(tile_y) + _HALF - splat.y
        for x in range(left, right, LANES):
            dx = np.float32(x) + first_dx
            for j in range(SUMS):
                sums[j] = _ZERO
            for y in range(top, bottom):
                blend_strip_backward(tile, y * BACKWARD_ROW + x, sums, dx, np.float32(y) + first_dy,
                                     a, b, c, log_opacity, red, green, blue)
            _add_moments(moments[k], sums, dx)
        if e % CHECK_EVERY == CHECK_EVERY - 1 and _opaque(tile, height, width, BACKWARD_ROW):
            break


@_kernel
def _add_moments(moments, sums, first_dx):
    """Sums of one strip's 16 columns to a splat's moments: of colour, and h times 1, dx, dy, dx^2, dx dy, dy^2."""
    red, green, blue = _ZERO, _ZERO, _ZERO
    h, hx, hy, hxx, hxy, hyy = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for lane in range(LANES):
        j = np.uint64(lane)
        dx = first_dx + np.float32(lane)
        h_here, hy_here = sums[SUM_H + j], sums[SUM_HY + j]
        hx_here = h_here * dx
        red += sums[SUM_RED + j]
        green += sums[SUM_GREEN + j]
        blue += sums[SUM_BLUE + j]
        h += h_here
        hx += hx_here
        hy += hy_here
        hxx += hx_here * dx
        hxy += hy_here * dx
        hyy += sums[SUM_HYY + j]
    moments[0] += red
    moments[1] += green
    moments[2] += blue
    moments[3] += h
    moments[4] += hx
    moments[5] += hy
    moments[6] += hxx
    moments[7] += hxy
    moments[8] += hyy


@_kernel
def _moments_to_gradients(splats, moments, d_screen):
    """Gradients of centre, conic, colour and opacity from the moments; zeros for Gaussians that weren't drawn.

    ln alpha = ln o - (a dx^2 + 2 b dx dy + c dy^2) / 2, and h = alpha d_alpha is the gradient of ln alpha.
    """
    d_screen[:] = _ZERO
    two_ln_2 = np.float32(2) * _LN_2
    for k in range(moments.shape[0]):
        splat, moment = splats[k], moments[k]
        gradient = d_screen[splat.index]
        a, b, c = splat.a * two_ln_2, splat.b * _LN_2, splat.c * two_ln_2
        hx, hy = moment[4], moment[5]
        gradient[0] = a * hx + b * hy
        gradient[1] = b * hx + c * hy
        gradient[2] = -_HALF * moment[6]
        gradient[3] = -moment[7]
        gradient[4] = -_HALF * moment[8]
        gradient[5] = moment[0]
        gradient[6] = moment[1]
        gradient[7] = moment[2]
        gradient[8] = moment[3]


@_parallel_kernel
def draw_backward(splats, counts, image, coverage, d_image, d_coverage, d_screen):
    """Gradients of the splats on the screen.

    Args:
        splats, counts, image, coverage: from `draw`.
        d_image: [B, H, H, 3]; d_coverage: [B, H, H].
        d_screen: [B, N, 9] out: pixel x, y; conic a, b, c; red, green, blue; logarithm of the opacity.
    """
    size = np.int32(image.shape[1])
    tiles_across = (size + TILE - 1) >> TILE_SHIFT
    for p in prange(counts.shape[0]):
        drawn = splats[p, :counts[p]]
        starts, entries = _tile_lists(drawn, tiles_across)
        tile, sums = np.empty(TILE * BACKWARD_ROW, np.float32), np.empty(SUMS, np.float32)
        moments = np.zeros((counts[p], SCREEN_GRADIENTS), np.float32)
        for t in range(tiles_across * tiles_across):
            if starts[t] == starts[t + 1]:
                continue
            tile_x, tile_y = (t % tiles_across) * TILE, (t // tiles_across) * TILE
            width, height = min(TILE, size - tile_x), min(TILE, size - tile_y)
            _read_gradient_tile(tile, tile_x, tile_y, width, height, image[p], coverage[p], d_image[p], d_coverage[p])
            _blend_tile_backward(tile, sums, tile_x, tile_y, width, height, drawn, entries[starts[t]:starts[t + 1]],
                                 moments)
        _moments_to_gradients(drawn, moments, d_screen[p])
