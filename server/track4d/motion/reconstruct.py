"""Stage Two as published: a motion from nothing but pictures, by Gaussians, hex-planes, ARAP and 4D-SDS.

It needs no registration and leaves more of the motion unfound than `fit` (docs/results.md); it is here because the paper is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor, nn
from track4d_protocol.errors import InputError

from ..gaussians.cloud import Cloud
from ..gaussians.rasterise import rasterise
from ..gaussians.spherical_harmonics import sh_colors, sh_from_colors, view_directions
from ..geometry.mesh import Mesh
from ..progress import Report, silent
from .checkpoint import Run
from .field import BLOCK, HybridField, MotionField, frame_times
from .footage import Footage
from .hexplane import PAPER_PLANES, HexPlaneSize
from .hybrid_features import WIDTH, hybrid_features, reduced_planes, visible_by_rays
from .losses import arap_energy, reconstruction_loss
from .sds import Prior

WINDOW, FLAT = 50, 0.002  # steps whose mean loss must fall by this share in the last phase, or the optimisation is over


@dataclass(frozen=True)
class PaperPreset:
    """Weights and schedule of Track4DGen, section 6; what it doesn't say is Animate3D's.

    Attributes:
        reconstruction, distillation: steps without and with ARAP and 4D-SDS.
        frames_every: steps after which one more frame takes part.
        batch: frames per step, in all views; None = all that take part (64 pictures at 4 x 16).
        picture, sds, arap: weights.
        arap_samples, arap_neighbours: vertices per step, and edges per vertex.
        plane_rate, head_rate, color_rate: learning rates of hex-planes, heads and 4D SH.
        planes: the hex-planes.
        degree, terms: of the 4D SH.
    """

    reconstruction: int = 750
    distillation: int = 250
    frames_every: int = 50
    batch: int | None = None
    picture: float = 100.0
    sds: float = 0.01
    arap: float = 10.0
    arap_samples: int = 512
    arap_neighbours: int = 3
    plane_rate: float = 0.01
    head_rate: float = 1e-4
    color_rate: float = 2.5e-3
    planes: HexPlaneSize = PAPER_PLANES
    degree: int = 0
    terms: int = 4


PAPER = PaperPreset()


class FourDGaussians(nn.Module):
    """The canonical Gaussians' motion field and 4D SH: what the paper optimises.

    Args:
        field: predicts offsets of position, orientation and scale.
        coefficients: [G, K, W, 3].
    """

    def __init__(self, field: HybridField, coefficients: Tensor) -> None:
        super().__init__()
        self.field, self.coefficients = field, nn.Parameter(coefficients)


@dataclass(frozen=True)
class Reconstruction:
    """What `reconstruct_motion` found: the mesh's motion, the field, and the 4D SH coefficients [G, K, W, 3]; on the CPU."""

    field: MotionField
    network: HybridField
    coefficients: Tensor
    steps: int


def reconstruct_motion(mesh: Mesh, cloud: Cloud, footage: Footage, preset: PaperPreset = PAPER, features: Tensor | None = None,
                       video_prior: Prior | None = None, motion_prior: Prior | None = None, seed: int = 0,
                       checkpoint: Path | None = None, every: int = 50, report: Report = silent) -> Reconstruction:
    """Finds a motion by the pictures of Gaussians (Eq. 6 to 11 of Track4DGen).

    Args:
        mesh: canonical, in the pose of frame 0; cloud: Gaussians on it, with the colours of the still pictures, on the device
            that does the work.
        footage: the multi-view video.
        preset: weights and schedule.
        features: [V, F, C, h, w] of the video model; without them the field has hex-planes alone.
        video_prior, motion_prior: 4D-SDS by the video model on premultiplied RGBA [F, V, S, S, 4] of the moving frames, and by
            the motion generator on the vertices [F, N, 3] (`sds.py`); without them that term is left out.
        seed: of the start and of the random choices.
        checkpoint: file that the state goes to every `every` steps, and comes from if it exists.
        report: called at every step with "fit"; may raise `Cancelled`.

    Raises:
        InputError: a video of one frame, features that don't fit, a checkpoint of other work.
    """
    if footage.frames < 2:
        raise InputError("bad_video", "The video has one frame.", "Give a video of at least two frames.")
    generator, device = torch.Generator().manual_seed(seed), cloud.scales.device
    vertices = torch.as_tensor(mesh.vertices, device=device)  # [N, 3]
    rest_means, rest_quats = (x[0] for x in cloud.pose(mesh.faces, vertices[None]))  # [G, 3], [G, 4]
    field = HybridField(preset.planes, 0 if features is None else WIDTH, generator=generator)
    model = FourDGaussians(field, sh_from_colors(cloud.colors, preset.degree, preset.terms)).to(device)
    rest = torch.cat([rest_means, vertices]).cpu()  # [G + N, 3], so that both are centred by the same mean
    known = None  # [F, G + N, D]
    if features is not None:
        known = _still_features(mesh, footage, reduced_planes(features), rest).to(device)
    diffusion = None if known is None else known[:, :len(cloud)]
    heads = [parameter for name, parameter in field.named_parameters() if not name.startswith("planes")]
    optimiser = torch.optim.Adam([{"params": field.planes.parameters(), "lr": preset.plane_rate},
                                  {"params": heads, "lr": preset.head_rate},
                                  {"params": [model.coefficients], "lr": preset.color_rate}], eps=1e-15)
    signature = f"reconstruction with {len(cloud)} Gaussians, {footage.views} x {footage.frames} pictures, {preset}, seed {seed}"
    run = Run(model, optimiser, generator, signature)
    if checkpoint is not None:
        run.resume(checkpoint)

    places = rest_means.cpu().numpy()
    neighbours = torch.as_tensor(cKDTree(places).query(places, preset.arap_neighbours + 1)[1][:, 1:], device=device)
    times, viewmats, Ks = (torch.as_tensor(x, dtype=torch.float32, device=device)
                           for x in (frame_times(footage.frames), footage.viewmats, footage.Ks))  # [F], [V, 4, 4], [V, 3, 3]
    pictures, silhouettes, present = (torch.as_tensor(x, device=device).transpose(0, 1)
                                      for x in (footage.colors, footage.masks, ~footage.lost))  # [F, V, ...]
    total = preset.reconstruction + preset.distillation
    while run.step < total:
        report("fit", run.step, total)
        distilling = run.step >= preset.reconstruction
        late = run.step - preset.reconstruction
        if late >= 2 * WINDOW and late % WINDOW == 0 and run.is_flat(WINDOW, FLAT):
            break
        moving = footage.frames - 1 if distilling else min(run.step // preset.frames_every + 1, footage.frames - 1)
        frames = 1 + torch.randperm(moving, generator=generator)[:preset.batch].sort().values.to(device)  # [f]
        offsets = field(rest_means, times[frames], None if diffusion is None else diffusion[frames])
        means, quats, scales = offsets.apply(rest_means, rest_quats, cloud.scales)  # [f, G, ...]
        colors = sh_colors(model.coefficients, view_directions(means, viewmats), frames.float(), footage.frames)
        rgb, alpha = rasterise(means, quats, scales, cloud.opacities, colors, viewmats, Ks, footage.size, 0.0)
        wanted, masks = pictures[frames].float() / 255, silhouettes[frames].float()  # [f, V, S, S, 3], [f, V, S, S]
        there = present[frames][..., None, None, None]  # [f, V, 1, 1, 1]
        loss = preset.picture * reconstruction_loss(rgb.clamp(0, 1) * there, wanted, masks)
        if distilling:
            samples = torch.randint(len(rest_means), (preset.arap_samples,), generator=generator).to(device)
            loss = loss + preset.arap * arap_energy(rest_means, means, neighbours, samples)
            if video_prior is not None:
                loss = loss + preset.sds * video_prior(torch.cat([rgb, alpha[..., None]], -1).cpu(), generator).to(device)
            if motion_prior is not None:
                moved = _vertices(vertices, field, times, known, len(cloud)).cpu()
                loss = loss + preset.sds * motion_prior(moved, generator).to(device)
        run.advance(loss)
        if checkpoint is not None and run.step % every == 0:
            run.save(checkpoint)
    report("fit", total, total)
    with torch.no_grad():
        found = _vertices(vertices, field, times, known, len(cloud)).cpu().numpy()
    motion = MotionField(found, np.zeros(found.shape[:2], np.float32))  # nothing is known of what views have seen
    return Reconstruction(motion, field.cpu(), model.coefficients.detach().cpu(), run.step)


def _still_features(mesh: Mesh, footage: Footage, planes: Tensor, points: Tensor) -> Tensor:
    """Hybrid features [F, P, D] at the projections of the still object's points [P, 3], as Eq. 6 has them."""
    viewmats, Ks = torch.from_numpy(footage.viewmats).float(), torch.from_numpy(footage.Ks).float()
    seen = visible_by_rays(mesh.vertices[None], mesh.faces, points[None].numpy(), footage.viewmats)  # [1, V, P]
    everywhere = points.expand(footage.frames, *points.shape)
    return hybrid_features(planes, everywhere, torch.from_numpy(seen).expand(footage.frames, -1, -1), viewmats, Ks, footage.size)


def _vertices(rest: Tensor, field: HybridField, times: Tensor, known: Tensor | None, gaussians: int) -> Tensor:
    """Where the field takes the mesh's vertices [N, 3]; [F, N, 3], frame 0 is the mesh itself.

    Args:
        known: [F, G + N, D] features of the Gaussians and of the vertices.
        gaussians: G.
    """
    diffusion = None if known is None else known[1:, gaussians:]
    moving = [field.move(rest[some], times[1:], None if diffusion is None else diffusion[:, some])
              for some in torch.arange(len(rest)).split(BLOCK)]
    return torch.cat([rest[None], torch.cat(moving, 1)])
