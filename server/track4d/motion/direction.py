"""What the user asks of a motion besides its sentence: stronger, looped, on the spot, with parts that stay still."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .field import MotionField

RETURN = 0.4  # last part of a looped motion, in which it finds back to its start
LIKE_A_STEP = 0.5, 1.5  # of the usual step between frames: so long is the one from the last frame to the first, if that goes on


def directed(
    positions: np.ndarray, strength: float = 1.0, loop: bool = False, keep_root: bool = False, pin: np.ndarray | None = None
) -> np.ndarray:
    """A motion as it was asked for; with the default arguments, the motion itself.

    Args:
        positions: [F, N, 3], +Z up, the rest pose first.
        strength: factor on every displacement.
        loop: the last frame is the first one; the way back begins `RETURN` before the end.
        keep_root: what the object as a whole does along the ground is taken away, as for a walk on the spot.
        pin: [N] in 0..1, how much each vertex is held where it is.

    Returns:
        [F, N, 3] float32; the first frame is the rest pose.
    """
    moves = (positions - positions[:1]) * np.float32(strength)
    if keep_root:
        moves[..., :2] -= moves[..., :2].mean(1, keepdims=True)
    if loop and len(moves) > 1:
        x = np.clip((np.linspace(0, 1, len(moves)) - (1 - RETURN)) / RETURN, 0, 1)
        moves -= (x * x * (3 - 2 * x))[:, None, None].astype(np.float32) * moves[-1:]
    if pin is not None:
        moves *= 1 - np.clip(pin, 0, 1)[None, :, None]
    return (positions[:1] + moves).astype(np.float32)


def is_cycle(positions: np.ndarray) -> bool:
    """Whether a motion [F, N, 3] goes on from its last frame to its first as it went from frame to frame before."""
    steps = np.linalg.norm(np.roll(positions, -1, 0) - positions, axis=-1).mean(1)  # [F], the last one back to the start
    low, high = (share * np.median(steps[:-1]) for share in LIKE_A_STEP) if len(steps) > 2 else (0.0, 0.0)
    return bool(low < steps[-1] < high)


def looped(field: MotionField) -> MotionField:
    """A motion that is periodic in time.

    One that `is_cycle` is so from its last frame on. Any other finds back to its start (`directed`): its last frame then is the
    first one, and is left out.
    """
    if field.loops or len(field.vertices) < 3:
        return field
    if is_cycle(field.vertices):
        return replace(field, loops=True)
    return replace(field, vertices=directed(field.vertices, loop=True)[:-1], confidence=field.confidence[:-1], loops=True)
