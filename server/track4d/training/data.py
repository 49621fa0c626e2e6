"""Training samples: a random object, what it does, and what the four cameras of the capture see of it.

Only the rest pose is drawn. The motion of a pixel is the barycentric mix of its triangle's vertex trajectories,
already in coefficients over time: the displacement latent without drawing a single moving frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from track4d_protocol import space

from ..video.diffusion import BASE_GRID, BASIS_FRAMES, LATENT_SCALE, frame_times, temporal_basis
from ..video.maps import condition, surface_maps
from ..video.text import tokenise
from .actions import NOUNS, draw_action, draw_prompt, draw_verb
from .clips import WHOLE_BODY_SHARE, ClipObject, draw_clip
from .objects import ProceduralObject, make_object
from .verbs import Action, animate

REAL_SHARE = 0.12  # real bodies, for the verbs that have no weights of their own for motions as real clips have them
NATURAL_REAL_SHARE = 0.9  # where only real motions are to be learnt; the rest keeps it from knowing those few bodies alone
ACTIONS_PER_OBJECT = 4  # making and drawing an object costs more than moving it
_BASIS = temporal_basis(frame_times(BASIS_FRAMES)).numpy()  # [16, K]
NOMINAL_SHARE = 0.4  # of the objects are seen by the capture's own cameras, the others by cameras near them


@dataclass
class Batch:
    """Samples for one training step.

    Attributes:
        latent: [B, V, 3 K, R, R], channels last in memory.
        condition: [B, V, 8, R, R]; mask: [B, V, 1, R, R]; tokens: [B, MAX_TOKENS] int64.
    """

    latent: Tensor
    condition: Tensor
    mask: Tensor
    tokens: Tensor


def motion_coefficients(trajectories: np.ndarray) -> np.ndarray:
    """Trajectories [16, N, 3], rest first, to coefficients [N, K * 3] (coefficient-major)."""
    displacement = trajectories - trajectories[:1]
    return np.tensordot(_BASIS, displacement, (0, 0)).transpose(1, 0, 2).reshape(displacement.shape[1], -1)


def draw_cameras(rng: np.random.Generator, grid: int) -> tuple[np.ndarray, np.ndarray]:
    """The capture's four cameras, or others with more or less perspective, from higher or lower: [4, 4, 4] and [4, 3, 3]."""
    if rng.random() < NOMINAL_SHARE:
        return space.orbit_viewmats(), space.intrinsics(grid, 4)
    angle = float(rng.uniform(28, 54))
    distance = space.DISTANCE * math.sin(math.radians(space.FIELD_OF_VIEW / 2)) / math.sin(math.radians(angle / 2))
    azimuths = np.add(space.AZIMUTHS, rng.uniform(-8, 8))
    return space.orbit_viewmats(azimuths, rng.uniform(2, 32), distance), space.intrinsics(grid, 4, angle)


def encode(
    vertices: np.ndarray,
    faces: np.ndarray,
    colors: np.ndarray,
    trajectories: list[np.ndarray],
    viewmats: np.ndarray,
    Ks: np.ndarray,
    grid: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Several motions of one object as the network sees them.

    Args:
        vertices: [N, 3]; faces: [T, 3]; colors: [N, 3] sRGB 0..1.
        trajectories: A motions, each [16, N, 3] from the rest pose.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of `grid`.

    Returns:
        latents [A, V, 3 K, R, R]; condition [V, 8, R, R]; mask [V, 1, R, R].
    """
    values = np.concatenate([colors, vertices, *map(motion_coefficients, trajectories)], 1)
    maps, coverage = surface_maps(vertices, faces, values, viewmats, Ks, grid)
    rgba = np.concatenate([maps[..., :3], np.ones_like(maps[..., :1])], -1) * coverage[..., None]
    latents = maps[..., 6:].reshape(*maps.shape[:3], len(trajectories), -1).transpose(3, 0, 1, 2, 4) * LATENT_SCALE
    return latents.transpose(0, 1, 4, 2, 3), condition(rgba, maps[..., 3:6], coverage), (coverage > 0)[:, None].astype(np.float32)


def _prompted_actions(rng: np.random.Generator, thing: ProceduralObject) -> list[tuple[Action, str]]:
    drawn = [draw_action(rng, draw_verb(rng, thing)) for _ in range(ACTIONS_PER_OBJECT)]
    return [(action, draw_prompt(rng, NOUNS[thing.plan], action.verb, size, pace)) for action, size, pace in drawn]


def make_batch(
    seed: int, step: int, size: int, real: list[ClipObject] | None = None, grid: int = BASE_GRID, natural: bool = False
) -> Batch:
    """The batch of one training step: a function of its arguments alone, so a resumed training sees the same data.

    Args:
        size: a multiple of `ACTIONS_PER_OBJECT`.
        real: real animated meshes, for `REAL_SHARE` of the samples.
        grid: pixels along a side.
        natural: real motions are what matters: `NATURAL_REAL_SHARE` of the samples, and real meshes do nothing else.
    """
    rng = np.random.default_rng([seed, step])
    share, whole_body = (NATURAL_REAL_SHARE, 0.0) if natural else (REAL_SHARE, WHOLE_BODY_SHARE)
    times = frame_times(BASIS_FRAMES).numpy()
    latents, conditions, masks = [], [], []
    tokens: list[list[int]] = []

    def add(vertices: np.ndarray, faces: np.ndarray, colors: np.ndarray, motions: list[np.ndarray], prompts: list[str]) -> None:
        latent, seen, mask = encode(vertices, faces, colors, motions, *draw_cameras(rng, grid), grid)
        latents.append(latent)
        conditions.extend([seen] * len(motions))
        masks.extend([mask] * len(motions))
        tokens.extend(tokenise(prompt) for prompt in prompts)

    for _ in range(size // ACTIONS_PER_OBJECT):
        if real and rng.random() < share:
            for _ in range(ACTIONS_PER_OBJECT):
                mesh = real[int(rng.integers(len(real)))]
                trajectory, colors, prompt = draw_clip(rng, mesh, times, whole_body)
                add(trajectory[0], mesh.faces, colors, [trajectory], [prompt])
        else:
            thing = make_object(rng)
            actions = _prompted_actions(rng, thing)
            motions = [animate(thing, action, times) for action, _ in actions]
            add(thing.vertices, thing.faces, thing.colors, motions, [prompt for _, prompt in actions])
    channels_last = np.empty((size, *latents[0].shape[1:2], grid, grid, latents[0].shape[2]), np.float32)
    np.concatenate([latent.transpose(0, 1, 3, 4, 2) for latent in latents], out=channels_last)
    return Batch(
        torch.from_numpy(channels_last).permute(0, 1, 4, 2, 3),
        torch.from_numpy(np.stack(conditions)),
        torch.from_numpy(np.stack(masks)),
        torch.tensor(tokens),
    )
