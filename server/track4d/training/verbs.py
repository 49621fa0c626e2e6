"""How the generator's verbs look on a procedural object: exact vertex trajectories for any times.

Every motion starts at the rest pose, and to the left where a sentence leaves the direction open: a small generator learns one
way faster than two. Where an object has the limbs a verb speaks of they swing about their roots;
where it has none, the region where they would be takes their part, so that every verb does something sensible to
every object.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..video.text import VERB_NAMES
from .objects import Limb, ProceduralObject

FORWARD, LEFT, UP = np.eye(3)
FLIP = np.array([1, -1, 1], np.float32)  # left to right


@dataclass(frozen=True)
class Action:
    """One motion, as drawn for a sample.

    Attributes:
        verb: index into `VERBS`.
        amplitude, speed: factors, words and jitter together.
        side: 1 as described, to the left where there is a side; -1 its mirror image.
    """

    verb: int
    amplitude: float = 1.0
    speed: float = 1.0
    side: int = 1


class _Stage:
    """Vertices over time, and the measures that verbs speak in.

    Attributes:
        P: [F, N, 3] float32 positions; what a verb changes.
        phase: [F] 0 at the start, 1 after one cycle at speed 1 (one sixteenth after the last frame).
        ramp: [F] 0 at the start, soon 1; for motions that don't begin at the rest pose.
    """

    def __init__(self, thing: ProceduralObject, action: Action, times: np.ndarray) -> None:
        self.thing, self.amplitude = thing, action.amplitude
        self.rest = thing.vertices
        self.phase = np.asarray(times, np.float32) * np.float32(15 / 16 * action.speed)
        x = np.clip(np.asarray(times, np.float32) * 15 / 2.5, 0, 1)
        self.ramp = x * x * (3 - 2 * x)
        self.low, self.high = self.rest.min(0), self.rest.max(0)
        self.size = self.high - self.low
        self.height = (self.rest[:, 2] - self.low[2]) / max(float(self.size[2]), 1e-6)  # 0..1
        self.foot = np.array([0.0, 0.0, self.low[2]])
        self.four = len({leg.row for leg in thing.of("leg")}) == 2
        self.P = np.repeat(self.rest[None], len(self.phase), 0)

    def wave(self, cycles: float, offset: float = 0.0) -> np.ndarray:
        """A sine of the phase that starts at 0 whatever its offset; [F]."""
        return np.sin(2 * math.pi * cycles * self.phase + offset) - (1 - self.ramp) * math.sin(offset)

    def swell(self, cycles: float) -> np.ndarray:
        """0 to 1 and back, `cycles` times; [F]."""
        return 0.5 - 0.5 * np.cos(2 * math.pi * cycles * self.phase)

    def settle(self, rate: float = 1.7) -> np.ndarray:
        """0 to 1, then staying there; [F]."""
        return smooth(0.0, 1.0, self.phase * rate)

    def stroke(self, start: float, end: float) -> np.ndarray:
        """0, up to 1 and back within this part of each cycle; [F]."""
        x = np.clip((np.mod(self.phase, 1.0) - start) / (end - start), 0, 1)
        return np.sin(math.pi * x) ** 2

    def move(self, axis: int, shift: np.ndarray) -> None:
        """Moves along an axis (0 X, 1 Y, 2 Z) by [F] or [F, N]."""
        self.P[..., axis] += (shift[:, None] if shift.ndim == 1 else shift).astype(np.float32)

    def turn(self, axis: np.ndarray, angle: np.ndarray, centre, members=slice(None)) -> None:
        """Rotates about an axis through `centre`; angle [F] or [F, n], right-handed radians."""
        angle = np.asarray(angle, np.float32)
        angle = angle[:, None] if angle.ndim == 1 else angle
        axis = (axis / (np.linalg.norm(axis) + 1e-9)).astype(np.float32)
        centre = np.asarray(centre, np.float32)
        centre = centre[:, None] if centre.ndim == 2 else centre  # one per frame
        p = self.P[:, members] - centre
        c, s = np.cos(angle)[..., None], np.sin(angle)[..., None]
        dot = (p @ axis)[..., None]
        cross = p[..., [2, 0, 1]] * axis[[1, 2, 0]] - p[..., [1, 2, 0]] * axis[[2, 0, 1]]  # axis x p
        self.P[:, members] = p * c + cross * s + axis * (dot * (1 - c)) + centre

    def swing(self, limb: Limb, towards: np.ndarray, angle: np.ndarray, bend: np.ndarray | None = None) -> None:
        """Swings a limb about its root so that its tip goes `towards`; `bend` [F] is added beyond its middle joint."""
        direction = limb.tip - limb.root
        axis = np.cross(direction, towards)
        if np.linalg.norm(axis) < 0.15 * np.linalg.norm(direction):
            axis = np.cross(UP, towards) if abs(towards[2]) < 0.5 else LEFT
        weight = smooth(-0.05, 0.2, limb.along)
        if bend is not None:
            joint = (limb.root + limb.tip) / 2
            self.turn(axis, bend[:, None] * smooth(0.4, 0.65, limb.along), joint, limb.members)
        self.turn(axis, angle[:, None] * weight, limb.root, limb.members)

    def squash(self, factor: np.ndarray) -> None:
        """Scales the height by `factor` [F] about the ground and keeps the volume."""
        widths = factor[:, None] ** -0.5
        self.P[..., :2] *= widths[..., None]
        self.P[..., 2] = (self.P[..., 2] - self.low[2]) * factor[:, None] + self.low[2]


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """The smooth step from 0 at `low` to 1 at `high`."""
    y = np.clip((x - low) / (high - low), 0, 1)
    return (y * y * (3 - 2 * y)).astype(np.float32)


def _gait(s: _Stage, cycles: float, reach: float, fold: float, gallop: bool) -> bool:
    """Legs step, arms swing against them; False where there are no legs."""
    legs = s.thing.of("leg")
    if not legs:
        return False
    rows = sorted({leg.row for leg in legs})
    for leg in legs:
        rank = rows.index(leg.row)
        offset = 0.0 if leg.side > 0 else math.pi
        if gallop and len(rows) == 2:
            offset = (0.0 if leg.side > 0 else 0.7) + (0.0 if rank == 0 else math.pi)
        elif len(rows) > 1:
            offset += math.pi * rank
        lift = np.clip(np.cos(2 * math.pi * cycles * s.phase + offset), 0, 1) * s.ramp
        upright = abs(float((leg.tip - leg.root)[2])) / (np.linalg.norm(leg.tip - leg.root) + 1e-9) > 0.7
        if upright:
            s.swing(leg, FORWARD, s.amplitude * reach * s.wave(cycles, offset), -s.amplitude * fold * lift)
        else:  # an insect's leg steps forwards and is lifted
            s.swing(leg, FORWARD, s.amplitude * 0.6 * reach * s.wave(cycles, offset))
            s.swing(leg, UP, s.amplitude * 0.35 * reach * lift)
    for arm in s.thing.of("arm"):
        offset = math.pi if arm.side > 0 else 0.0
        s.swing(arm, FORWARD if arm.tip[2] < arm.root[2] - 0.05 else UP, s.amplitude * 0.8 * reach * s.wave(cycles, offset))
    for tail in s.thing.of("tail"):
        s.swing(tail, LEFT, s.amplitude * 0.25 * s.wave(cycles))
    return True


def _walk(s: _Stage) -> None:
    if _gait(s, 1.0, 0.45, 0.5, gallop=False):
        s.move(2, 0.025 * s.amplitude * s.swell(2.0))
        for head in s.thing.of("head"):
            s.swing(head, -UP, 0.07 * s.amplitude * s.wave(2.0))
        return
    foot = [0.0, 0.0, s.low[2]]
    s.turn(FORWARD, 0.2 * s.amplitude * s.wave(1.0), foot)  # a waddle
    s.turn(UP, 0.25 * s.amplitude * s.wave(1.0), foot)
    s.move(2, 0.03 * s.amplitude * s.swell(2.0))


def _run(s: _Stage) -> None:
    four = len({leg.row for leg in s.thing.of("leg")}) == 2
    if _gait(s, 2.0, 0.75, 0.95, gallop=True):
        s.turn(LEFT, (0.13 * s.amplitude * s.wave(2.0, 0.9)) if four else 0.16 * s.amplitude * s.ramp, [0, 0, 0])
        s.move(2, 0.08 * s.amplitude * s.swell(2.0 if four else 4.0))
        for head in s.thing.of("head"):
            s.swing(head, -UP, 0.12 * s.amplitude * s.wave(2.0))
        return
    foot = [0.0, 0.0, s.low[2]]
    s.turn(FORWARD, 0.2 * s.amplitude * s.wave(2.0), foot)
    s.turn(LEFT, 0.3 * s.amplitude * s.ramp, foot)
    s.move(2, 0.12 * s.amplitude * s.swell(4.0))


def _jump(s: _Stage) -> None:
    cycle = np.mod(s.phase, 1.0)
    crouch = np.where(cycle < 0.3, np.sin(np.pi * cycle / 0.3), 0.0) + np.where(
        cycle > 0.82, np.sin(np.pi * (cycle - 0.82) / 0.18), 0.0
    )
    air = np.clip((cycle - 0.25) / 0.6, 0, 1)
    flight = 4 * air * (1 - air)
    for leg in s.thing.of("leg"):
        s.swing(leg, FORWARD, s.amplitude * (0.35 * flight if leg.row == 0 else -0.35 * flight), -0.5 * s.amplitude * flight)
    for arm in s.thing.of("arm"):
        s.swing(arm, UP, s.amplitude * (0.9 * flight - 0.2 * crouch))
    s.squash(1 - 0.22 * min(s.amplitude, 1.3) * crouch + 0.06 * s.amplitude * flight)
    s.move(2, 0.42 * s.amplitude * flight)


def _flap_wings(s: _Stage, angle: np.ndarray) -> None:
    limbs = s.thing.of("wing") or s.thing.of("arm")
    for limb in limbs:
        s.swing(limb, UP, angle, 0.35 * np.roll(angle, 1) * s.ramp)
    if limbs:
        return
    half = max(float(s.high[1]), 1e-3)
    for side in (1, -1):
        members = np.nonzero(s.rest[:, 1] * side > 0)[0]
        weight = smooth(0.25 * half, 0.6 * half, np.abs(s.rest[members, 1]))
        s.turn(FORWARD * side, angle[:, None] * weight, [0, side * 0.25 * half, 0], members)


def _fly(s: _Stage) -> None:
    beat = s.wave(2.0)
    _flap_wings(s, 0.75 * s.amplitude * beat)
    for leg in s.thing.of("leg"):
        s.swing(leg, FORWARD, -0.9 * min(s.amplitude, 1.2) * s.ramp)
    s.turn(LEFT, 0.1 * s.amplitude * s.wave(1.0), [0, 0, 0])
    s.move(2, s.amplitude * (0.14 * s.ramp - 0.1 * beat))


def _flap(s: _Stage) -> None:
    _flap_wings(s, 0.75 * s.amplitude * s.wave(2.0))


def _swim(s: _Stage) -> None:
    length = max(float(s.size[0]), 1e-3)
    back = (s.high[0] - s.rest[:, 0]) / length  # 0 at the front
    wave = np.sin(2 * math.pi * (1.5 * s.phase[:, None] - 0.9 * back)) + (1 - s.ramp[:, None]) * np.sin(2 * math.pi * 0.9 * back)
    for limb in s.thing.of("leg", "arm", "wing"):
        s.swing(limb, FORWARD, 0.35 * s.amplitude * s.wave(1.5, 0.0 if limb.side > 0 else math.pi))
    s.move(1, s.amplitude * 0.15 * min(1.0, length) * (0.25 + 0.95 * back**1.5) * wave * s.ramp[:, None])


def _wave(s: _Stage) -> None:
    limbs = [limb for limb in s.thing.of("arm", "wing") if limb.side > 0]
    if not limbs and len({leg.row for leg in s.thing.of("leg")}) > 1:
        limbs = [leg for leg in s.thing.of("leg") if leg.side > 0 and leg.row == 0]
        for leg in limbs:
            s.swing(leg, FORWARD, s.amplitude * (0.95 * s.ramp + 0.35 * s.wave(2.0)))
        return
    for limb in limbs[:1]:
        climb = math.asin(np.clip((limb.tip - limb.root)[2] / (np.linalg.norm(limb.tip - limb.root) + 1e-9), -1, 1))
        s.swing(limb, UP, s.amplitude * (max(0.2, 0.75 - climb) * s.ramp + 0.35 * s.wave(2.0)))
    if not limbs:
        half = max(float(s.high[1]), 1e-3)
        members = np.nonzero(s.rest[:, 1] > 0)[0]
        weight = smooth(0.2 * half, 0.55 * half, s.rest[members, 1]) * smooth(0.3, 0.5, s.height[members])
        s.turn(FORWARD, (s.amplitude * (0.5 * s.ramp + 0.35 * s.wave(2.0)))[:, None] * weight, [0, 0.25 * half, 0], members)


def _wag(s: _Stage) -> None:
    angle = 0.7 * s.amplitude * s.wave(2.0)
    tails = s.thing.of("tail")
    for tail in tails:
        s.turn(UP, angle[:, None] * np.sqrt(smooth(-0.05, 0.8, tail.along)), tail.root, tail.members)
    if not tails:
        x = s.rest[:, 0]
        s.turn(UP, angle[:, None] * smooth(0.2, 0.6, -x / max(-float(s.low[0]), 1e-3)), [0.25 * s.low[0], 0, 0])


def _move_head(s: _Stage, axis: np.ndarray, angle: np.ndarray) -> None:
    heads = s.thing.of("head")
    for head in heads:
        s.turn(axis, angle[:, None] * np.sqrt(smooth(-0.05, 0.7, head.along)), head.root, head.members)
    if not heads:
        weight = smooth(0.5, 0.75, s.height)
        centre = (s.rest * weight[:, None]).sum(0) / (weight.sum() + 1e-6)
        s.turn(axis, angle[:, None] * weight, [0.5 * centre[0], 0.5 * centre[1], s.low[2] + 0.55 * s.size[2]])


def _nod(s: _Stage) -> None:
    _move_head(s, LEFT, 0.5 * s.amplitude * s.swell(2.0))


def _look(s: _Stage) -> None:
    _move_head(s, UP, 0.75 * s.amplitude * s.wave(1.0))


def _dance(s: _Stage) -> None:
    beat = s.wave(1.0)
    for arm in s.thing.of("arm", "wing"):
        s.swing(arm, UP, s.amplitude * (0.45 * s.ramp + 0.5 * arm.side * beat))
    for leg in s.thing.of("leg"):
        s.swing(leg, FORWARD, 0.3 * s.amplitude * beat * leg.side, -0.3 * s.amplitude * np.clip(beat * leg.side, 0, 1))
    foot = np.array([0, 0, s.low[2]])
    s.turn(UP, (0.35 * s.amplitude * beat)[:, None] * (0.4 + 0.6 * s.height), foot)
    s.turn(FORWARD, (0.22 * s.amplitude * beat)[:, None] * s.height, foot)
    s.move(2, 0.1 * s.amplitude * s.swell(2.0))


def _bounce(s: _Stage) -> None:
    s.move(2, 0.26 * s.amplitude * np.abs(np.sin(2 * math.pi * s.phase)))


def _squash(s: _Stage) -> None:
    s.squash(1 - 0.35 * s.amplitude * s.wave(1.0) * 0.9)


def _spin(s: _Stage) -> None:
    s.turn(UP, 2 * math.pi * 0.5 * s.amplitude * s.phase, [0, 0, 0])


def _shake(s: _Stage) -> None:
    s.move(1, 0.13 * s.amplitude * s.wave(2.5))


def _sway(s: _Stage) -> None:
    s.turn(FORWARD, 0.35 * s.amplitude * s.wave(1.0), [0, 0, s.low[2]])


def _twist(s: _Stage) -> None:
    s.turn(UP, (1.0 * s.amplitude * s.wave(1.0))[:, None] * s.height, [0, 0, 0])


def _bend_left(s: _Stage) -> None:
    s.turn(FORWARD, (-0.75 * s.amplitude * s.swell(1.0))[:, None] * s.height, [0, 0, s.low[2]])


def _bend_right(s: _Stage) -> None:
    s.turn(FORWARD, (0.75 * s.amplitude * s.swell(1.0))[:, None] * s.height, [0, 0, s.low[2]])


def _pulse(s: _Stage) -> None:
    s.P *= (1 + 0.25 * s.amplitude * s.wave(1.0))[:, None, None]


def _attack(s: _Stage) -> None:
    back, strike = s.amplitude * s.stroke(0.0, 0.4), s.amplitude * s.stroke(0.25, 0.85)
    for arm in s.thing.of("arm"):
        s.swing(arm, UP, 1.2 * back - 0.2 * strike)
        s.swing(arm, FORWARD, 0.9 * strike)
    s.turn(LEFT, 0.35 * strike - 0.25 * back, s.foot)
    s.move(0, 0.3 * strike - 0.15 * back)


def _die(s: _Stage) -> None:
    fall = s.settle() ** 2
    for limb in s.thing.of("leg", "arm", "wing"):
        s.swing(limb, FORWARD, 0.3 * s.amplitude * fall * (1 if limb.row == 0 else -1))
    s.turn(FORWARD, -1.25 * min(s.amplitude, 1.15) * fall, [0, 0.6 * s.high[1], s.low[2]])


def _idle(s: _Stage) -> None:
    breath = s.amplitude * s.wave(1.0)
    s.turn(LEFT, 0.05 * breath[:, None] * s.height, s.foot)
    for head in s.thing.of("head"):
        s.swing(head, -UP, 0.08 * breath)
    s.squash(1 - 0.05 * breath)


def _get_hit(s: _Stage) -> None:
    x = 4 * np.mod(s.phase, 1.0)
    jerk = s.amplitude * x * np.exp(1 - x) * s.ramp
    for arm in s.thing.of("arm"):
        s.swing(arm, UP, 0.5 * jerk)
    s.turn(LEFT, -0.4 * jerk, s.foot)
    s.move(0, -0.25 * jerk)


def _half(s: _Stage, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The left part of an object between two heights (0..1): members [n] and weights [n]."""
    members = np.nonzero(s.rest[:, 1] > 0)[0]
    height = s.height[members]
    weight = smooth(low - 0.15, low + 0.1, height) * (1 - smooth(high - 0.1, high + 0.15, height))
    return members, weight * smooth(0.05, 0.5, s.rest[members, 1] / max(float(s.high[1]), 1e-3))


def _punch(s: _Stage) -> None:
    jab = s.amplitude * s.stroke(0.1, 0.7)
    limbs = s.thing.of("arm") or [leg for leg in s.thing.of("leg") if leg.row == 0]
    limbs = [limb for limb in limbs if limb.side > 0][:1]
    for limb in limbs:
        s.swing(limb, FORWARD, 1.35 * jab, -0.5 * s.amplitude * s.stroke(0.0, 0.35))
    if not limbs:
        members, weight = _half(s, 0.45, 1.2)
        s.P[:, members, 0] += 0.4 * jab[:, None] * weight
    s.turn(UP, -0.3 * jab, [0, 0, 0])


def _kick(s: _Stage) -> None:
    kick = s.amplitude * s.stroke(0.1, 0.75)
    legs = s.thing.of("leg")
    if s.four:  # both hind legs, as a horse does
        for leg in legs:
            if leg.row > 0:
                s.swing(leg, -FORWARD, 1.1 * kick)
        s.turn(LEFT, 0.3 * kick, [0.7 * s.high[0], 0, s.low[2]])
        return
    limbs = [leg for leg in legs if leg.side > 0][:1]
    for leg in limbs:
        s.swing(leg, FORWARD, 1.3 * kick)
    if not limbs:
        members, weight = _half(s, -0.2, 0.4)
        s.P[:, members, 0] += 0.45 * kick[:, None] * weight
    s.turn(LEFT, -0.15 * kick, s.foot)


def _sit(s: _Stage) -> None:
    down = min(s.amplitude, 1.2) * s.settle()
    legs = s.thing.of("leg")
    for leg in legs:
        if s.four and leg.row > 0:
            s.swing(leg, FORWARD, 0.9 * down, -0.7 * down)
        elif not s.four and len(legs) <= 2:
            s.swing(leg, FORWARD, 1.35 * down, -1.2 * down)
    if s.four:
        s.turn(LEFT, -0.4 * down, [0.7 * s.high[0], 0, s.low[2]])
    elif 0 < len(legs) <= 2:
        s.move(2, -0.5 * np.linalg.norm(legs[0].tip - legs[0].root) * down)
    else:
        s.turn(LEFT, -0.25 * down, s.foot)
        s.squash(1 - 0.25 * down)


def _eat(s: _Stage) -> None:
    bite = s.amplitude * (0.85 * s.settle(3.0) + 0.15 * s.wave(3.0))
    _move_head(s, LEFT, 0.9 * bite)
    s.turn(LEFT, (0.25 * bite)[:, None] * (0.3 + 0.7 * s.height), [0, 0, s.low[2]])


def _roll(s: _Stage) -> None:
    s.turn(LEFT, math.pi * s.amplitude * s.phase, [0, 0, 0])


def _crouch(s: _Stage) -> None:
    down = min(s.amplitude, 1.3) * s.settle()
    for leg in s.thing.of("leg"):
        s.swing(leg, FORWARD, 0.5 * down, -0.9 * down)
    s.turn(LEFT, 0.15 * down, s.foot)
    s.squash(1 - 0.36 * down)


def _bow(s: _Stage) -> None:
    bend = 0.95 * s.amplitude * s.swell(1.0)
    s.turn(LEFT, bend[:, None] * smooth(0.3, 0.6, s.height), [0, 0, s.low[2] + 0.4 * s.size[2]])


def _shake_head(s: _Stage) -> None:
    _move_head(s, UP, 0.6 * s.amplitude * s.wave(2.5))


def _turn(s: _Stage) -> None:
    s.turn(UP, 1.25 * s.amplitude * s.settle(), [0, 0, 0])


def _clap(s: _Stage) -> None:
    limbs = s.thing.of("arm") or s.thing.of("wing") or [leg for leg in s.thing.of("leg") if leg.row == 0]
    raised, meeting = s.amplitude * s.settle(4.0), s.amplitude * s.swell(3.0)
    for limb in limbs:
        s.swing(limb, FORWARD, 0.9 * raised)
        s.turn(UP, -limb.side * (0.55 * meeting - 0.15 * raised), limb.root, limb.members)
    if limbs:
        return
    for side in (1, -1):
        members = np.nonzero(s.rest[:, 1] * side > 0)[0]
        s.turn(UP, (-side * 0.45 * meeting)[:, None] * smooth(0.0, 0.4, s.rest[members, 1] * side), [0, 0, 0], members)


_MOTIONS: dict[str, Callable[[_Stage], None]] = {
    "walk": _walk,
    "run": _run,
    "jump": _jump,
    "fly": _fly,
    "swim": _swim,
    "flap": _flap,
    "wave": _wave,
    "wag the tail": _wag,
    "nod": _nod,
    "look around": _look,
    "dance": _dance,
    "bounce": _bounce,
    "squash and stretch": _squash,
    "spin": _spin,
    "shake": _shake,
    "sway": _sway,
    "twist": _twist,
    "bend left": _bend_left,
    "bend right": _bend_right,
    "pulse": _pulse,
    "attack": _attack,
    "die": _die,
    "idle": _idle,
    "get hit": _get_hit,
    "punch": _punch,
    "kick": _kick,
    "sit": _sit,
    "eat": _eat,
    "roll": _roll,
    "crouch": _crouch,
    "bow": _bow,
    "shake the head": _shake_head,
    "turn": _turn,
    "clap": _clap,
}
assert tuple(_MOTIONS) == VERB_NAMES


def animate(thing: ProceduralObject, action: Action, times: np.ndarray) -> np.ndarray:
    """Vertex trajectories.

    Args:
        thing: the object at rest.
        action: what it does.
        times: [F] 0 for the rest pose to 1 for the last frame of a 16-frame video.

    Returns:
        [F, N, 3] float32, canonical.
    """
    stage = _Stage(thing if action.side > 0 else mirrored(thing), action, times)
    _MOTIONS[VERB_NAMES[action.verb]](stage)
    return stage.P if action.side > 0 else stage.P * FLIP


def mirrored(thing: ProceduralObject) -> ProceduralObject:
    """The object with left and right exchanged, vertex by vertex."""
    limbs = [replace(limb, side=-limb.side, root=limb.root * FLIP, tip=limb.tip * FLIP) for limb in thing.limbs]
    return replace(thing, vertices=thing.vertices * FLIP, limbs=limbs)
