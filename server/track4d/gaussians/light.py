"""What moving Gaussians look like in a multi-view video: 4D SH, sizes and opacities, fitted while the motion stays as it is.

A few views can be explained by colours that are wrong from everywhere else: they cover up for holes and for errors of the motion.
So the fit is tried on all views but one first, and only as much of its colours is taken as makes the other view better. Sizes and
opacities, which the fit finds beside them, are taken whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from track4d_protocol.space import BACKGROUND

from ..progress import Report, silent
from .cloud import Cloud
from .rasterise import SAMPLES, picture_loss, rasterise
from .spherical_harmonics import cosine_basis, sh_colors, sh_from_colors, view_directions

Array = np.ndarray | Tensor

RATE, SCALE_RATE, OPACITY_RATE = 0.03, 0.01, 0.03  # Adam's; the first for colours that all directions and times share
SLOWER = 4.0  # the rates of single directions and times are this much smaller
# Weights of staying with the start, where the pictures don't say otherwise: colours, their change in time, by direction, sizes.
KEEP, KEEP_STEADY, KEEP_MATT, KEEP_SCALES = 0.01, 0.1, 1.0, 0.02
OPACITY_MARGIN = 0.01  # opacities this far from 0 and 1, so that their logit is finite
SHARES = (1.0, 0.75, 0.5, 0.25)  # of the colours' change that are tried on the pictures that were held out
LEAST_GAIN = 0.005  # by which their squared error must fall
TRUST = 2.0  # times the best share is taken, all of it at most: the trial had a view less, so its colours reach less far
TESTED = 8  # frames that are looked at for it, at most
HELD_OUT = 4  # where there is one view, one frame of this many is held out instead


@dataclass(frozen=True)
class Shown:
    """The video that a cloud shall look like.

    Attributes:
        means: [F, G, 3]; quats: [F, G, 4] of the moving Gaussians.
        pictures: [V, F, H, H, 3] sRGB in 0..1, on the background; masks: [V, F, H, H] in 0..1, where the object is.
        viewmats: [V, 4, 4]; Ks: [V, 3, 3] in pixels of these pictures.
        background: grey behind the pictures, sRGB.
    """

    background: float
    means: Tensor
    quats: Tensor
    pictures: Tensor
    masks: Tensor
    viewmats: Tensor
    Ks: Tensor

    def draw(self, look: Look, frames: list[int], views: list[int]) -> tuple[Tensor, Tensor]:
        """RGB [f, v, H, H, 3] and alpha [f, v, H, H] of some frames and views."""
        means = self.means[frames]  # [f, G, 3]
        moments = torch.tensor(frames, dtype=torch.float32, device=means.device)
        directions = view_directions(means, self.viewmats[views])
        colors = sh_colors(look.coefficients, directions, moments, len(self.means))  # [f, v, G, 3]
        return rasterise(means, self.quats[frames], look.scales.exp(), look.opacities.sigmoid(), colors, self.viewmats[views],
                         self.Ks[views], self.pictures.shape[2], self.background, SAMPLES)

    def wanted(self, frames: list[int], views: list[int]) -> tuple[Tensor, Tensor]:
        """What that should be: pictures [f, v, H, H, 3] and masks [f, v, H, H]."""
        return self.pictures[views][:, frames].transpose(0, 1), self.masks[views][:, frames].transpose(0, 1)


@dataclass(frozen=True)
class Look:
    """Sizes [G, 3] as logarithms, opacities [G] as logits and 4D SH [G, K, W, 3] of a cloud's Gaussians."""

    scales: Tensor
    opacities: Tensor
    coefficients: Tensor

    def with_colors(self, start: Look, share: float) -> Look:
        """This look with a share of what its colours have changed since the start."""
        return replace(self, coefficients=torch.lerp(start.coefficients, self.coefficients, share))


def fit_light(cloud: Cloud, faces: Array, vertices: Array, pictures: Array, masks: Array, viewmats: Array, Ks: Array,
              degree: int, terms: int, steps: int, seed: int = 0, background: float = BACKGROUND,
              report: Report = silent) -> tuple[Cloud, Tensor, float]:
    """Fits 4D SH (Eq. 8 of Track4DGen), sizes and opacities to a video by Adam on the pictures, from the cloud as it is.

    Args:
        faces: [T, 3]; vertices: [F, N, 3] the mesh's motion.
        pictures to Ks: see `Shown`.
        degree: 0 to 3; terms: cosines per coefficient. With 0 and 1 the colours are static.
        steps: of Adam, each on one frame in all views.
        seed: of the order of the frames.
        background: grey behind the pictures, sRGB.
        report: called at every step with "appearance"; may raise `Cancelled`.

    Returns:
        the cloud with its new sizes and opacities, the coefficients [G, (degree + 1)^2, terms, 3], and the share of the colours'
        change that was taken: with 0 they are the cloud's own.
    """
    motion, *shown = (torch.as_tensor(x, dtype=torch.float32, device=cloud.scales.device)
                      for x in (vertices, pictures, masks, viewmats, Ks))
    scene = Shown(background, *cloud.pose(faces, motion), *shown)
    opacities = torch.logit(cloud.opacities.clamp(OPACITY_MARGIN, 1 - OPACITY_MARGIN))
    start = Look(cloud.scales.log(), opacities, sh_from_colors(cloud.colors, degree, terms))
    views, frames = (list(range(count)) for count in pictures.shape[:2])
    held_views, held_frames = (views[-1:], frames) if len(views) > 1 else (views, frames[HELD_OUT - 1::HELD_OUT])
    kept_views = views[:-1] if len(views) > 1 else views
    kept_frames = frames if len(views) > 1 else [frame for frame in frames if frame not in held_frames]
    share, tried = 1.0, steps // 2  # half of them tell as well what the colours are good for
    every = tried + steps
    if held_frames:
        trial = _fitted(scene, start, kept_frames, kept_views, tried, seed, lambda step: report("appearance", step, every))
        share = min(1.0, TRUST * _best_share(scene, start, trial, held_frames, held_views))
    fitted = _fitted(scene, start, frames, views, steps, seed, lambda step: report("appearance", tried + step, every))
    look = fitted.with_colors(start, share)
    return replace(cloud, scales=look.scales.exp(), opacities=look.opacities.sigmoid()), look.coefficients, share


def _best_share(scene: Shown, start: Look, fitted: Look, frames: list[int], views: list[int]) -> float:
    """How much of a fit's colours makes the held-out pictures better; 0 if none of it does."""
    frames = [frames[k] for k in np.unique(np.linspace(0, len(frames) - 1, min(len(frames), TESTED)).round().astype(int))]
    wanted, masks = scene.wanted(frames, views)
    there = (masks.amax((-2, -1)) > 0)[..., None, None, None]

    def error(share: float) -> float:
        with torch.no_grad():
            shown, _ = scene.draw(fitted.with_colors(start, share), frames, views)
            return float(((shown - wanted).square() * there).mean())

    best, least = 0.0, error(0.0) * (1 - LEAST_GAIN)
    for share in SHARES:
        found = error(share)
        if found < least:
            best, least = share, found
    return best


def _fitted(scene: Shown, first: Look, frames: list[int], views: list[int], steps: int, seed: int,
            done: Callable[[int], None]) -> Look:
    """The look that some frames and views want; tells how many steps are `done`."""
    generator = torch.Generator().manual_seed(seed)
    start = first.coefficients  # [G, K, W, 3]
    shared = torch.zeros_like(start[:, :1, :1]).requires_grad_()  # [G, 1, 1, 3] of all directions and times
    single = torch.zeros_like(start).requires_grad_()
    scales, opacities = (x.clone().requires_grad_() for x in (first.scales, first.opacities))
    optimiser = torch.optim.Adam([{"params": [shared], "lr": RATE}, {"params": [single], "lr": RATE / SLOWER},
                                  {"params": [scales], "lr": SCALE_RATE}, {"params": [opacities], "lr": OPACITY_RATE}])
    object_share = scene.masks.mean().clamp(min=1e-3)
    order: list[int] = []

    def present() -> Look:
        coefficients = start + single + functional.pad(shared, (0, 0, 0, start.shape[2] - 1, 0, start.shape[1] - 1))
        return Look(scales, opacities, coefficients)

    for step in range(steps):
        done(step)
        order = order or [frames[k] for k in torch.randperm(len(frames), generator=generator)]
        chosen = [order.pop()]
        rgb, alpha = scene.draw(present(), chosen, views)
        wanted, mask = scene.wanted(chosen, views)
        lost = (mask.amax((-2, -1)) == 0)[..., None, None]  # [f, v, 1, 1] pictures without the object say nothing
        wanted, mask = torch.where(lost[..., None], rgb.detach(), wanted), torch.where(lost, alpha.detach(), mask)
        shown = picture_loss(rgb, alpha, wanted.contiguous(), mask.contiguous(), squared=1.0, mask_absolute=0.5)
        unsteady, glossy = (part.square().sum((1, 2)).mean() for part in (single[:, :1], single[:, 1:]))
        kept = KEEP * shared.square().mean() + KEEP_STEADY * unsteady + KEEP_MATT * glossy
        kept = kept + KEEP_SCALES * (scales - first.scales).square().mean()
        optimiser.zero_grad()
        (shown / object_share + kept).backward()
        optimiser.step()
    last = present()
    return Look(*(x.detach() for x in (last.scales, last.opacities, last.coefficients)))


def resample_sh(coefficients: Tensor, frames: int, new_frames: int) -> Tensor:
    """Cosine series [G, K, W, 3] over `frames` frames as the closest ones over `new_frames` frames of the same span of time."""
    terms = coefficients.shape[2]
    if frames == new_frames or terms == 1:
        return coefficients
    count = max(new_frames, 4 * terms)
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    before = cosine_basis(share * (frames - 1), terms, frames)  # [count, W]
    after = cosine_basis(share * (new_frames - 1), terms, new_frames)
    matrix = torch.linalg.lstsq(after, before).solution  # [W, W]
    return torch.einsum("ij,gkjc->gkic", matrix.to(coefficients), coefficients)
