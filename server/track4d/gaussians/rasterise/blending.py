"""Screen ellipses to pictures on the CPU, forward and backward; one thread a picture.

A picture is drawn in four steps: project all Gaussians and drop what can't be seen; sort the rest by depth; list, for each tile
of 64 x 64 pixels, the splats that touch it, front to back; blend them. At a pixel at distance (dx, dy) from its centre, a splat
with opacity o and conic [[a, b], [b, c]] has

    alpha = o exp(-(a dx^2 + 2 b dx dy + c dy^2) / 2),   0 below ALPHA_CUT
    weight = alpha T,   then T <- T (1 - alpha)

with T the light that still gets through. The exponent is kept in powers of two, so that o is one more summand:
alpha = 2^(log2 o - (a/2 dx^2 + b dx dy + c/2 dy^2) log2 e).

Backward runs front to back as well. With q = colour . d_picture and R = the sum of weight q over what lies behind
(including the background), d alpha = T q - R / (1 - alpha); R starts as picture . d_picture - T_end d_coverage and
shrinks splat by splat. So nothing has to be stored per pixel and no T has to be divided back. The gradients of centre
and conic are the six moments of h = alpha d_alpha over the pixels: 1, dx, dy, dx^2, dx dy, dy^2.

Splats are visited splat by splat, not pixel by pixel, in strips of 16 columns that start where the splat's box starts. Those
strips (`blend_strip`, `blend_strip_backward`) are where the time goes: vector code, with a strip's sums kept in registers.
"""

import math

import numpy as np
from llvmlite import ir
from numba import prange, types

from . import projection
from .constants import ALPHA_CUT, ALPHA_MAX, TRANSMITTANCE_STOP
from .kernels import helper, kernel, parallel_kernel
from .lanes import LANES, exp2, intrinsic, lane_numbers, larger, load, smaller, store, sums, where, zeros

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
_LOG2_CUT = np.float32(math.log2(ALPHA_CUT))
_MAX, _STOP = np.float32(ALPHA_MAX), np.float32(TRANSMITTANCE_STOP)

# The planes in one row of a tile lie side by side. Forward: T (negative once the pixel is opaque), red, green, blue.
# Backward: T (0 once the pixel is opaque), R, and the picture's gradient.
FORWARD_ROW, BACKWARD_ROW = 4 * PITCH, 5 * PITCH



@intrinsic
def _float_as_int(typing_context, value):
    """The 32 bits of a float32."""
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))
    return types.int32(types.float32), codegen


@kernel
def _visible_splats(means, quats, scales, log_opacities, colors, viewmat, K, size, splats, keys):
    """Fills `splats` and their depth keys with what may touch one picture; returns how many.

    Bits of positive floats sort like the floats.
    """
    gaussians, count = means.shape[0], 0
    block = np.empty(projection.BLOCK_SIZE, np.float32)
    for first in range(0, gaussians, LANES):
        projection.load_gaussians(block, means, quats, scales, first)
        projection.load_opacities(block, log_opacities, first)
        projection.project_block(block, viewmat, K, np.float32(size))
        for lane in range(min(LANES, gaussians - first)):
            i = np.uint64(lane)
            left, right = block[projection.LEFT + i], block[projection.RIGHT + i]
            top, bottom = block[projection.TOP + i], block[projection.BOTTOM + i]
            if left >= right or top >= bottom:
                continue
            n, splat = first + lane, splats[count]
            splat.x, splat.y = block[projection.SCREEN_X + i], block[projection.SCREEN_Y + i]
            splat.a = _HALF * _LOG2_E * block[projection.CONIC_A + i]
            splat.b = _LOG2_E * block[projection.CONIC_B + i]
            splat.c = _HALF * _LOG2_E * block[projection.CONIC_C + i]
            splat.log_opacity = _LOG2_E * block[projection.LOG_OPACITY + i]
            splat.red, splat.green, splat.blue = colors[n, 0], colors[n, 1], colors[n, 2]
            splat.left, splat.right = np.int32(left), np.int32(right)
            splat.top, splat.bottom = np.int32(top), np.int32(bottom)
            splat.index = n
            keys[count] = np.uint32(_float_as_int(block[projection.DEPTH + i]))
            count += 1
    return count


@kernel
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


@kernel
def _sorted_splats(means, quats, scales, log_opacities, colors, viewmat, K, size, splats):
    """Fills the first rows of `splats` with what may touch the picture, front to back; returns how many."""
    gaussians = means.shape[0]
    unsorted, keys = np.empty(gaussians, SPLAT), np.empty(gaussians, np.uint32)
    count = _visible_splats(means, quats, scales, log_opacities, colors, viewmat, K, size, unsorted, keys)
    order = _order(keys, count)
    for k in range(count):
        splats[k] = unsorted[order[k]]
    return count


@kernel
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


@helper
def _alpha(exponent):
    """Alpha of 16 pixels from its logarithm to base 2; rounding may have lifted that above 0."""
    return where(exponent >= _LOG2_CUT, smaller(exp2(exponent), _MAX), _ZERO)


@kernel
def blend_strip(tile, start, rows, splat, dx, dy):
    """Blends a splat into 16 pixels of some rows; `dx`, `dy` belong to the first, `start` is where that lies in `tile`."""
    a, b, c, log_opacity = splat.a, splat.b, splat.c, splat.log_opacity
    red, green, blue = splat.red, splat.green, splat.blue
    x = lane_numbers() + dx
    ax = a * x
    for row in range(rows):
        i = start + row * FORWARD_ROW
        y = dy + np.float32(row)
        alpha = _alpha((log_opacity - c * y * y) - (ax + b * y) * x)
        light = load(tile, i)
        still_open = larger(light, _ZERO)
        weight = alpha * still_open
        left_over = still_open - weight
        go_on = left_over > _STOP
        weight = where(go_on, weight, _ZERO)
        store(tile, i, where(go_on, left_over, smaller(light, _ZERO - light)))
        store(tile, i + PITCH, load(tile, i + PITCH) + weight * red)
        store(tile, i + 2 * PITCH, load(tile, i + 2 * PITCH) + weight * green)
        store(tile, i + 3 * PITCH, load(tile, i + 3 * PITCH) + weight * blue)


@kernel
def blend_strip_backward(tile, start, rows, splat, dx, dy, moments):
    """Adds what 16 pixels of some rows say about a splat to its `moments`, and takes its share out of R.

    Moments: of colour (red, green, blue), and h times 1, dx, dy, dx^2, dx dy, dy^2.
    """
    a, b, c, log_opacity = splat.a, splat.b, splat.c, splat.log_opacity
    red, green, blue = splat.red, splat.green, splat.blue
    x = lane_numbers() + dx
    ax = a * x
    sum_red, sum_green, sum_blue, sum_h, sum_hy, sum_hyy = zeros(), zeros(), zeros(), zeros(), zeros(), zeros()
    for row in range(rows):
        i = start + row * BACKWARD_ROW
        y = dy + np.float32(row)
        alpha = _alpha((log_opacity - c * y * y) - (ax + b * y) * x)
        light = load(tile, i)
        weight = alpha * light
        left_over = light - weight
        go_on = left_over > _STOP
        weight = where(go_on, weight, _ZERO)
        store(tile, i, where(go_on, left_over, _ZERO))
        d_red, d_green, d_blue = load(tile, i + 2 * PITCH), load(tile, i + 3 * PITCH), load(tile, i + 4 * PITCH)
        own = weight * (d_red * red + d_green * green + d_blue * blue)
        behind = load(tile, i + PITCH) - own
        store(tile, i + PITCH, behind)
        h = where(go_on, own - alpha * behind / (_ONE - alpha), _ZERO)
        sum_red, sum_green, sum_blue = sum_red + weight * d_red, sum_green + weight * d_green, sum_blue + weight * d_blue
        hy = h * y
        sum_h, sum_hy, sum_hyy = sum_h + h, sum_hy + hy, sum_hyy + hy * y
    hx = sum_h * x
    strip = sums((sum_red, sum_green, sum_blue, sum_h, hx, sum_hy, hx * x, sum_hy * x, sum_hyy))
    store(moments, 0, load(moments, 0) + strip)


@kernel
def _opaque(tile, height, width, row_length):
    """Whether no pixel of the tile lets light through any more."""
    for y in range(height):
        most = _ZERO
        for x in range(width):
            most = max(most, tile[y * row_length + x])
        if most > _ZERO:
            return False
    return True


@kernel
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
        dx, dy = np.float32(tile_x) + _HALF - splat.x, np.float32(tile_y + top) + _HALF - splat.y
        for x in range(left, right, LANES):
            blend_strip(tile, top * FORWARD_ROW + x, bottom - top, splat, dx + np.float32(x), dy)
        if e % CHECK_EVERY == CHECK_EVERY - 1 and _opaque(tile, height, width, FORWARD_ROW):
            break


@kernel
def _write_tile(tile, tile_x, tile_y, width, height, background, image, coverage):
    for y in range(height):
        for x in range(width):
            i = y * FORWARD_ROW + x
            light = abs(tile[i])
            coverage[tile_y + y, tile_x + x] = _ONE - light
            for k in range(3):
                image[tile_y + y, tile_x + x, k] = tile[i + (k + 1) * PITCH] + light * background[k]


@parallel_kernel
def draw(means, quats, scales, log_opacities, colors, viewmats, Ks, background, splats, counts, image, coverage):
    """Pictures of Gaussians.

    Args:
        means: [F, N, 3]; quats: [F, N, 4]; scales: [F or 1, N, 3].
        log_opacities: [N, 1] natural logarithms; colors: [F or 1, V or 1, N, 3]; background: [3].
        viewmats: [V, 4, 4]; Ks: [V, 3, 3].
        splats: [F V, N] `SPLAT` out; counts: [F V] int32 out, how many of them are set; both are for `draw_backward`.
        image: [F V, H, H, 3] out; coverage: [F V, H, H] out, 1 - T.
    """
    pictures, size, views = image.shape[0], np.int32(image.shape[1]), viewmats.shape[0]
    tiles_across = (size + TILE - 1) >> TILE_SHIFT
    for p in prange(pictures):
        f, v = p // views, p % views
        color = colors[min(f, colors.shape[0] - 1), min(v, colors.shape[1] - 1)]
        counts[p] = _sorted_splats(means[f], quats[f], scales[min(f, scales.shape[0] - 1)], log_opacities, color,
                                   viewmats[v], Ks[v], size, splats[p])
        starts, entries = _tile_lists(splats[p, :counts[p]], tiles_across)
        tile = np.empty(TILE * FORWARD_ROW, np.float32)
        for t in range(tiles_across * tiles_across):
            tile_x, tile_y = (t % tiles_across) * TILE, (t // tiles_across) * TILE
            width, height = min(TILE, size - tile_x), min(TILE, size - tile_y)
            _blend_tile(tile, tile_x, tile_y, width, height, splats[p], entries[starts[t]:starts[t + 1]])
            _write_tile(tile, tile_x, tile_y, width, height, background, image[p], coverage[p])


@kernel
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


@kernel
def _blend_tile_backward(tile, tile_x, tile_y, width, height, splats, entries, moments):
    """Adds what a tile's pixels say about the splats `entries` to `moments`; order and end are `_blend_tile`'s."""
    for e in range(entries.shape[0]):
        k = entries[e]
        splat = splats[k]
        left, right = max(splat.left - tile_x, 0), min(splat.right - tile_x, width)
        top, bottom = max(splat.top - tile_y, 0), min(splat.bottom - tile_y, height)
        dx, dy = np.float32(tile_x) + _HALF - splat.x, np.float32(tile_y + top) + _HALF - splat.y
        for x in range(left, right, LANES):
            blend_strip_backward(tile, top * BACKWARD_ROW + x, bottom - top, splat, dx + np.float32(x), dy, moments[k])
        if e % CHECK_EVERY == CHECK_EVERY - 1 and _opaque(tile, height, width, BACKWARD_ROW):
            break


@kernel
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


@parallel_kernel
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
        tile = np.empty(TILE * BACKWARD_ROW, np.float32)
        moments = np.zeros((counts[p], LANES), np.float32)
        for t in range(tiles_across * tiles_across):
            if starts[t] == starts[t + 1]:
                continue
            tile_x, tile_y = (t % tiles_across) * TILE, (t // tiles_across) * TILE
            width, height = min(TILE, size - tile_x), min(TILE, size - tile_y)
            _read_gradient_tile(tile, tile_x, tile_y, width, height, image[p], coverage[p], d_image[p], d_coverage[p])
            _blend_tile_backward(tile, tile_x, tile_y, width, height, drawn, entries[starts[t]:starts[t + 1]],
                                 moments)
        _moments_to_gradients(drawn, moments, d_screen[p])
