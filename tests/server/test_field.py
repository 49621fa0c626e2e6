"""The motion field: hex-planes and heads against the published numbers, the loop, the time between frames."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation
from track4d.motion.field import HybridField, MotionField, euler_quaternion, quaternion_product, turned
from track4d.motion.hexplane import PAPER_PLANES, TWO_LEVEL_PLANES, HexPlane, HexPlaneSize, interpolate

SMALL = HexPlaneSize(((5, 6, 7, 4), (9, 10, 11, 6)), 4)
PUBLISHED_PAIRS = ("xy", "xz", "xt", "yz", "yt", "zt")


@pytest.fixture(scope="module")
def published(shared) -> dict[str, torch.Tensor]:
    return load_file(shared / "fixtures" / "animate3d_stage2" / "motion_field.safetensors")


@pytest.fixture(scope="module")
def field(published) -> HybridField:
    """A field with the published planes and heads."""
    field = HybridField(SMALL, global_head=True)
    with torch.no_grad():
        for level in range(2):
            planes = dict(zip(PUBLISHED_PAIRS, (published[f"grid.L{level}.{k}"] for k in range(6))))
            for k, (space, time) in enumerate(zip(("xy", "xz", "yz"), ("xt", "yt", "zt"))):
                field.planes.space[3 * level + k].copy_(planes[space])
                field.planes.time[3 * level + k].copy_(planes[time])
        heads = {"delta_xyz": field.means, "delta_rot": field.quats, "delta_scaling": field.log_scales,
                 "global_rot": field.turn, "global_trans": field.shift}
        for name, head in heads.items():
            for layer in (0, 2):
                head[layer].weight.copy_(published[f"{name}_network.layers.{layer}.weight"])
    return field


@pytest.mark.parametrize("moment", [-1.0, -0.2, 0.6, 1.0])
def test_field_matches_the_published_numbers(published, field, moment) -> None:
    points, times, name = published["xyz0"], torch.tensor([moment]), f"t{moment:+.1f}"
    assert points.abs().max() > 1  # some lie outside of the planes
    with torch.no_grad():
        torch.testing.assert_close(field.features(points, times)[0], published[f"{name}.features"], atol=1e-6, rtol=1e-5)
        offsets = field(points, times)
        means, _, scales = offsets.apply(points, published["rotation0"], published["scaling0"].exp())
        torch.testing.assert_close(field.move(points, times), means)
        torch.testing.assert_close(means[0], published[f"{name}.xyz"], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(scales[0], published[f"{name}.scaling"], atol=1e-6, rtol=1e-5)
        # A quaternion and its negative are one orientation; the published code picks the sign by a branch before it adds.
        both = torch.stack([offsets.apply(points, sign * published["rotation0"], scales[0])[1][0] for sign in (1, -1)])
        distance = (both - published[f"{name}.rotation"]).norm(dim=-1).amin(0)
        distance = torch.minimum(distance, (both + published[f"{name}.rotation"]).norm(dim=-1).amin(0))
    assert distance.max() < 1e-5


def test_sizes_of_the_papers() -> None:
    planes = HexPlane(PAPER_PLANES)
    assert [tuple(p.shape) for p in planes.time] == [(1, 16, 8, 100)] * 3
    assert [tuple(p.shape) for p in planes.space] == [(1, 16, 100, 100)] * 3
    assert TWO_LEVEL_PLANES.features == 32 and PAPER_PLANES.features == 16
    assert len(HexPlane(TWO_LEVEL_PLANES).time) == 6


def test_field_starts_still_and_moves_after_a_step() -> None:
    field = HybridField(SMALL, diffusion_width=3, generator=torch.Generator().manual_seed(0))
    points, times = torch.rand(20, 3) * 2 - 1, torch.linspace(-1, 1, 5)
    diffusion = torch.randn(5, 20, 3)
    torch.testing.assert_close(field.move(points, times, diffusion), points.expand(5, 20, 3))
    optimiser = torch.optim.Adam(field.parameters(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        (field.move(points, times, diffusion) - points - 0.1).square().mean().backward()
        optimiser.step()
    moved = field.move(points, times, diffusion) - points
    assert moved.mean() > 0.005
    assert not torch.equal(moved, field.move(points, times, torch.zeros_like(diffusion)) - points)


def test_features_are_continuous_in_time_and_linear_between_cells() -> None:
    planes = HexPlane(HexPlaneSize(((4, 4, 4, 3),), 2), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for plane in planes.time:
            plane.copy_(torch.rand(plane.shape, generator=torch.Generator().manual_seed(2)))
    points = torch.rand(6, 3) * 2 - 1
    fine = planes(points, torch.linspace(-1, 1, 401))
    assert (fine[1:] - fine[:-1]).abs().max() < 0.02
    torch.testing.assert_close(interpolate(torch.eye(3), torch.tensor([-2.0, -1, 0, 0.5, 1])),
                               torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0.5, 0.5], [0, 0, 1]]))


def test_periodic_planes_close_the_loop() -> None:
    planes = HexPlane(HexPlaneSize(((4, 4, 4, 5),), 2), periodic=True, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for plane in planes.time:
            plane.copy_(torch.rand(plane.shape, generator=torch.Generator().manual_seed(2)))
    points = torch.rand(6, 3) * 2 - 1
    both = planes(points, torch.tensor([-1.0, 1.0, -0.3, 1.7]))
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[2], both[3])
    assert (planes(points, torch.tensor([0.9])) - both[0]).abs().max() > 1e-3
    assert (planes(points, torch.tensor([0.999])) - both[0]).abs().max() < 0.02


def test_quaternions() -> None:
    angles = torch.tensor([[0.3, -1.1, 2.0], [3.0, 0.2, -0.4]], dtype=torch.float64)
    quats = euler_quaternion(angles)
    truth = Rotation.from_euler("xyz", angles.numpy())  # about x, then y, then z
    points = torch.randn(2, 3, dtype=torch.float64)
    np.testing.assert_allclose(turned(quats, points), truth.apply(points.numpy()), atol=1e-12)
    np.testing.assert_allclose(turned(quaternion_product(quats[:1], quats[1:]), points[:1]),
                               (truth[0] * truth[1]).apply(points[:1].numpy()), atol=1e-12)


def test_sampled_loop_goes_on_from_the_last_frame_to_the_first() -> None:
    angles = 2 * np.pi * np.arange(16) / 16
    path = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)[:, None].astype(np.float32)
    field = MotionField(path, np.ones((16, 1), np.float32), loops=True)
    np.testing.assert_array_equal(field.sample(field.times), path)
    np.testing.assert_array_equal(field.sample([1.0]), path[:1])
    fine = np.linspace(-1, 1, 321)
    truth = np.stack([np.cos(np.pi * (fine + 1)), np.sin(np.pi * (fine + 1)), 0 * fine], 1)
    np.testing.assert_allclose(field.sample(fine)[:, 0], truth, atol=2e-4)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_sampled_loop_with_few_frames(frames) -> None:
    vertices = np.random.default_rng(0).random((frames, 5, 3)).astype(np.float32)
    field = MotionField(vertices, np.ones((frames, 5), np.float32), loops=True)
    np.testing.assert_array_equal(field.sample(field.times), vertices)
    assert np.isfinite(field.sample(np.linspace(-1, 1, 7))).all()
