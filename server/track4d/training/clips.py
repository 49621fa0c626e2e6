"""Real animated meshes in the training: what `tools/extract_clips.py` wrote, phase-aligned and repainted."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..video.text import NATURALLY, SIDES, SPEEDS, VERB_NAMES
from .actions import SIDED, draw_action, draw_prompt
from .objects import ProceduralObject, light, paint
from .verbs import FLIP, animate

# Cycles of the dominant rhythm in a 16-frame clip at speed 1: those of the procedural verbs, so that both agree.
_RHYTHM = {"walk": 1.0, "run": 2.0, "fly": 2.0, "swim": 1.5, "nod": 2.0, "wave": 2.0, "bounce": 2.0}
_WHOLE_BODY = ("bounce", "squash and stretch", "spin", "shake", "sway", "twist", "bend left", "bend right", "pulse")
_FAR = 0.35  # mean distance from the rest pose, canonical, beyond which a clip starts in its own pose
_TURNED = math.radians(40)  # about the vertical, likewise
_POSED_SHARE = 0.3  # of samples start in a pose of the clip rather than in the rest pose
# Of the others, those whose rest pose is one of another clip: who rests with bent arms walks as who lets them hang.
_OTHER_REST_SHARE = 0.3
# How often a mesh does what it can do; 1 for all others.
_OFTEN = {"walk": 2.0, "run": 2.0, "sit": 3.0, "wave": 3.0, "eat": 3.0, "dance": 3.0, "punch": 2.0, "clap": 2.0}
_TAKE_SIDES = frozenset(("wave", "punch", "kick", "die", "attack"))
WHOLE_BODY_SHARE = 0.5  # of samples need no limbs, and so no clip
_ONE_SIDED = 0.1  # by which share of the motion one half has to do more than the other


@dataclass
class Clip:
    """One motion of a mesh.

    Attributes:
        verb: index into `VERBS`.
        poses: [P, N, 3] float16, canonical; one loop, or the whole length.
        loops: whether the last pose leads to the first.
        start: phase, in 0..1, that follows naturally from the rest pose.
        rate: loops in a 16-frame video at speed 1.
        posed: the rest pose is no start for it (it lies in another place, or faces another way).
        side: 1 to the left or without a side, -1 to the right.
    """

    verb: int
    poses: np.ndarray
    loops: bool
    start: float
    rate: float
    posed: bool
    side: int

    def at(self, phases: np.ndarray) -> np.ndarray:
        """Poses [F, N, 3] at phases [F], linearly between the stored ones."""
        count = len(self.poses)
        place = np.mod(phases, 1.0) * count if self.loops else np.clip(phases, 0, 1) * (count - 1)
        low = np.floor(place).astype(int)
        high = (low + 1) % count if self.loops else np.minimum(low + 1, count - 1)
        share = (place - low).astype(np.float32)[:, None, None]
        return self.poses[low % count] * (1 - share) + self.poses[high] * share


@dataclass
class ClipObject:
    """A real mesh at rest, and its clips."""

    noun: str
    rest: np.ndarray
    faces: np.ndarray
    clips: list[Clip]


def _rhythm(poses: np.ndarray) -> int:
    """The strongest of the first three harmonics of the motion."""
    spectrum = np.abs(np.fft.rfft(poses - poses.mean(0), axis=0)[1:4])
    return int((spectrum**2).sum((1, 2)).argmax()) + 1


def _start(verb: str, rest: np.ndarray, poses: np.ndarray, harmonic: int) -> float:
    """The phase at which, as in the procedural verbs, the left front foot starts forwards or the wings upwards."""
    if verb in ("walk", "run"):
        low = rest[:, 2] < np.median(rest[:, 2])
        front = low & (rest[:, 0] >= np.median(rest[low, 0]))
        left, right = front & (rest[:, 1] > 0.02), front & (rest[:, 1] < -0.02)
        if not left.any() or not right.any():
            return 0.0
        signal = poses[:, left, 0].mean(1) - poses[:, right, 0].mean(1)
    elif verb == "fly":
        signal = poses[:, np.abs(rest[:, 1]) > 0.6 * np.abs(rest[:, 1]).max(), 2].mean(1)
    else:
        return float(((poses - rest) ** 2).sum((1, 2)).argmin()) / len(poses)
    phase = np.angle(np.fft.rfft(signal)[harmonic])  # cos(2 pi h t + phase); a sine starts where that is -pi / 2
    return float(np.mod(-math.pi / 2 - phase, 2 * math.pi) / (2 * math.pi * harmonic))


def _side(verb: str, rest: np.ndarray, poses: np.ndarray) -> int:
    """1 where a clip happens to the left, as the procedural verbs do, or has no side; -1 where to the right."""
    if verb not in _TAKE_SIDES:
        return 1
    effort = ((poses - poses.mean(0)) ** 2).sum((0, 2))
    left, right = effort[rest[:, 1] > 0].sum(), effort[rest[:, 1] < 0].sum()
    if verb == "die":  # who falls to the left lifts the right side over it
        left, right = right, left
    return -1 if right - left > _ONE_SIDED * (left + right) else 1


def _turn(rest: np.ndarray, pose: np.ndarray) -> float:
    """The angle about the vertical that best takes [N, 3] to [N, 3]; radians, not signed."""
    a, b = rest[:, :2] - rest[:, :2].mean(0), pose[:, :2] - pose[:, :2].mean(0)
    h = a.T @ b
    return abs(math.atan2(h[0, 1] - h[1, 0], h[0, 0] + h[1, 1]))


def load_clips(folder: Path) -> list[ClipObject]:
    """Every .npz of a folder, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as data:
            rest, clips = data["rest"], []
            for verb, poses, loops in zip(data["verbs"], data["clips"], data["loops"]):
                verb, stored, poses = str(verb), poses, poses.astype(np.float32)
                harmonic = _rhythm(poses) if loops and verb in _RHYTHM else 1
                start = _start(verb, rest, poses, harmonic) if loops and verb != "jump" else 0.0
                posed = float(np.linalg.norm(poses[0] - rest, axis=1).mean()) > _FAR or _turn(rest, poses.mean(0)) > _TURNED
                rate, side = _RHYTHM.get(verb, 1.0) / harmonic, _side(verb, rest, poses)
                clips.append(Clip(VERB_NAMES.index(verb), stored, bool(loops), start, rate, posed, side))
            found.append(ClipObject(str(data["noun"]), rest, data["faces"], clips))
    return found


def _canonical(trajectory: np.ndarray) -> np.ndarray:
    """Centres and scales [F, N, 3] by its first frame."""
    low, high = trajectory[0].min(0), trajectory[0].max(0)
    centred = trajectory - (low + high) / 2
    return centred / np.linalg.norm(centred[0], axis=1).max()


def _draw_rest(rng: np.random.Generator, thing: ClipObject) -> np.ndarray:
    """The mesh's rest pose, or another in which it could be captured: a moment of a clip that stays near it; [N, 3]."""
    near = [clip for clip in thing.clips if not clip.posed]
    if not near or rng.random() >= _OTHER_REST_SHARE:
        return thing.rest
    poses = near[int(rng.integers(len(near)))].poses
    pose = poses[int(rng.integers(len(poses)))].astype(np.float32)
    return pose if float(np.linalg.norm(pose - thing.rest, axis=1).mean()) < _FAR else thing.rest


def _draw_played(rng: np.random.Generator, thing: ClipObject, times: np.ndarray) -> tuple[np.ndarray, str, str, str, bool]:
    """One of the mesh's clips, from the rest pose or from its own: trajectory, verb, pace, side, whether it is mirrored."""
    names = [VERB_NAMES[clip.verb] for clip in thing.clips]
    shares = np.array([_OFTEN.get(name, 1.0) / names.count(name) for name in names])
    clip = thing.clips[int(rng.choice(len(shares), p=shares / shares.sum()))]
    name, side = VERB_NAMES[clip.verb], ""
    pace = str(rng.choice(list(SPEEDS), p=[0.15, 0.7, 0.15]))
    speed = SPEEDS[pace] * float(rng.uniform(0.96, 1.04))
    posed = clip.posed or rng.random() < _POSED_SHARE
    start = float(rng.random()) if posed and clip.loops else clip.start
    trajectory = clip.at(start + times * (15 / 16 * speed * clip.rate))
    if not posed:  # into the motion within three frames
        x = np.clip(times * 15 / 2.5, 0, 1).astype(np.float32)[:, None, None]
        rest = _draw_rest(rng, thing)
        trajectory = rest + x * x * (3 - 2 * x) * (trajectory - rest)
    if name in SIDED & _TAKE_SIDES and rng.random() < 0.25:
        side = str(rng.choice(list(SIDES)))
    mirrored = clip.side * SIDES.get(side, 1) < 0
    return trajectory * FLIP if mirrored else trajectory, name, pace, side, mirrored


def draw_clip(
    rng: np.random.Generator, thing: ClipObject, times: np.ndarray, whole_body: float = WHOLE_BODY_SHARE
) -> tuple[np.ndarray, np.ndarray, str]:
    """A motion of a real mesh, to the left as long as the sentence doesn't say "right".

    Args:
        times: [F], 0 to 1.
        whole_body: share of designed motions that any body can do.

    Returns:
        trajectory [F, N, 3] float32 from the pose of the pictures on, colours [N, 3], and a sentence.
    """
    stretch, faces = rng.uniform(0.9, 1.12, 3).astype(np.float32), thing.faces
    if rng.random() < whole_body:
        rest = _canonical((thing.rest * stretch)[None])[0].astype(np.float32)
        action, size, pace = draw_action(rng, VERB_NAMES.index(str(rng.choice(_WHOLE_BODY))))
        trajectory = animate(ProceduralObject("blob", rest, faces, rest, []), action, times)
        prompt = draw_prompt(rng, [thing.noun], action.verb, size, pace)
    else:
        played, name, pace, side, mirrored = _draw_played(rng, thing, times)
        trajectory = _canonical(played * stretch).astype(np.float32)
        faces = faces[:, ::-1] if mirrored else faces
        prompt = f"{NATURALLY} " + draw_prompt(rng, [thing.noun], VERB_NAMES.index(name), "", f"{pace} {side}".strip())
    rest = trajectory[0]
    palette, places = rng.random((4, 3)) * 0.85 + 0.12, rng.uniform(-0.8, 0.8, (4, 3))
    tints = palette[((rest[:, None] - places) ** 2).sum(-1).argmin(1)]
    colors = np.clip(paint(rest, tints, rng) * light(rest, faces, rng), 0, 1)
    return trajectory, colors.astype(np.float32), prompt
