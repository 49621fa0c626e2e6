"""Requests are checked where they enter; messages come back as they were."""

import numpy as np
import pytest
from track4d_protocol.errors import InputError, TransportError
from track4d_protocol.limits import Limits
from track4d_protocol.messages import Job, JobState, Request, Settings, check_request
from track4d_protocol.space import intrinsics, orbit_viewmats


def make_request(**settings) -> Request:
    """Two triangles of two objects with two materials."""
    arrays = {
        "vertices": np.random.default_rng(0).random((6, 3), np.float32),
        "faces": np.array([[0, 1, 2], [3, 4, 5]], np.int32),
        "uvs": np.zeros((2, 3, 2), np.float32), "materials": np.array([0, 1], np.int32),
        "texture_0": np.zeros((1, 1, 3), np.uint8), "texture_1": np.zeros((4, 8, 3), np.uint8),
        "object_counts": np.array([3, 3], np.int32), "views": np.zeros((4, 16, 16, 4), np.uint8),
        "viewmats": orbit_viewmats(), "Ks": intrinsics(16, 4)}
    return Request(Settings(**{"prompt": "the fox is running"} | settings), ["fox", "ball"], arrays)


def test_a_good_request_passes():
    check_request(make_request())
    check_request(make_request(preset="fast", frames=600, front="+X", seed=2**62))


def test_a_request_with_a_video_needs_no_pictures_and_no_prompt():
    request = make_request(task="fit", prompt="")
    del request.arrays["views"]
    with pytest.raises(InputError) as caught:
        check_request(request)
    assert caught.value.code == "missing_array"
    request.arrays["video"] = np.zeros((4, 16, 20, 24, 3), np.uint8)
    check_request(request)
    request.arrays["video"] = np.zeros((4, 16, 20, 24, 2), np.uint8)
    with pytest.raises(InputError, match="2 colour channels"):
        check_request(request)


@pytest.mark.parametrize("code, settings", [
    ("bad_settings", {"preset": "best"}), ("bad_settings", {"task": "paint"}), ("bad_front", {"front": "Z"}),
    ("bad_settings", {"frames": 1}), ("bad_settings", {"frames": 10_000}), ("bad_settings", {"seed": -1}),
    ("empty_prompt", {"prompt": "  "}), ("prompt_too_long", {"prompt": "x" * 3000})])
def test_settings_out_of_range_are_refused(code, settings):
    with pytest.raises(InputError) as caught:
        check_request(make_request(**settings))
    assert caught.value.code == code and caught.value.action


@pytest.mark.parametrize("code, name, array", [
    ("bad_array", "vertices", np.zeros((6, 2), np.float32)),
    ("bad_array", "vertices", np.zeros((6, 3), np.int32)),
    ("not_finite", "vertices", np.full((6, 3), np.nan, np.float32)),
    ("bad_array", "faces", np.zeros((2, 4), np.int32)),
    ("bad_faces", "faces", np.array([[0, 1, 6]] * 2, np.int32)),
    ("bad_faces", "faces", np.array([[0, 1, -1]] * 2, np.int32)),
    ("bad_array", "uvs", np.zeros((3, 3, 2), np.float32)),
    ("bad_materials", "materials", np.array([0, 2], np.int32)),
    ("bad_array", "texture_0", np.zeros((1, 1, 4), np.uint8)),
    ("bad_array", "texture_3", np.zeros((1, 1, 3), np.uint8)),
    ("too_large", "texture_0", np.zeros((1, 5000, 3), np.uint8)),
    ("bad_array", "object_counts", np.array([3, 4], np.int32)),
    ("bad_array", "object_counts", np.array([6], np.int32)),
    ("bad_array", "views", np.zeros((4, 16, 8, 4), np.uint8)),
    ("bad_array", "views", np.zeros((3, 16, 16, 4), np.uint8)),
    ("not_finite", "viewmats", np.full((4, 4, 4), np.inf, np.float32))])
def test_arrays_that_do_not_fit_are_refused(code, name, array):
    request = make_request()
    request.arrays[name] = array
    with pytest.raises(InputError) as caught:
        check_request(request)
    assert caught.value.code == code


@pytest.mark.parametrize("limits", [Limits(vertices=5), Limits(faces=1), Limits(views=3), Limits(pixels=15),
                                    Limits(objects=1)])
def test_sizes_have_limits(limits):
    with pytest.raises(InputError) as caught:
        check_request(make_request(), limits)
    assert caught.value.code == "too_large"


def test_a_mesh_without_triangles_is_refused():
    request = make_request()
    request.arrays |= {"faces": np.zeros((0, 3), np.int32), "uvs": np.zeros((0, 3, 2), np.float32),
                       "materials": np.zeros(0, np.int32)}
    with pytest.raises(InputError) as caught:
        check_request(request)
    assert caught.value.code == "empty_mesh"


def test_settings_and_jobs_come_back():
    settings = Settings("the fox is running", 3, 24, "fast", "+X", "animate")
    assert Settings.from_dict(settings.to_dict()) == settings
    assert Settings.from_dict({"prompt": "x", "of a later version": 1}) == Settings("x")
    job = Job("a", JobState.RUNNING, "fit", 3, 10, 4.5, 0, None, ["fox"], "run", 12.0)
    assert Job.from_dict(job.to_dict()) == job
    assert Job.from_dict(job.to_dict() | {"of a later version": 1}) == job


@pytest.mark.parametrize("data", [None, [], {"prompt": 3}, {"seed": True}, {"frames": "16"}, {"frames": 16.0}])
def test_settings_of_wrong_types_are_refused(data):
    with pytest.raises(InputError) as caught:
        Settings.from_dict(data)
    assert caught.value.code == "bad_settings"


@pytest.mark.parametrize("data", [None, {}, {"id": "a", "state": "sleeping"}, [1]])
def test_odd_jobs_are_refused(data):
    with pytest.raises(TransportError):
        Job.from_dict(data)
