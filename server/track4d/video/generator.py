"""The motion generator: pictures of a mesh and a sentence in, the mesh's motion and its multi-view video out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from safetensors import SafetensorError, safe_open
from scipy.spatial import cKDTree
from track4d_protocol.errors import InputError

from ..geometry import zbuffer
from ..geometry.mesh import Mesh, weld
from ..progress import Report, silent
from . import text
from .diffusion import BASIS_FRAMES, COEFFICIENTS, LATENT_SCALE, add_noise, frame_times, sample, temporal_basis
from .maps import condition, shrink, surface_maps
from .motion_unet import MotionUNet, Observed, UNetConfig
from .sampling import guided

WEIGHTS = Path(__file__).parent / "weights" / "motion.safetensors"
GUIDANCE = 1.5  # classifier-free guidance: 1 is without, and half the work; more exaggerates the motion
NATURAL_GUIDANCE = 3.0  # of motions learnt from real clips, of which there were few: they take less from the sentence
# The first and the last steps go without guidance (Kynkaanniemi et al. 2024, guidance in a limited interval): from noise alone
# the guesses with the sentence and without are so far apart that more than their difference leads astray, and at the end it
# would only make the motion larger than it should be.
GUIDED_BELOW = 0.9  # noise level
GUIDED_ABOVE = 0.1  # noise level; where steps are few, the last one at least
STEPS = 8  # more are no better: what a sentence asks of a mesh leaves little to chance (weights/motion.md)
CANDIDATES = 4  # begun for every answer, of which the likeliest is finished
CHOSEN_BELOW = 0.5  # noise level; what kind of motion it becomes is decided before
DOUBT_LEVEL = 0.85  # noise level at which candidates are compared: where the kind of motion is decided


@dataclass
class GeneratedMotion:
    """What the generator answers.

    Attributes:
        displacement: [V, F, R, R, 3] float32, from the rest pose, canonical, of what each pixel of the static views
            sees.
        mask: [V, R, R] bool, pixels that see the object.
        tracks: [F, N, 3] float32 vertex positions, canonical; frame 0 is the rest pose; vertices in one place stay
            together.
        confidence: [N] float32 in 0..1; 0 where no view sees the vertex.
    """

    displacement: np.ndarray
    mask: np.ndarray
    tracks: np.ndarray
    confidence: np.ndarray


class MotionGenerator:
    """The shipped text-conditioned multi-view motion diffusion model.

    Load once, generate often; not for several threads at once.
    """

    def __init__(self, network: MotionUNet) -> None:
        self.network = network.eval()

    @classmethod
    def load(cls, path: Path | None = None) -> MotionGenerator:
        """Reads weights written by `track4d train motion`; the shipped ones by default.

        Raises:
            InputError: the file is absent, damaged, or was trained by an incompatible version.
        """
        path = WEIGHTS if path is None else Path(path)
        action = "Install Track4D again, or train anew with `track4d train motion`."
        try:
            with safe_open(path, "pt") as file:
                config = json.loads((file.metadata() or {})["config"])
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}
            network = MotionUNet(UNetConfig(**config | {"channels": tuple(config["channels"])}))
            if network.config.vocabulary != text.VOCABULARY_SIZE:
                raise ValueError(f"vocabulary of {network.config.vocabulary}, this version has {text.VOCABULARY_SIZE}")
            network.load_state_dict(tensors)
        except FileNotFoundError:
            raise InputError("weights_missing", f"The generator's weights {path} are not there.", action) from None
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError("bad_weights", f"The generator's weights {path} can't be read: {error}.", action) from error
        return cls(network)

    @staticmethod
    def known_verbs() -> list[str]:
        """The motions it has learnt."""
        return text.known_verbs()

    @staticmethod
    def known_words() -> list[str]:
        """Every word with a meaning of its own."""
        return text.known_words()

    @staticmethod
    def unknown_words(prompt: str) -> list[str]:
        """Words that should describe the motion but mean nothing to it."""
        return text.unknown_words(prompt)

    def generate(
        self,
        mesh: Mesh,
        views: np.ndarray,
        viewmats: np.ndarray,
        Ks: np.ndarray,
        prompt: str,
        frames: int = 16,
        steps: int = STEPS,
        guidance: float | None = None,
        seed: int = 0,
        report: Report = silent,
    ) -> GeneratedMotion:
        """Makes up a motion, the likeliest of `CANDIDATES`; the same seed gives the same one.

        Args:
            mesh: at rest, canonical space.
            views: [V, H, W, 4] uint8 sRGB, straight alpha; the four views of `space.orbit_viewmats`, V = 4.
            viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of the pictures.
            prompt: a sentence; empty for a motion of the model's own choice.
            frames: of the video, at least 2; the motion takes the same span of time whatever their number.
            steps: of the sampler.
            guidance: classifier-free guidance scale; None for the one that suits the manner of the sentence.
            seed: of the noise.
            report: stage "generate", once before each step and once at the end; may raise `Cancelled`.
        """
        grid = self.network.config.grid
        seen, maps, coverage = self.observe(mesh, views, viewmats, Ks)
        shape = (CANDIDATES, len(views), self.network.config.latent, grid, grid)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        tokens = torch.tensor([text.read(prompt)])
        if guidance is None:
            guidance = NATURAL_GUIDANCE if text.is_natural(prompt) else GUIDANCE
        latent = self.sample(seen, tokens, noise, steps, guidance, lambda step: report("generate", step, steps))
        report("generate", steps, steps)
        coefficients = latent.numpy().reshape(len(views), COEFFICIENTS, 3, grid, grid) / LATENT_SCALE
        mask = coverage > 0
        coefficients *= mask[:, None, None]
        basis = temporal_basis(frame_times(frames)).numpy()  # [F, K]
        displacement = np.einsum("fk,vkchw->vfhwc", basis, coefficients).astype(np.float32)
        Ks_grid = zbuffer.scale_intrinsics(Ks, grid / views.shape[1])
        lifted, confidence = lift(mesh.vertices, coefficients, maps, coverage, viewmats, Ks_grid)
        tracks = mesh.vertices + np.einsum("fk,nkc->fnc", basis, lifted)
        return GeneratedMotion(displacement, mask, tracks.astype(np.float32), confidence)

    def observe(
        self, mesh: Mesh, views: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray
    ) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
        """What the network sees of an object; arguments as of `generate`.

        Returns:
            condition [1, V, 8, R, R], rest position behind each pixel [V, R, R, 3], coverage [V, R, R].
        """
        grid = self.network.config.grid
        Ks_grid = zbuffer.scale_intrinsics(Ks, grid / views.shape[1])
        maps, coverage = surface_maps(mesh.vertices, mesh.faces, mesh.vertices, viewmats, Ks_grid, grid)
        return torch.from_numpy(condition(shrink(views, grid), maps, coverage))[None], maps, coverage

    def predictions(
        self, noisy: torch.Tensor, seen: torch.Tensor | Observed, noise_level: torch.Tensor, tokens: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latents that the network believes in, with the sentence and without it.

        Args:
            noisy: [B, V, 3 K, R, R].
            seen: [B, V, 8, R, R] from `observe`, or what the network has made of it.
            noise_level: [B] in 0..1.
            tokens: [B, MAX_TOKENS] int64.
        """
        free = torch.ones(len(noisy), dtype=torch.bool, device=noisy.device)
        return self.network(noisy, seen, noise_level, tokens), self.network(noisy, seen, noise_level, tokens, free)

    @torch.no_grad()
    def doubt(self, latents: torch.Tensor, seen: Observed, tokens: torch.Tensor) -> torch.Tensor:
        """How badly the network explains each motion, given the object and the sentence: its training loss there, [B].

        A bound on the likelihood (Ho et al. 2020, Eq. 5) at a single noise level, with the same noise for all.

        Args:
            latents: [B, V, 3 K, R, R] clean.
            seen: what the network has made of B objects.
            tokens: [B, MAX_TOKENS] int64.
        """
        noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).expand_as(latents)
        level = torch.full((len(latents),), DOUBT_LEVEL)
        clean = self.network(add_noise(latents, noise, level), seen, level, tokens)
        wrong, size = ((part * seen.mask).flatten(1).square().sum(1) for part in (clean - latents, latents))
        return wrong / size.sqrt().clamp(min=1e-6)

    def denoise(
        self, noisy: torch.Tensor, noise_level: float, prompt: str, seen: torch.Tensor, guidance: float = 1.0
    ) -> torch.Tensor:
        """z0_hat of 4D-SDS in displacement space (Track4DGen, Eq. 11), with gradient towards `noisy` where it has one.

        Args:
            noisy: [B, V, 3 K, R, R], latents of `encode_tracks` with noise of `diffusion.add_noise`.
            noise_level: 0..1.
            prompt: a sentence.
            seen: [B or 1, V, 8, R, R] from `observe`: the pictures, cameras and rest positions.
            guidance: classifier-free guidance scale; 1 is without.

        Returns:
            clean latents like `noisy`.
        """
        seen = seen.expand(len(noisy), -1, -1, -1, -1)
        level = torch.full((len(noisy),), noise_level)
        tokens = torch.tensor([text.read(prompt)]).expand(len(noisy), -1)
        if guidance == 1:
            return self.network(noisy, seen, level, tokens)
        return guided(*self.predictions(noisy, seen, level, tokens), guidance)

    @torch.no_grad()
    def sample(
        self, seen: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor, steps: int, guidance: float, on_step=None
    ) -> torch.Tensor:
        """The likeliest of B motions of one object.

        Args:
            seen: [1, V, 8, R, R] from `observe`; tokens: [1, MAX_TOKENS] int64.
            noise: [B, V, 3 K, R, R], with which they begin.

        Returns:
            [V, 3 K, R, R] clean.
        """
        one = self.network.observe(seen)
        observed = {len(noise): one.repeated(len(noise)), 1: one}

        def clean(latent: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            mine = observed[len(latent)], level, tokens.expand(len(latent), -1)
            if guidance == 1 or not max(GUIDED_ABOVE, 1.5 / steps) <= float(level[0]) <= GUIDED_BELOW:
                return self.network(latent, *mine)
            return guided(*self.predictions(latent, *mine), guidance)

        def likeliest(latents: torch.Tensor, level: float) -> torch.Tensor | slice:
            if len(latents) == 1 or level > max(CHOSEN_BELOW, 1 / steps):
                return slice(None)
            return self.doubt(latents, observed[len(latents)], tokens.expand(len(latents), -1)).argmin(0, keepdim=True)

        return sample(clean, noise, steps, on_step, likeliest)[0]


def encode_tracks(tracks: torch.Tensor, seen_by: scipy.sparse.csr_array, views: int) -> torch.Tensor:
    """The generator's latent of a motion, with gradient towards it.

    Args:
        tracks: [16, N, 3] vertex positions, rest pose first.
        seen_by: [V * R * R, N] from `maps.surface_operator`.
        views: V.

    Returns:
        [1, V, 3 K, R, R].
    """
    basis = temporal_basis(frame_times(BASIS_FRAMES)).to(tracks)  # [16, K]
    coefficients = torch.einsum("fk,fnc->nkc", basis, tracks - tracks[:1]).flatten(1)  # [N, 3 K]
    entries = seen_by.tocoo()
    places = np.stack(entries.coords)
    rows = torch.sparse_coo_tensor(places, entries.data, entries.shape, dtype=tracks.dtype, check_invariants=False)
    maps = torch.sparse.mm(rows, coefficients) * LATENT_SCALE  # [V R R, 3 K]
    size = math.isqrt(len(maps) // views)
    return maps.view(1, views, size, size, -1).permute(0, 1, 4, 2, 3)


def lift(
    vertices: np.ndarray,
    fields: np.ndarray,
    positions: np.ndarray,
    coverage: np.ndarray,
    viewmats: np.ndarray,
    Ks: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Values of picture pixels, brought back to the vertices they show.

    A vertex takes the pixels around its projection whose surface point is the vertex's own place; hidden vertices take
    the mean of the nearest seen ones.

    Args:
        vertices: [N, 3] canonical.
        fields: [V, K, 3, R, R] per pixel.
        positions: [V, R, R, 3] rest position behind each pixel; coverage: [V, R, R].
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of the fields.

    Returns:
        [N, K, 3] float32 and the confidence [N] in 0..1.
    """
    first, inverse = weld(vertices)
    places = vertices[first]  # [M, 3]
    views, count, _, size, _ = fields.shape
    uv, _ = zbuffer.project(places[None], viewmats, Ks)  # [1, V, M, 2]
    total = np.zeros((len(places), count * 3), np.float32)
    weight = np.zeros(len(places), np.float32)
    for v in range(views):
        covered = (coverage[v] > 0).astype(np.float32)[..., None]
        known = fields[v].reshape(-1, size, size).transpose(1, 2, 0)
        found = _bilinear(np.concatenate([covered, positions[v] * covered, known * covered], -1), uv[0, v])
        share = found[:, :1]
        values = found[:, 1:] / np.maximum(share, 1e-3)
        distance = np.linalg.norm(values[:, :3] - places, axis=1)
        near = np.where(share[:, 0] > 0.05, np.exp(-((distance / 0.07) ** 2)) * share[:, 0], 0)
        total += near[:, None] * values[:, 3:]
        weight += near
    lifted = total / np.maximum(weight, 1e-9)[:, None]
    confidence = np.clip(weight, 0, 1)
    hidden = confidence < 0.1
    confidence[hidden] = 0
    if hidden.any():
        lifted[hidden] = _fill(places, lifted, hidden, fields, positions, coverage)
    return lifted.reshape(-1, count, 3)[inverse], confidence[inverse].astype(np.float32)


def _bilinear(picture: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Values [M, C] of a picture [H, W, C] at pixel positions [M, 2] (x, y; centres at +0.5); 0 outside."""
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)))
    place = np.clip(pixels + 0.5, 0, (width + 0.999, height + 0.999))
    corner = np.minimum(place.astype(np.int64), (width, height))
    (u, v), (x, y) = (place - corner).T[..., None], corner.T
    upper = padded[y, x] * (1 - u) + padded[y, x + 1] * u
    lower = padded[y + 1, x] * (1 - u) + padded[y + 1, x + 1] * u
    return (upper * (1 - v) + lower * v).astype(np.float32)


def _fill(
    places: np.ndarray,
    lifted: np.ndarray,
    hidden: np.ndarray,
    fields: np.ndarray,
    positions: np.ndarray,
    coverage: np.ndarray,
) -> np.ndarray:
    """Values of hidden places: a Gaussian mean of the nearest known surface points, pixels and seen vertices alike."""
    pixels = coverage > 0
    known = np.concatenate([places[~hidden], positions[pixels]])
    if len(known) == 0:
        return np.zeros((int(hidden.sum()), lifted.shape[1]), np.float32)
    values = np.concatenate([lifted[~hidden], fields.transpose(0, 3, 4, 1, 2)[pixels].reshape(-1, lifted.shape[1])])
    distance, nearest = cKDTree(known).query(places[hidden], k=min(8, len(known)))
    distance, nearest = distance.reshape(len(distance), -1), nearest.reshape(len(nearest), -1)
    weights = np.exp(-(distance**2 - distance[:, :1] ** 2) / 0.004)  # the nearest always counts
    return (values[nearest] * (weights / weights.sum(1, keepdims=True))[..., None]).sum(1)


def decode_video(
    mesh: Mesh, tracks: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int, shading: np.ndarray | None = None
) -> np.ndarray:
    """The generated multi-view video: the textured mesh, drawn as its vertices move.

    Args:
        tracks: [F, N, 3].
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of `size`.
        shading: [N, 3] factor per vertex on the texture, or None.

    Returns:
        [V, F, size, size, 4] uint8 sRGB, straight alpha.
    """
    pictures = zbuffer.render(mesh, tracks, viewmats, Ks, size, shading=shading)  # [F, V, H, W, 4]
    return (zbuffer.straight(pictures).clip(0, 1) * 255 + 0.5).astype(np.uint8).swapaxes(0, 1)
