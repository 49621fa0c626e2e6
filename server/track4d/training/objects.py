"""Procedural objects for the generator's training: animals, people, things, with the limbs their motions need.

All face +X and stand upright along +Z. Every object is a union of tubes, ellipsoids and boxes with an organic
deformation, random proportions, colours and light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

PLANS = ("quadruped", "biped", "bird", "fish", "snake", "plant", "insect", "stack", "vehicle", "blob")
_PLAN_SHARES = np.array([0.27, 0.19, 0.13, 0.08, 0.04, 0.04, 0.05, 0.08, 0.04, 0.08])


@dataclass
class Limb:
    """A part that swings about its root.

    Attributes:
        role: "leg", "arm", "wing", "tail" or "head".
        side: +1 left (+Y), -1 right, 0 middle.
        row: 0 for the front pair of its kind, 1 at the back.
        root, tip: [3].
        members: [n] vertex indices.
        along: [n] 0 at the root to 1 at the tip.
    """

    role: str
    side: int
    row: float
    root: np.ndarray
    tip: np.ndarray
    members: np.ndarray
    along: np.ndarray


@dataclass
class ProceduralObject:
    """A coloured mesh in canonical space, and its limbs.

    Attributes:
        plan: one of `PLANS`.
        vertices: [N, 3] float32, canonical.
        faces: [T, 3] int32.
        colors: [N, 3] float32 sRGB with baked light.
        limbs: what can swing.
    """

    plan: str
    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray
    limbs: list[Limb] = field(default_factory=list)

    def of(self, *roles: str) -> list[Limb]:
        """The limbs of these roles."""
        return [limb for limb in self.limbs if limb.role in roles]


class _Builder:
    """Collects parts; a limb is everything added under one limb key."""

    def __init__(self, rng: np.random.Generator, sides: int) -> None:
        self.rng, self.sides = rng, sides
        self.vertices: list[np.ndarray] = []
        self.faces: list[np.ndarray] = []
        self.tints: list[np.ndarray] = []
        self.members: dict[int, list[np.ndarray]] = {}
        self.along: dict[int, list[np.ndarray]] = {}
        self.limbs: list[tuple[str, int, float, np.ndarray, np.ndarray]] = []
        self.count = 0
        self.palette = rng.random((int(rng.integers(2, 5)), 3)) * 0.85 + 0.12

    def limb(self, role: str, side: int, row: float, root, tip) -> int:
        self.limbs.append((role, side, row, np.asarray(root, float), np.asarray(tip, float)))
        self.members[len(self.limbs) - 1], self.along[len(self.limbs) - 1] = [], []
        return len(self.limbs) - 1

    def _add(self, vertices: np.ndarray, faces: np.ndarray, along: np.ndarray, limb: int | None, tint: int) -> None:
        if limb is not None:
            self.members[limb].append(np.arange(self.count, self.count + len(vertices)))
            self.along[limb].append(along)
        self.vertices.append(vertices)
        self.faces.append(faces + self.count)
        self.tints.append(np.tile(self.palette[tint % len(self.palette)], (len(vertices), 1)))
        self.count += len(vertices)

    def tube(
        self,
        points,
        radii,
        limb: int | None = None,
        along=(0.0, 1.0),
        tint: int = 0,
        sides: int | None = None,
        wide=(0.0, 1.0, 0.0),
    ) -> None:
        """A tube through `points` [P, 3] with radii [P] or [P, 2] (along `wide` and across it), closed at both ends."""
        points = np.asarray(points, float)
        radii = np.asarray(radii, float)
        radii = np.stack([radii, radii], 1) if radii.ndim == 1 else radii
        sides = self.sides if sides is None else sides
        axis = points[-1] - points[0]
        axis /= np.linalg.norm(axis) + 1e-9
        first = np.asarray(wide, float)
        first = first - axis * (axis @ first)
        if np.linalg.norm(first) < 1e-3:
            first = np.cross(axis, (0.0, 0.0, 1.0) if abs(axis[2]) < 0.9 else (1.0, 0.0, 0.0))
        first /= np.linalg.norm(first)
        second = np.cross(axis, first)
        turn = 2 * np.pi * (np.arange(sides) + 0.5) / sides
        rings = (
            points[:, None]
            + radii[:, :1, None] * np.cos(turn)[None, :, None] * first
            + radii[:, 1:, None] * np.sin(turn)[None, :, None] * second
        )  # [P, S, 3]
        count = len(points)
        step = np.arange(sides)
        faces = []
        for p in range(count - 1):
            a, b = p * sides + step, p * sides + (step + 1) % sides
            faces += [np.stack([a, b, a + sides], 1), np.stack([b, b + sides, a + sides], 1)]
        for start, centre, flip in ((0, count * sides, True), ((count - 1) * sides, count * sides + 1, False)):
            a, b = start + step, start + (step + 1) % sides
            faces.append(np.stack([b, a, np.full(sides, centre)] if flip else [a, b, np.full(sides, centre)], 1))
        vertices = np.concatenate([rings.reshape(-1, 3), points[[0, -1]]])
        positions = np.linspace(along[0], along[1], count)
        self._add(
            vertices,
            np.concatenate(faces),
            np.concatenate([np.repeat(positions, sides), positions[[0, -1]]]),
            limb,
            tint,
        )

    def ball(self, centre, size, limb: int | None = None, along: float = 1.0, tint: int = 0, axis: int = 0) -> None:
        """An ellipsoid (or a box with four sides) with half extents `size`."""
        centre, size = np.asarray(centre, float), np.broadcast_to(np.asarray(size, float), 3)
        boxy = self.sides == 4
        profile = np.array([-0.98, -0.95, 0.0, 0.95, 0.98]) if boxy else np.sin(np.linspace(-1.45, 1.45, 6))
        radius = np.array([0.9, 1.25, 1.25, 1.25, 0.9]) if boxy else np.sqrt(1 - profile**2)
        across = [k for k in (1, 0, 2) if k != axis]  # `wide` first
        direction = np.eye(3)[axis]
        points = centre + profile[:, None] * size[axis] * direction
        self.tube(
            points,
            np.stack([radius * size[across[0]], radius * size[across[1]]], 1),
            limb,
            (along, along),
            tint,
            wide=np.eye(3)[across[0]],
        )


def _legs(b: _Builder, hips, length: float, thickness: float, lean: float = 0.0) -> None:
    """A pair of legs per hip (x, y, z, row), downwards, with a slight knee and perhaps a foot."""
    u = b.rng.uniform
    knee, foot, tint = u(-0.12, 0.12), b.rng.random() < 0.6, int(b.rng.integers(4))
    ankle = u(0.5, 1.0)
    for x, y, z, row in hips:
        for side in (1, -1):
            root = np.array([x, side * y, z])
            tip = root + np.array([lean * (1 if row == 0 else -1), side * u(-0.02, 0.05), -length])
            limb = b.limb("leg", side, row, root, tip)
            middle = (root + tip) / 2 + np.array([knee * length * (1 if row == 0 else -1), 0, 0])
            points = np.stack([root, (root * 0.5 + middle * 0.5), middle, (middle + tip) / 2, tip])
            b.tube(
                points,
                thickness * np.array([1.5, 1.2, 1.0, 0.5 + ankle / 2, ankle]),
                limb,
                tint=tint,
                sides=min(b.sides, 6),
            )
            if foot:
                b.ball(
                    tip + [thickness * 0.7, 0, 0],
                    (thickness * 1.7, thickness * 1.1, thickness * 0.7),
                    limb,
                    tint=tint + 1,
                )


def _head(b: _Builder, root, lift: float, reach: float, size: float, muzzle: bool) -> None:
    """A neck from `root`, a head with muzzle or beak, ears or horns."""
    u, rng = b.rng.uniform, b.rng
    root = np.asarray(root, float)
    top = root + np.array([reach, 0, lift])
    limb = b.limb("head", 0, 0, root, top + [size * 0.5, 0, 0])
    tint = int(rng.integers(4))
    b.tube(np.linspace(root, top, 4), size * np.linspace(u(0.5, 0.9), u(0.4, 0.7), 4), limb, (0.0, 0.75), tint=0)
    b.ball(top, size * np.array([u(0.9, 1.3), u(0.75, 1.05), u(0.8, 1.1)]), limb, tint=tint)
    if muzzle:
        end = top + [size * u(1.3, 2.2), 0, -size * u(0, 0.5)]
        b.tube(
            np.stack([top, (top + end) / 2, end]),
            size * np.array([0.7, u(0.4, 0.6), u(0.05, 0.35)]),
            limb,
            (1, 1),
            tint=tint + 1,
            sides=6,
        )
    if rng.random() < 0.65:
        length, spread, back = size * u(0.4, 1.6), u(0.1, 0.8), u(-0.6, 0.4)
        for side in (1, -1):
            base = top + size * np.array([-0.2, side * 0.5, 0.6])
            end = base + length * np.array([back, side * spread, 1.0]) / math.hypot(1, spread, back)
            b.tube(
                np.stack([base, base * 0.5 + end * 0.5, end]),
                size * np.array([0.28, 0.22, 0.03]),
                limb,
                (1, 1),
                tint=tint,
                sides=5,
            )


def _tail(b: _Builder, root, length: float, thickness: float) -> None:
    u = b.rng.uniform
    rise, curve = u(-0.8, 0.9), u(-0.6, 0.6)
    s = np.linspace(0, 1, 6)
    angle = math.pi + rise * -1 + curve * s  # in the XZ plane; pi points backwards
    steps = np.stack([np.cos(angle), np.zeros(6), -np.sin(angle)], 1) * length / 5
    points = np.asarray(root, float) + np.concatenate([np.zeros((1, 3)), np.cumsum(steps[1:], 0)])
    profile = np.array([0.7, 1, 1, 0.9, 0.6, 0.15]) if b.rng.random() < 0.6 else np.array([0.6, 0.8, 1.4, 1.9, 1.6, 0.3])
    limb = b.limb("tail", 0, 0, points[0], points[-1])
    b.tube(points, thickness * profile, limb, tint=int(b.rng.integers(3)))


def _quadruped(b: _Builder) -> None:
    u = b.rng.uniform
    length, width, height = u(0.35, 0.7), u(0.1, 0.24), u(0.11, 0.26)
    s = np.linspace(-1, 1, 7)
    belly = u(-0.25, 0.25)
    profile = np.sqrt(np.clip(1 - (np.abs(s) * 0.96) ** u(2.5, 6), 0.05, 1)) * (1 + belly * s)
    points = np.stack([s * length, np.zeros(7), u(-0.04, 0.1) * s + u(-0.05, 0.05) * s**2], 1)
    b.tube(points, np.stack([profile * width, profile * height], 1))
    leg = u(0.22, 0.75)
    _legs(
        b,
        [
            (length * u(0.6, 0.85), width * u(0.5, 0.9), -height * 0.2, 0),
            (-length * u(0.6, 0.85), width * u(0.5, 0.9), -height * 0.2, 1),
        ],
        leg,
        u(0.03, 0.08),
        lean=u(-0.04, 0.04),
    )
    head = u(0.09, 0.21)
    lift = u(0.0, 0.25) if b.rng.random() < 0.6 else u(0.25, 0.8)
    _head(b, (length * 0.85, 0, height * u(0.2, 0.7)), lift, u(0.08, 0.3), head, b.rng.random() < 0.85)
    if b.rng.random() < 0.85:
        _tail(b, (-length * 0.92, 0, height * u(0.0, 0.6)), u(0.2, 0.8), u(0.025, 0.08))


def _biped(b: _Builder) -> None:
    u, rng = b.rng.uniform, b.rng
    height, width, depth = u(0.22, 0.42), u(0.13, 0.27), u(0.08, 0.2)
    s = np.linspace(-1, 1, 6)
    profile = np.clip(1 - 0.4 * np.abs(s) ** 3, 0.3, 1) * (1 + u(-0.2, 0.3) * s)
    b.tube(np.stack([u(-0.05, 0.05) * s, np.zeros(6), s * height], 1), np.stack([profile * width, profile * depth], 1))
    leg = u(0.3, 0.75)
    _legs(b, [(0.0, width * u(0.4, 0.65), -height * 0.85, 0)], leg, u(0.045, 0.1))
    head = u(0.11, 0.24)
    _head(b, (0, 0, height * 0.9), head * u(0.7, 1.5), u(-0.02, 0.05), head, rng.random() < 0.3)
    arm, thickness = u(0.3, 0.65), u(0.03, 0.075)
    spread = u(0.05, 0.45) if rng.random() < 0.55 else u(0.45, 1.7)  # from hanging to stretched out
    ahead = u(-0.1, 0.35)
    for side in (1, -1):
        root = np.array([0, side * width * u(0.85, 1.0), height * 0.75])
        tip = root + arm * np.array([ahead * math.cos(spread), side * math.sin(spread), -math.cos(spread)])
        limb = b.limb("arm", side, 0, root, tip)
        b.tube(np.linspace(root, tip, 5), thickness * np.array([1.2, 1.1, 1, 0.9, 0.8]), limb, tint=1, sides=6)
        b.ball(tip, thickness * 1.4, limb, tint=2)
    if rng.random() < 0.2:
        _tail(b, (-depth * 0.8, 0, -height * 0.7), u(0.2, 0.6), u(0.03, 0.07))


def _bird(b: _Builder) -> None:
    u, rng = b.rng.uniform, b.rng
    length, width, height = u(0.28, 0.5), u(0.12, 0.24), u(0.12, 0.24)
    s = np.linspace(-1, 1, 6)
    profile = np.sqrt(np.clip(1 - (0.97 * s) ** 2, 0.05, 1))
    slope = u(-0.1, 0.5)
    b.tube(np.stack([s * length, np.zeros(6), slope * s * length], 1), np.stack([profile * width, profile * height], 1))
    front = np.array([length * 0.75, 0, slope * length * 0.75 + height * 0.2])
    _head(b, front, u(0.05, 0.35), u(0.02, 0.25), u(0.08, 0.17), True)
    span, chord, spread = u(0.35, 0.95), u(0.1, 0.28), u(-0.3, 0.4)
    sweep = u(-0.4, 0.15) if rng.random() < 0.75 else u(-1.8, -0.8)
    for side in (1, -1):
        root = np.array([u(0, 0.1), side * width * 0.7, height * u(0.2, 0.5)])
        tip = root + span * np.array([sweep, side, spread]) / math.hypot(1, sweep, spread)
        limb = b.limb("wing", side, 0, root, tip)
        b.tube(
            np.linspace(root, tip, 6),
            np.stack([chord * np.array([0.9, 1.1, 1.1, 0.95, 0.7, 0.3]), np.full(6, u(0.015, 0.035))], 1),
            limb,
            tint=1,
            sides=6,
            wide=(1.0, 0.0, 0.0),
        )
    root = np.array([-length * 0.85, 0, -slope * length * 0.85])
    tip = root + [-u(0.12, 0.4), 0, u(-0.1, 0.15)]
    limb = b.limb("tail", 0, 0, root, tip)
    b.tube(
        np.linspace(root, tip, 4),
        np.stack([np.linspace(0.06, u(0.06, 0.2), 4), np.full(4, 0.03)], 1),
        limb,
        tint=2,
        sides=6,
    )
    if rng.random() < 0.6:
        _legs(b, [(u(-0.1, 0.1), width * 0.45, -height * 0.6, 0)], u(0.12, 0.4), u(0.02, 0.05))


def _fish(b: _Builder) -> None:
    u = b.rng.uniform
    length, width, height = u(0.6, 0.9), u(0.08, 0.2), u(0.14, 0.34)
    s = np.linspace(-1, 1, 9)
    profile = np.clip(1 - np.abs(s - u(0.0, 0.3)) ** u(1.6, 2.6), 0.12, 1)
    b.tube(np.stack([s * length, np.zeros(9), u(-0.05, 0.05) * s], 1), np.stack([profile * width, profile * height], 1))
    fin = u(0.12, 0.3)
    upright = (0.0, 0.0, 1.0) if b.rng.random() < 0.75 else (0.0, 1.0, 0.0)  # fish or whale
    limb = b.limb("tail", 0, 0, (-length * 0.6, 0, 0), (-length - fin, 0, 0))
    b.tube(
        np.linspace((-length * 0.9, 0, 0), (-length - fin, 0, 0), 4),
        np.stack([np.linspace(0.05, fin * u(0.8, 1.4), 4), np.full(4, 0.02)], 1),
        limb,
        (0.4, 1),
        tint=1,
        sides=6,
        wide=upright,
    )
    if b.rng.random() < 0.8:
        b.tube(
            np.linspace((0.1, 0, height * 0.8), (-0.15, 0, height + u(0.05, 0.25)), 3),
            np.stack([np.linspace(0.15, 0.05, 3), np.full(3, 0.02)], 1),
            tint=2,
            sides=5,
            wide=(1.0, 0.0, 0.0),
        )
    for side in (1, -1):
        root = np.array([length * 0.3, side * width * 0.8, -height * 0.3])
        tip = root + u(0.12, 0.35) * np.array([-0.5, side * 0.8, -0.3])
        limb = b.limb("wing", side, 0, root, tip)
        b.tube(
            np.linspace(root, tip, 4),
            np.stack([np.linspace(0.08, 0.04, 4), np.full(4, 0.015)], 1),
            limb,
            tint=1,
            sides=5,
            wide=(1.0, 0.0, 0.0),
        )


def _snake(b: _Builder) -> None:
    u = b.rng.uniform
    s = np.linspace(-1, 1, 14)
    waves, size = u(0.0, 2.0), u(0.0, 0.12)
    points = np.stack([s * 0.9, size * np.sin(s * math.pi * waves), u(0.0, 0.5) * np.clip(s - 0.5, 0, 1)], 1)
    thickness = u(0.04, 0.12)
    b.tube(points, thickness * np.clip(np.linspace(0.15, 2.2, 14), 0, 1))
    limb = b.limb("head", 0, 0, points[-3], points[-1] + [thickness, 0, 0])
    b.ball(points[-1], thickness * np.array([1.8, 1.3, 1.0]), limb, tint=1)


def _plant(b: _Builder) -> None:
    u, rng = b.rng.uniform, b.rng
    height, thickness = u(0.8, 1.4), u(0.03, 0.12)
    s = np.linspace(0, 1, 8)
    points = np.stack([u(-0.2, 0.2) * s**2, u(-0.2, 0.2) * s**2, s * height], 1)
    b.tube(points, thickness * np.linspace(1.4, 0.6, 8))
    if rng.random() < 0.5:
        b.tube([(0, 0, -0.2), (0, 0, 0), (0, 0, 0.1)], np.array([0.7, 1, 1.05]) * u(0.15, 0.3), tint=2)
    for _ in range(int(rng.integers(0, 7))):
        k = int(rng.integers(2, 8))
        turn, up, length = u(0, 2 * math.pi), u(-0.3, 0.8), u(0.15, 0.45)
        tip = points[k] + length * np.array([math.cos(turn), math.sin(turn), up])
        b.tube(
            np.linspace(points[k], tip, 4),
            np.stack([u(0.03, 0.12) * np.array([0.4, 1, 0.9, 0.2]), np.full(4, 0.02)], 1),
            tint=1,
            sides=6,
        )
    if rng.random() < 0.7:
        b.ball(points[-1], u(0.1, 0.4) * np.array([1, 1, u(0.6, 1.3)]), tint=3, axis=2)


def _insect(b: _Builder) -> None:
    u, rng = b.rng.uniform, b.rng
    body, back = u(0.14, 0.26), u(0.16, 0.34)
    b.ball((0, 0, 0), (body, body * 0.9, body * 0.8))
    b.ball((-body - back * 0.7, 0, u(0, 0.1)), (back, back * 0.85, back * u(0.6, 0.9)), tint=1)
    _head(b, (body * 0.7, 0, 0), u(0, 0.08), u(0.05, 0.15), u(0.07, 0.14), False)
    pairs, reach, arch, thickness = int(rng.integers(3, 5)), u(0.4, 0.8), u(0.0, 0.35), u(0.015, 0.04)
    for row in range(pairs):
        turn = (row / (pairs - 1) - 0.5) * -u(1.2, 2.0)
        for side in (1, -1):
            root = np.array([body * 0.6 * math.sin(turn), side * body * 0.7, 0])
            tip = root + np.array([reach * math.sin(turn), side * reach * math.cos(turn), -u(0.2, 0.4)])
            limb = b.limb("leg", side, row, root, tip)
            b.tube(
                np.stack([root, root * 0.6 + tip * 0.4 + [0, 0, arch * 0.8], root * 0.4 + tip * 0.6 + [0, 0, arch], tip]),
                thickness * np.array([1.3, 1.1, 1, 0.6]),
                limb,
                tint=2,
                sides=5,
            )


def _stack(b: _Builder) -> None:
    u, rng = b.rng.uniform, b.rng
    count = int(rng.integers(5, 10))
    s = np.linspace(0, 1, count)
    knots = rng.uniform(0.1, 0.5, int(rng.integers(2, 6)))
    radii = np.interp(s, np.linspace(0, 1, len(knots)), knots)
    squeeze = u(0.6, 1.0) if rng.random() < 0.4 else 1.0
    b.tube(np.stack([np.zeros(count), np.zeros(count), s * u(0.5, 1.6)], 1), np.stack([radii, radii * squeeze], 1), tint=0)
    if rng.random() < 0.5:
        b.ball((0, 0, s[-1] * 1.1), u(0.1, 0.35, 3), tint=1, axis=2)
    if rng.random() < 0.3:  # a penguin: flippers and feet on a bottle
        for side in (1, -1):
            root = np.array([0, side * radii[count // 2] * 0.9, 0.6])
            tip = root + [0, side * u(0.05, 0.4), -u(0.1, 0.4)]
            limb = b.limb("wing", side, 0, root, tip)
            b.tube(
                np.linspace(root, tip, 4),
                np.stack([np.linspace(0.12, 0.04, 4), np.full(4, 0.03)], 1),
                limb,
                tint=1,
                sides=6,
                wide=(1.0, 0, 0),
            )
    if rng.random() < 0.3:
        b.tube([(0, 0.3, 0.2), (0, 0.5, 0.5), (0, 0.3, 0.8)], np.full(3, 0.06), tint=1)


def _vehicle(b: _Builder) -> None:
    u = b.rng.uniform
    length, width, height = u(0.5, 0.8), u(0.2, 0.35), u(0.1, 0.25)
    b.tube(
        np.linspace((-length, 0, 0), (length, 0, 0), 5),
        np.stack([np.full(5, width), np.full(5, height)], 1) * 1.3,
        sides=4,
    )
    cabin = u(0.2, 0.5)
    b.tube(
        np.linspace((-cabin + u(-0.2, 0.2), 0, height * 1.6), (cabin, 0, height * 1.6), 4),
        np.stack([np.full(4, width), np.full(4, u(0.1, 0.25))], 1) * 1.2,
        tint=1,
        sides=4,
    )
    wheel = u(0.1, 0.2)
    for x in (-0.65, 0.65):
        for side in (1, -1):
            b.tube(
                np.linspace((x * length, side * width * 0.7, -height), (x * length, side * width * 1.1, -height), 3),
                np.full(3, wheel),
                tint=2,
                sides=8,
                wide=(1.0, 0.0, 0.0),
            )


def _blob(b: _Builder) -> None:
    u, rng = b.rng.uniform, b.rng
    for part in range(int(rng.integers(1, 6))):
        centre = rng.uniform(-0.4, 0.4, 3) if part else np.zeros(3)
        if rng.random() < 0.6:
            b.ball(centre, rng.uniform(0.12, 0.45, 3), tint=part, axis=int(rng.integers(3)))
        else:
            direction = rng.normal(size=3)
            direction *= u(0.2, 0.5) / np.linalg.norm(direction)
            b.tube(np.linspace(centre - direction, centre + direction, 5), rng.uniform(0.05, 0.25, 5), tint=part)


_MAKERS = dict(zip(PLANS, (_quadruped, _biped, _bird, _fish, _snake, _plant, _insect, _stack, _vehicle, _blob)))


def light(vertices: np.ndarray, faces: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ambient light and two lamps baked per vertex; [N, 1]."""
    corners = vertices[faces]
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.stack([np.bincount(faces.reshape(-1), np.repeat(face_normals[:, k], 3), len(vertices)) for k in range(3)], 1)
    normals = normals / (np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9)
    lamp, fill = rng.normal(size=3) + [0, 0, 1.2], rng.normal(size=3)
    ambient = rng.uniform(0.35, 0.75)
    light = (
        ambient
        + (1 - ambient) * 0.85 * np.clip(normals @ (lamp / np.linalg.norm(lamp)), 0, 1)
        + 0.2 * np.clip(normals @ (fill / np.linalg.norm(fill)), 0, 1)
    )
    return light[:, None]


def paint(vertices: np.ndarray, tints: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Plain, striped, faded, spotted or one-coloured; [N, 3]."""
    second, pattern, frequency = rng.random(3), rng.integers(6), rng.uniform(8, 36)
    if pattern == 1:
        mix = np.sin(vertices[:, rng.integers(3)] * frequency) > 0
    elif pattern == 2:
        mix = np.clip(vertices[:, rng.integers(3)] * 1.2 + 0.5, 0, 1)
    elif pattern == 3:
        mix = np.sin(vertices * frequency * 0.6).prod(1) > 0.1
    elif pattern == 4:
        return np.tile(second * 0.8 + 0.15, (len(vertices), 1))
    else:
        return tints
    mix = mix[:, None].astype(float)
    return tints * (1 - mix) + second * mix


def make_object(rng: np.random.Generator, plan: str | None = None) -> ProceduralObject:
    """A random object of a random (or the given) plan, in canonical space."""
    plan = PLANS[int(rng.choice(len(PLANS), p=_PLAN_SHARES))] if plan is None else plan
    b = _Builder(rng, int(rng.choice([4, 6, 8, 8, 10])))
    _MAKERS[plan](b)
    vertices, faces = np.concatenate(b.vertices), np.concatenate(b.faces).astype(np.int32)
    limbs = b.limbs
    points = np.concatenate([vertices, *[np.stack(limb[3:5]) for limb in limbs]])  # limb roots and tips follow the deformation
    points = points * rng.uniform(0.88, 1.14, 3)
    wobble = rng.uniform(0, 0.035)
    wave, phase = rng.normal(size=(3, 3)) * 3.5, rng.uniform(0, 2 * math.pi, 3)
    points = points + wobble * np.sin(points @ wave + phase)
    yaw = rng.normal() * 0.05
    c, s = math.cos(yaw), math.sin(yaw)
    points = points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    low, high = points[: len(vertices)].min(0), points[: len(vertices)].max(0)
    points = points - (low + high) / 2
    points /= np.linalg.norm(points[: len(vertices)], axis=1).max()
    canonical = points[: len(vertices)]
    colors = np.clip(paint(canonical, np.concatenate(b.tints), rng) * light(canonical, faces, rng), 0, 1)
    ends = points[len(vertices) :].reshape(-1, 2, 3)
    made = [
        Limb(role, side, row, ends[k, 0], ends[k, 1], np.concatenate(b.members[k]), np.concatenate(b.along[k]))
        for k, (role, side, row, _, _) in enumerate(limbs)
    ]
    return ProceduralObject(plan, canonical.astype(np.float32), faces, colors.astype(np.float32), made)
