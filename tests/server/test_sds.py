"""4D-SDS against the numbers of a published implementation, and in the motion generator's own space."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from safetensors.torch import load_file
from track4d.geometry.mesh import Mesh
from track4d.motion.sds import draw_timestep, motion_prior, sds_loss
from track4d.video.diffusion import add_noise, log_snr
from track4d.video.sampling import ALPHA_BARS, clean_from_noise
from track4d.video.text import tokenise


@pytest.mark.parametrize("case", ["refine", "norescale"])
def test_loss_and_gradient_are_those_of_the_published_implementation(shared: Path, case: str) -> None:
    data = {name.removeprefix(case + "."): value
            for name, value in load_file(shared / "fixtures/animate3d_stage2/sds_recon.safetensors").items()
            if name.startswith(case + ".")}
    views, frames = data["n_view_n_frame"].tolist()
    scale, rescale = data["guidance_scale_std_rescale"].tolist()
    alpha_bar = ALPHA_BARS[data["t"]]
    latents = data["latents"].unflatten(0, (views, frames)).requires_grad_()  # [V, F, C, h, w]
    noise = data["noise"][0].transpose(1, 2)  # [V, M, C, h, w]

    def denoise(noisy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.testing.assert_close(noisy, data["unet_input"][:views, :, 1:].transpose(1, 2))
        text, free = (data[name][:, :, 1:].transpose(1, 2) for name in ("eps_text", "eps_uncond"))
        return clean_from_noise(noisy, text, alpha_bar), clean_from_noise(noisy, free, alpha_bar)

    loss = sds_loss(latents[:, 1:], denoise, alpha_bar, noise, guidance=1 + scale, rescale=rescale)
    loss.backward()
    torch.testing.assert_close(loss.detach(), data["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(latents.grad.flatten(0, 1), data["grad"], rtol=1e-4, atol=1e-6)
    assert (latents.grad[:, 0] == 0).all()


def test_steps_cover_the_range_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_timestep(generator) for _ in range(4000)]
    assert min(drawn) == 20 and max(drawn) == 200 and abs(np.mean(drawn) - 110) < 3


def test_displacements_are_pulled_towards_what_the_motion_generator_believes() -> None:
    from track4d.video.generator import MotionGenerator

    model = MotionGenerator.load()
    config = model.network.config
    generator = torch.Generator().manual_seed(0)
    seen = torch.rand(1, 4, 8, config.grid, config.grid, generator=generator)
    latents = torch.randn(1, 4, config.latent, config.grid, config.grid, generator=generator).requires_grad_()
    noise = torch.randn(latents.shape, generator=generator)
    level, tokens = torch.tensor([0.3]), torch.tensor([tokenise("it jumps")])
    alpha_bar = torch.sigmoid(log_snr(level, config.grid))
    with torch.no_grad():
        believed, free = model.predictions(add_noise(latents, noise, level), seen, level, tokens)

    loss = sds_loss(latents, lambda noisy: model.predictions(noisy, seen, level, tokens), alpha_bar, noise, 2.0, rescale=0)
    loss.backward()
    wanted = free + 2 * (believed - free)
    torch.testing.assert_close(latents.grad, (latents.detach() - wanted) / 4, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [16, 7])
def test_a_motion_that_the_generator_would_make_costs_less_than_another(frames: int) -> None:
    """The loss on vertices: lower for what was asked for than for its mirror image in time, and its gradient is finite."""
    from track4d.video.generator import MotionGenerator, decode_video
    from track4d_protocol import space

    shape = trimesh.creation.capsule(height=1.2, radius=0.3, count=[10, 14])
    mesh = Mesh(np.array(shape.vertices, np.float32), np.array(shape.faces))
    shading = 0.6 + 0.4 * np.sin(5 * mesh.vertices).astype(np.float32)
    viewmats, Ks = space.orbit_viewmats(), space.intrinsics(96, 4)
    stills = decode_video(mesh, mesh.vertices[None], viewmats, Ks, 96, shading)[:, 0]
    model = MotionGenerator.load()
    made = torch.from_numpy(model.generate(mesh, stills, viewmats, Ks, "it bends left", frames, steps=8).tracks)
    costs = []
    for tracks in (made, made[:1] - 1.5 * (made - made[:1])):
        tracks = tracks.clone().requires_grad_()
        loss = motion_prior(model, mesh, shading, "it bends left")(tracks, torch.Generator().manual_seed(3))
        loss.backward()
        assert torch.isfinite(tracks.grad).all() and tracks.grad.abs().max() > 0
        costs.append(float(loss.detach()))
    assert costs[0] < 0.5 * costs[1]
