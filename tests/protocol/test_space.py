"""Blender's cameras and ours see the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from track4d_protocol.space import orbit_viewmats, viewmat_to_camera_matrix


@settings(deadline=None)
@given(st.floats(-180, 180), st.floats(-89, 89), st.floats(0.5, 50), st.integers(0, 2**32 - 1))
def test_a_camera_of_blender_sees_every_point_where_the_view_matrix_has_it(azimuth, elevation, distance, seed) -> None:
    viewmat = orbit_viewmats([azimuth], elevation, distance)[0].astype(np.float64)
    points = np.random.default_rng(seed).normal(size=(8, 3))
    ours = points @ viewmat[:3, :3].T + viewmat[:3, 3]  # x right, y down, z forward
    matrix_world = viewmat_to_camera_matrix(viewmat)
    blenders = (points - matrix_world[:3, 3]) @ matrix_world[:3, :3]  # x right, y up, z backward
    np.testing.assert_allclose(blenders * (1, -1, -1), ours, atol=1e-4)
    np.testing.assert_allclose(np.linalg.inv(matrix_world)[:3, :3] @ matrix_world[:3, :3], np.eye(3), atol=1e-9)
