"""The paper's own recipe on a small scene: pictures, then ARAP and a video model's opinion, from nothing but hex-planes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from track4d.gaussians.cloud import seed_cloud
from track4d.gaussians.rasterise import best_device
from track4d.geometry.mesh import Mesh
from track4d.geometry.zbuffer import render, straight
from track4d.motion.footage import read_footage
from track4d.motion.hexplane import HexPlaneSize
from track4d.motion.reconstruct import PAPER, reconstruct_motion
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.space import intrinsics, orbit_viewmats

SIZE = 48
SMALL = replace(PAPER, reconstruction=24, distillation=6, frames_every=6, head_rate=3e-3,
                planes=HexPlaneSize(((12, 12, 12, 4),), 8))


@pytest.fixture(scope="module")
def scene():
    """A ball that drifts: mesh, its true motion, the video, Gaussians."""
    shape = trimesh.creation.icosphere(subdivisions=2, radius=0.6)
    uv = np.array(shape.vertices)[shape.faces][..., [0, 2]]
    texture = np.random.default_rng(0).random((8, 8, 3)).astype(np.float32)
    mesh = Mesh(np.array(shape.vertices), np.array(shape.faces), uv, None, [texture])
    truth = (mesh.vertices + 0.05 * np.arange(4)[:, None, None] * np.array([0.5, 1.0, 0.5])).astype(np.float32)
    rgba = straight(render(mesh, truth, orbit_viewmats(), intrinsics(SIZE, 4), SIZE, 2).swapaxes(0, 1))
    footage = read_footage((rgba.clip(0, 1) * 255).astype(np.uint8), orbit_viewmats(), intrinsics(SIZE, 4))
    return mesh, truth, footage, seed_cloud(mesh, 300, torch.Generator().manual_seed(0))


def test_the_published_weights_and_schedule() -> None:
    assert (PAPER.reconstruction, PAPER.distillation) == (750, 250)
    assert (PAPER.picture, PAPER.sds, PAPER.arap) == (100.0, 0.01, 10.0)
    assert (PAPER.plane_rate, PAPER.head_rate) == (0.01, 1e-4)
    assert PAPER.planes.levels == ((100, 100, 100, 8),) and PAPER.planes.width == 16


def test_pictures_alone_move_the_ball(scene) -> None:
    mesh, truth, footage, cloud = scene
    seen = []

    def prior(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        seen.append(tuple(pictures.shape))
        return pictures.square().mean()

    longer = replace(SMALL, reconstruction=60, head_rate=1e-2)
    found = reconstruct_motion(mesh, cloud, footage, longer, video_prior=prior)
    assert found.steps == 66 and seen == [(3, 4, SIZE, SIZE, 4)] * 6  # only in the last phase, on all moving frames
    np.testing.assert_array_equal(found.field.vertices[0], mesh.vertices)
    left = np.linalg.norm(found.field.vertices - truth, axis=-1)[1:].mean() / np.linalg.norm(truth - truth[0], axis=-1)[1:].mean()
    assert left < 0.8
    assert found.coefficients.shape == (300, 1, 4, 3)


def test_interrupted_reconstruction_goes_on_bit_for_bit(scene, tmp_path) -> None:
    mesh, _, footage, cloud = scene
    features = torch.randn(4, 4, 20, 6, 6, generator=torch.Generator().manual_seed(0))
    small = replace(SMALL, batch=2)

    def prior(tracks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return 100 * (tracks[1:] * torch.randn(tracks[1:].shape, generator=generator)).sum()

    whole = reconstruct_motion(mesh, cloud, footage, small, features, motion_prior=prior)

    def stop(stage, step, total, preview=None):
        if step == 26:
            raise Cancelled()

    file = tmp_path / "run.ckpt"
    with pytest.raises(Cancelled):
        reconstruct_motion(mesh, cloud, footage, small, features, motion_prior=prior, checkpoint=file, every=8, report=stop)
    resumed = reconstruct_motion(mesh, cloud, footage, small, features, motion_prior=prior, checkpoint=file)
    np.testing.assert_array_equal(resumed.field.vertices, whole.field.vertices)
    assert torch.equal(resumed.coefficients, whole.coefficients)


def test_the_last_phase_ends_when_nothing_gets_better(scene) -> None:
    mesh, _, footage, cloud = scene
    still = replace(SMALL, reconstruction=3, distillation=130, plane_rate=0.0, head_rate=0.0, color_rate=0.0)
    assert reconstruct_motion(mesh, cloud, footage, still).steps == 3 + 100
    found = reconstruct_motion(mesh, cloud, footage, replace(still, plane_rate=0.02, head_rate=2e-2, color_rate=0.02))
    assert found.steps == 3 + 130


@pytest.mark.gpu
def test_the_gpu_finds_the_same(scene) -> None:
    if best_device() == "cpu":
        pytest.skip("needs an NVIDIA GPU and gsplat")
    mesh, truth, footage, cloud = scene
    preset = replace(SMALL, head_rate=1e-2)
    here, there = (reconstruct_motion(mesh, cloud.to(device), footage, preset) for device in ("cpu", "cuda"))
    assert there.coefficients.device.type == "cpu" and there.steps == here.steps
    moved = np.linalg.norm(here.field.vertices - mesh.vertices, axis=-1)[1:].mean()
    assert np.linalg.norm(there.field.vertices - here.field.vertices, axis=-1)[1:].mean() < 0.1 * moved


def test_one_frame_is_refused(scene) -> None:
    mesh, _, footage, cloud = scene
    alone = replace(footage, colors=footage.colors[:, :1], grey=footage.grey[:, :1], masks=footage.masks[:, :1])
    with pytest.raises(InputError) as caught:
        reconstruct_motion(mesh, cloud, alone, SMALL)
    assert caught.value.code == "bad_video"
