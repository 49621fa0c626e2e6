"""Refinement of a registered motion: it corrects what pictures show, keeps what they don't, and can be interrupted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from track4d.geometry import zbuffer
from track4d.geometry.mesh import Mesh
from track4d.motion.checkpoint import Run
from track4d.motion.field import HybridField, MotionField
from track4d.motion.footage import read_footage
from track4d.motion.hexplane import HexPlaneSize
from track4d.motion.refine import Places, RefinePreset, distil, refine_motion
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.space import intrinsics, orbit_viewmats

SIZE = 96
VIEWMATS, KS = orbit_viewmats(), intrinsics(SIZE, 4)
QUICK = RefinePreset(rounds=2, steps=25, points=600, compared=400, rigid_samples=64, planes=HexPlaneSize(((24, 24, 24, 4),), 8))


def column() -> Mesh:
    """A textured tube along Z."""
    u, v = np.meshgrid(np.linspace(0, 1, 17), np.linspace(0, 1, 25))
    radius = 0.3 * np.sqrt(np.clip(1 - (2 * v - 1) ** 8, 0.01, 1))
    vertices = np.stack([radius * np.cos(2 * np.pi * u), radius * np.sin(2 * np.pi * u), 1.6 * (v - 0.5)], -1).reshape(-1, 3)
    row, across = np.meshgrid(np.arange(24), np.arange(16), indexing="ij")
    a = (row * 17 + across).ravel()
    faces = np.concatenate([np.stack([a, a + 1, a + 18], 1), np.stack([a, a + 18, a + 17], 1)])
    uv = np.stack([u.ravel(), v.ravel()], 1)
    texture = np.random.default_rng(0).random((12, 12, 3), np.float32)
    return Mesh(vertices, faces, uv[faces], None, [np.kron(texture, np.ones((6, 6, 1), np.float32)) * 0.8 + 0.1])


def leaning(vertices: np.ndarray, frames: int, amount: float) -> np.ndarray:
    height = np.clip(vertices[:, 2] + 0.4, 0, None)
    lean = amount * np.arange(frames)[:, None] / (frames - 1) * height**2
    return np.stack([vertices[:, 0] + lean, vertices[:, 1] + 0 * lean, vertices[:, 2] - lean**2 / 4], -1).astype(np.float32)


@pytest.fixture(scope="module")
def scene():
    """A mesh, its true motion, the video of it, its shading, and a registration that got two thirds of the way."""
    mesh = column()
    truth = leaning(mesh.vertices, 5, 0.2)
    rgba = zbuffer.straight(zbuffer.render(mesh, truth, VIEWMATS, KS, SIZE, 3).swapaxes(0, 1))
    footage = read_footage((rgba.clip(0, 1) * 255 + 0.5).astype(np.uint8), VIEWMATS, KS)
    registered = MotionField(leaning(mesh.vertices, 5, 0.15), np.ones(truth.shape[:2], np.float32))
    return mesh, truth, footage, np.ones((len(mesh.vertices), 3), np.float32), registered


def refined(scene, preset=QUICK, field=None, **keywords):
    mesh, _, footage, shading, registered = scene
    return refine_motion(mesh, registered if field is None else field, footage, shading, preset, **keywords)


def error(vertices: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(vertices - truth, axis=-1)[1:].mean())


def test_what_the_registration_left_is_corrected(scene) -> None:
    result = refined(scene)
    assert result.share > 0 and result.after < 0.9 * result.before
    assert error(result.field.vertices, scene[1]) < 0.6 * error(scene[4].vertices, scene[1])
    np.testing.assert_array_equal(result.field.vertices[0], scene[0].vertices)


def test_a_right_motion_stays_as_it_is(scene) -> None:
    right = MotionField(scene[1], scene[4].confidence)
    result = refined(scene, field=right)
    assert error(result.field.vertices, scene[1]) < 0.002
    if result.share == 0:
        np.testing.assert_array_equal(result.field.vertices, scene[1])


def test_what_was_held_still_stays(scene) -> None:
    mesh, truth, *_, registered = scene
    result, foot = refined(scene), mesh.vertices[:, 2] < -0.4
    assert result.share > 0 and 0 < foot.sum() < len(foot)
    np.testing.assert_array_equal(result.field.vertices[:, foot], registered.vertices[:, foot])
    still = MotionField(np.repeat(mesh.vertices[None], len(truth), 0), registered.confidence)
    assert refined(scene, field=still).field is still


def test_a_correction_that_held_out_pictures_refuse_is_not_taken(scene) -> None:
    wild = replace(QUICK, head_rate=1.0, plane_rate=1.0, steps=3)
    result = refined(scene, wild)
    assert result.share == 0 and result.after == result.before
    np.testing.assert_array_equal(result.field.vertices, scene[4].vertices)


def test_interrupted_work_goes_on_bit_for_bit(scene, tmp_path) -> None:
    whole = refined(scene)

    def stop(stage, step, total, preview=None):
        if step == 37:
            raise Cancelled()

    file = tmp_path / "refinement.ckpt"
    with pytest.raises(Cancelled):
        refined(scene, checkpoint=file, every=10, report=stop)
    steps = []
    resumed = refined(scene, checkpoint=file, every=10, report=lambda stage, step, total, preview=None: steps.append(step))
    assert steps[0] == 30
    np.testing.assert_array_equal(resumed.field.vertices, whole.field.vertices)
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name
    with pytest.raises(InputError) as caught:
        refined(scene, replace(QUICK, rigidity=2.0), checkpoint=file)
    assert caught.value.code == "bad_checkpoint"
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError) as caught:
        refined(scene, checkpoint=file)
    assert caught.value.code == "bad_checkpoint"


def test_features_tracks_and_pins_take_part(scene) -> None:
    mesh, truth, _, _, registered = scene
    features = torch.randn(4, 5, 24, 8, 8, generator=torch.Generator().manual_seed(0))
    pinned = mesh.vertices[:, 2] < 0
    short = replace(QUICK, rounds=1, steps=10)
    result = refined(scene, short, features=features, tracks=Places(truth, np.ones(len(mesh.vertices))), pinned=pinned)
    assert result.network.means[0].in_features == QUICK.planes.features + 16
    assert error(result.field.vertices, truth) <= error(registered.vertices, truth)
    with pytest.raises(InputError):
        refined(scene, short, features=features[:3])


def test_a_field_learns_a_motion(scene) -> None:
    truth = torch.from_numpy(scene[1])
    generator = torch.Generator().manual_seed(0)
    field = HybridField(QUICK.planes, generator=generator)
    times = torch.linspace(-1, 1, 5)
    left = distil(field, truth[0], truth, times, replace(QUICK, distil=150), generator)
    assert left < 0.1 * float((truth - truth[0]).square().sum(-1).mean().sqrt())
    result = refined(scene, replace(QUICK, rounds=1, distil=40))
    assert error(result.field.vertices, scene[1]) <= error(scene[4].vertices, scene[1])


def test_missing_pictures_say_nothing(scene) -> None:
    masks, colors = scene[2].masks.copy(), scene[2].colors.copy()
    for view, frame in ((1, 3), (2, 2)):  # the first of them is held out
        masks[view, frame], colors[view, frame] = False, 127
    footage = replace(scene[2], masks=masks, colors=colors)
    mesh, truth, _, shading, registered = scene
    result = refine_motion(mesh, registered, footage, shading, replace(QUICK, rounds=1))
    assert result.after < result.before and error(result.field.vertices, truth) < error(registered.vertices, truth)


def test_nothing_to_refine(scene) -> None:
    mesh, _, footage, shading, registered = scene
    assert refined(scene, replace(QUICK, rounds=0)).field is registered
    still = MotionField(registered.vertices[:1], registered.confidence[:1])
    alone = replace(footage, colors=footage.colors[:, :1], grey=footage.grey[:, :1], masks=footage.masks[:, :1])
    assert refine_motion(mesh, still, alone, shading, QUICK).field is still


def test_flat_losses_end_a_run() -> None:
    parameter = torch.nn.Linear(1, 1)
    run = Run(parameter, torch.optim.SGD(parameter.parameters(), 0.0), torch.Generator(), "test")
    for _ in range(20):
        run.advance(parameter(torch.ones(1, 1)).square().sum())
    assert run.is_flat(10, 0.01) and not run.is_flat(11, 0.01)
    run.losses[-10:] = [0.9 * loss for loss in run.losses[-10:]]
    assert not run.is_flat(10, 0.01)
    before = parameter.weight.detach().clone()
    run.advance(parameter(torch.full((1, 1), torch.inf)).sum())
    assert torch.equal(parameter.weight, before)
