"""How good is a motion generator? Held-out procedural objects whose true motions are known exactly."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from track4d_protocol import space

from ..geometry import zbuffer
from ..geometry.mesh import Mesh
from ..video.diffusion import BASIS_FRAMES, frame_times
from ..video.generator import STEPS, MotionGenerator
from ..video.text import VERBS
from .actions import SIDED, draw_action, suits
from .objects import ProceduralObject, make_object
from .verbs import Action, animate

SIZE = 32  # of the pictures that are compared
CAPTURE = 128  # of the static views
HELD_OUT_SEED = 99991  # training draws from sequences of two numbers, never from this one
_TIMES = frame_times(BASIS_FRAMES).numpy()
_VIEWMATS = space.orbit_viewmats()


@dataclass
class Trial:
    """A held-out object, what it should do and the sentence that says so.

    Attributes:
        truth: [F, N, 3].
        references: per verb, its video at nominal amplitude and speed, and that of its mirror image where it has two sides: who
            waves the other hand waves too.
    """

    thing: ProceduralObject
    mesh: Mesh
    views: np.ndarray
    action: Action
    prompt: str
    truth: np.ndarray
    references: list[list[np.ndarray]]


@dataclass(frozen=True)
class Score:
    """One generated sample against the truth.

    Attributes:
        verb: that it looks like.
        unlikeness: to the nearest reference video of each verb, squared differences summed; the verb's is the least.
        error: mean end-point error, canonical.
        iou: of the silhouettes.
        psnr: of the foreground, dB.
        magnitude: mean displacement over the true one.
        seconds: it took.
    """

    verb: int
    unlikeness: tuple[float, ...]
    error: float
    iou: float
    psnr: float
    magnitude: float
    seconds: float


def video(thing: ProceduralObject, mesh: Mesh, vertices: np.ndarray) -> np.ndarray:
    """[F, V, SIZE, SIZE, 4] premultiplied."""
    return zbuffer.render(mesh, vertices, _VIEWMATS, space.intrinsics(SIZE, 4), SIZE, shading=thing.colors)


def capture(thing: ProceduralObject) -> tuple[Mesh, np.ndarray]:
    """The mesh, and its views [V, CAPTURE, CAPTURE, 4] uint8 with straight alpha, as the add-on would send them."""
    mesh = Mesh(thing.vertices, thing.faces, textures=[np.ones((1, 1, 3), np.float32)])
    rgba = zbuffer.render(mesh, thing.vertices[None], _VIEWMATS, space.intrinsics(CAPTURE, 4), CAPTURE, shading=thing.colors)[0]
    rgba[..., :3] /= np.maximum(rgba[..., 3:], 1e-6)
    return mesh, (rgba.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def make_trial(seed: int, verb: int, index: int = 0) -> Trial:
    """The `index`-th held-out trial of a verb."""
    rng = np.random.default_rng([HELD_OUT_SEED, seed, verb, index])
    thing = make_object(rng)
    while not suits(thing, verb, rng):
        thing = make_object(rng)
    action, _, _ = draw_action(rng, verb, plain=True)
    mesh, views = capture(thing)
    references = [[video(thing, mesh, animate(thing, Action(other, side=side), _TIMES)) for side in _sides(other)]
                  for other in range(len(VERBS))]
    prompt = f"the {thing.plan} {VERBS[verb].phrases[0]} plainly"  # in the manner that the true motion is made in
    return Trial(thing, mesh, views, action, prompt, animate(thing, action, _TIMES), references)


def _sides(verb: int) -> tuple[int, ...]:
    return (1, -1) if VERBS[verb].name in SIDED | {"walk", "run"} else (1,)  # with the left or with the right foot first


def judge(trial: Trial, tracks: np.ndarray, seconds: float = 0.0) -> Score:
    """Scores vertex tracks [F, N, 3]; the verb is that of the nearest reference video."""
    seen = video(trial.thing, trial.mesh, tracks)
    truth = video(trial.thing, trial.mesh, trial.truth)
    unlikeness = tuple(float(min(((seen - one) ** 2).sum() for one in references)) for references in trial.references)
    error = np.linalg.norm(tracks - trial.truth, axis=-1)[1:].mean()
    overlap = np.minimum(seen[1:, ..., 3], truth[1:, ..., 3]).sum() / np.maximum(seen[1:, ..., 3], truth[1:, ..., 3]).sum()
    inside = np.maximum(seen[..., 3], truth[..., 3]) > 0.05
    psnr = -10 * np.log10(max(float(((seen - truth) ** 2)[inside].mean()), 1e-9))
    size = np.linalg.norm(tracks - tracks[:1], axis=-1).mean() / max(
        np.linalg.norm(trial.truth - trial.truth[:1], axis=-1).mean(), 1e-6
    )
    return Score(int(np.argmin(unlikeness)), unlikeness, float(error), float(overlap), psnr, float(size), seconds)


def run_trial(
    generator: MotionGenerator, trial: Trial, samples: int, steps: int = STEPS, guidance: float | None = None
) -> list[tuple[Score, np.ndarray]]:
    """Scores and tracks of `samples` seeds."""
    results = []
    for seed in range(samples):
        start = time.perf_counter()
        motion = generator.generate(
            trial.mesh,
            trial.views,
            _VIEWMATS,
            space.intrinsics(CAPTURE, 4),
            trial.prompt,
            steps=steps,
            guidance=guidance,
            seed=seed,
        )
        results.append((judge(trial, motion.tracks, time.perf_counter() - start), motion.tracks))
    return results
