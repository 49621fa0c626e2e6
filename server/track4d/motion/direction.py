"""What the user asks of a motion besides its sentence: stronger, looped, on the spot, with parts that stay still."""

from __future__ import annotations

import numpy as np

RETURN = 0.4  # last part of a looped motion, in which it finds back to its start


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
