"""Hybrid features: the right place of the right view in the right frame, and nothing from views that don't see the point."""

import numpy as np
import pytest
import torch
import trimesh
from track4d.motion.hybrid_features import hybrid_features, reduced_planes, visible_by_depth, visible_by_rays
from track4d.motion.losses import project
from track4d_protocol.errors import InputError
from track4d_protocol.space import intrinsics, orbit_viewmats

SIZE = 64
VIEWMATS, KS = orbit_viewmats(), intrinsics(SIZE, 4)
CAMERAS = torch.from_numpy(VIEWMATS), torch.from_numpy(KS)


def two_spheres() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A small sphere before a large one, seen from +X; vertices [1, N, 3], faces, and points on both surfaces [1, P, 3]."""
    large = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    small = trimesh.creation.icosphere(subdivisions=3, radius=0.2)
    small.apply_translation([0.8, 0, 0.2])
    both = trimesh.util.concatenate([large, small])
    return (np.asarray(both.vertices, np.float32)[None], np.asarray(both.faces, np.int32),
            np.asarray(both.triangles_center, np.float32)[None])


def test_rays_and_depth_pictures_agree() -> None:
    vertices, faces, points = two_spheres()
    rays = visible_by_rays(vertices, faces, points, VIEWMATS)
    depth = visible_by_depth(vertices, faces, points, VIEWMATS, intrinsics(256, 4), 256)
    assert rays.shape == (1, 4, len(faces)) and 0.3 < rays.mean() < 0.6
    assert (rays == depth).mean() > 0.95  # pixels round where the surface is seen at a flat angle
    normals = np.asarray(trimesh.Trimesh(vertices[0], faces).face_normals)
    front, back = normals[:, 0] > 0.9, normals[:, 0] < -0.7
    large = np.linalg.norm(points[0], axis=1) < 0.51
    assert not rays[0, 0, back].any()
    assert rays[0, 0, front & ~large].all()  # the small sphere before
    assert not rays[0, 0, front & large].all()  # hides some of the large one behind


def test_a_point_reads_its_own_place_view_and_frame() -> None:
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    places = torch.stack([columns + 0.5, rows + 0.5]) * SIZE / 16  # pixels at the plane's cells
    planes = torch.stack([torch.stack([torch.cat([places, torch.full((1, 16, 16), 10.0 * v + f)]) for f in range(3)])
                          for v in range(4)])  # [V, F, 3, h, w]
    points = (torch.rand(3, 9, 3, generator=torch.Generator().manual_seed(0)) - 0.5)
    visible = torch.zeros(3, 4, 9, dtype=torch.bool)
    visible[:, 2] = True
    got = hybrid_features(planes, points, visible, *CAMERAS, SIZE)
    uv = project(points, *CAMERAS)[0][:, 2]
    torch.testing.assert_close(got[..., :2], uv - uv.mean(1, keepdim=True), atol=1e-3, rtol=0)
    assert got[..., 2].abs().max() < 1e-5  # the same for all points of a frame: centred away
    visible[:, 1, :4] = True
    both = hybrid_features(planes, points, visible, *CAMERAS, SIZE)
    torch.testing.assert_close(both[:, :4, 2] - both[:, 4:5, 2], torch.full((3, 4), -5.0))  # (10 + 20) / 2 - 20


def test_hidden_points_get_nothing_and_do_not_count() -> None:
    planes = torch.randn(4, 1, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    points = torch.rand(1, 6, 3) - 0.5
    visible = torch.ones(1, 4, 6, dtype=torch.bool)
    visible[:, :, 2] = False
    got = hybrid_features(planes, points, visible, *CAMERAS, SIZE)
    assert got[0, 2].abs().max() == 0 < got[0, 0].abs().max()
    assert got.mean(1).abs().max() < 1e-6
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(hybrid_features(planes, points[:, kept], visible[:, :, kept], *CAMERAS, SIZE), got[:, kept])


def test_features_are_linear_in_time_between_frames() -> None:
    planes = torch.randn(4, 3, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    points = (torch.rand(1, 6, 3) - 0.5).expand(3, 6, 3)
    visible = torch.ones(3, 4, 6, dtype=torch.bool)
    got = hybrid_features(planes, points, visible, *CAMERAS, SIZE, torch.tensor([1.0, 1.25, 2.0]))
    torch.testing.assert_close(got[1], 0.75 * got[0] + 0.25 * got[2])


def test_reduction_keeps_what_varies_most_and_is_definite() -> None:
    generator = torch.Generator().manual_seed(0)
    inner = torch.randn(2, 3, 2, 8, 8, generator=generator) * torch.tensor([3.0, 1.0])[:, None, None]
    mixing = torch.linalg.qr(torch.randn(20, 20, generator=generator))[0][:, :2]
    planes = torch.einsum("vfchw,dc->vfdhw", inner, mixing) + torch.randn(1, 3, 20, 1, 1, generator=generator) * 50
    reduced = reduced_planes(planes, 4)
    assert reduced.shape == (2, 3, 4, 8, 8)
    deviation = reduced.square().mean((0, 1, 3, 4)).sqrt()
    torch.testing.assert_close(deviation[0], torch.tensor(1.0), rtol=1e-3, atol=0)
    assert 0.25 < deviation[1] < 0.45 and deviation[2:].max() < 1e-3
    torch.testing.assert_close(reduced, reduced_planes(planes, 4))
    assert reduced_planes(planes[:, :, :2], 4).shape[2] == 4  # fewer channels than wanted: zeros


def test_features_of_another_video_are_refused() -> None:
    points, visible = torch.zeros(3, 1, 3), torch.ones(3, 4, 1, dtype=torch.bool)
    for shape in [(3, 3, 2, 4, 4), (4, 2, 2, 4, 4)]:
        with pytest.raises(InputError) as caught:
            hybrid_features(torch.zeros(shape), points, visible, *CAMERAS, SIZE)
        assert caught.value.code == "bad_features"
