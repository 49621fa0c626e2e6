"""The motion generator: pictures of a mesh and a sentence in, the mesh's motion and its multi-view video out."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
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
NATURAL_WEIGHTS = WEIGHTS.with_name("natural.safetensors")  # trained from those on real clips nearly alone
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
NEAREST = 24  # pixels of all views that a vertex takes its motion from
FLAT = 0.01  # canonical: an object is taken for flat, and its motion for constant, in directions in which it is thinner
LEVEL = 0.03  # canonical: the same of the pixels around a vertex
FARTHEST = 0.1  # canonical, that the motion around a vertex is continued
NEAR = 0.05  # canonical distance from all that is seen at which a vertex is trusted by 1 / e
LIFTED_AT_ONCE = 16384  # vertices


@dataclass
class GeneratedMotion:
    """What the generator answers.

    Attributes:
        displacement: [V, F, R, R, 3] float32, from the rest pose, canonical, of what each pixel of the static views
            sees.
        mask: [V, R, R] bool, pixels that see the object.
        tracks: [F, N, 3] float32 vertex positions, canonical; frame 0 is the rest pose; vertices in one place stay
            together.
        confidence: [N] float32 in 0..1; 0 where no view sees the vertex or its neighbourhood.
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
        """Reads weights written by `track4d train motion`; by default the shipped ones for all verbs.

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

    @classmethod
    def shipped(cls, prompt: str) -> MotionGenerator:
        """The generator for a sentence: one that has learnt what real clips show, or all the designed motions; each read once.

        Raises:
            InputError: as `load`.
        """
        return _shipped(cls.shipped_weights(prompt))

    @staticmethod
    def shipped_weights(prompt: str) -> Path:
        """The file that `shipped` reads."""
        return NATURAL_WEIGHTS if text.is_natural(prompt) else WEIGHTS

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
        lifted, confidence = lift(mesh.vertices, coefficients, maps, coverage)
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


@lru_cache(maxsize=2)
def _shipped(path: Path) -> MotionGenerator:
    return MotionGenerator.load(path)


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
    vertices: np.ndarray, fields: np.ndarray, positions: np.ndarray, coverage: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values of picture pixels, brought to the vertices of the surface they show.

    What all pixels have in common, an affine map of their places, is taken as it is: a spin is exact. The rest comes from the
    pixels around a vertex in all views by moving least squares (Levin 1998, The approximation power of moving least-squares),
    so that it needn't lie where a pixel does, and hidden vertices go with the nearest seen surface.

    Args:
        vertices: [N, 3] canonical.
        fields: [V, K, 3, R, R] per pixel.
        positions: [V, R, R, 3] rest position behind each pixel; coverage: [V, R, R].

    Returns:
        [N, K, 3] float32 and the confidence [N] in 0..1, 0 far from all that is seen.
    """
    first, inverse = weld(vertices)
    seen, count = coverage > 0, fields.shape[1]
    if not seen.any():
        return np.zeros((len(vertices), count, 3), np.float32), np.zeros(len(vertices), np.float32)
    places, values = positions[seen], fields.transpose(0, 3, 4, 1, 2)[seen].reshape(int(seen.sum()), -1)
    centre, mean = places.mean(0), values.mean(0)
    spread = (places - centre).T
    slopes = np.linalg.solve(spread @ spread.T / len(places) + FLAT**2 * np.eye(3), spread @ (values - mean) / len(places))
    rest = values - mean - (places - centre) @ slopes
    tree, wanted = cKDTree(places), vertices[first]
    lifted, gaps = np.empty((len(wanted), values.shape[1]), np.float32), np.empty(len(wanted), np.float32)
    for start in range(0, len(wanted), LIFTED_AT_ONCE):
        some = slice(start, start + LIFTED_AT_ONCE)
        distance, nearest = tree.query(wanted[some], k=np.arange(1, min(NEAREST, len(places)) + 1))
        local = _moving_least_squares(wanted[some], places[nearest], rest[nearest], distance.astype(np.float32))
        lifted[some] = mean + (wanted[some] - centre) @ slopes + local
        gaps[some] = distance[:, 0]
    confidence = np.exp(-((gaps / NEAR) ** 2))
    confidence[confidence < 0.1] = 0
    return lifted.reshape(-1, count, 3)[inverse], confidence[inverse]


def _moving_least_squares(wanted: np.ndarray, places: np.ndarray, values: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Values at places [N, 3], linear in those [N, M, C] of M neighbours at [N, M, 3], whose distances [N, M] ascend."""
    weights = (1.001 - (distance / np.maximum(distance[:, -1:], 1e-6)) ** 2) ** 2  # so that neighbours come and go unnoticed
    weights /= weights.sum(1, keepdims=True)
    centre, mean = (np.einsum("nm,nmc->nc", weights, each) for each in (places, values))
    around = places - centre[:, None]
    weighted = (weights[..., None] * around).transpose(0, 2, 1)
    slopes = np.linalg.solve(weighted @ around + LEVEL**2 * np.eye(3, dtype=np.float32), weighted @ values)
    step = wanted - centre
    step *= np.minimum(1, FARTHEST / np.maximum(np.linalg.norm(step, axis=1, keepdims=True), 1e-9))
    return mean + np.einsum("ni,nic->nc", step, slopes)


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
