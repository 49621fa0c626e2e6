"""The user's video: masks, backgrounds, pictures that are missing, sizes."""

import sys
from pathlib import Path

import numpy as np
import pytest
from track4d.motion.footage import read_footage
from track4d_protocol.errors import InputError

sys.path.insert(0, str(Path(__file__).parent))
from films import KS, SIZE, VIEWMATS, bend, capsule, film  # noqa: E402


@pytest.fixture(scope="module")
def video() -> np.ndarray:
    mesh = capsule()
    return film(mesh, bend(mesh.vertices, 3))


def on_color(video: np.ndarray, color: int) -> np.ndarray:
    alpha = video[..., 3:].astype(np.float32) / 255
    return (video[..., :3] * alpha + color * (1 - alpha)).astype(np.uint8)


def test_masks_take_the_object_out_of_clutter(video):
    clutter = np.random.default_rng(0).integers(0, 255, video[..., :3].shape).astype(np.uint8)
    masks = video[..., 3] > 127
    footage = read_footage(np.where(masks[..., None], video[..., :3], clutter), VIEWMATS, KS, masks)
    np.testing.assert_array_equal(footage.masks, masks)
    assert np.abs(footage.colors[~masks].astype(int) - 128).max() <= 1
    with pytest.raises(InputError) as caught:
        read_footage(clutter, VIEWMATS, KS, masks[:, :2])
    assert caught.value.code == "bad_masks"


def test_a_plain_background_is_told_apart_though_a_picture_is_black(video):
    plain = on_color(video, 210)
    plain[1, 2] = 0
    footage = read_footage(plain, VIEWMATS, KS)
    assert footage.lost.sum() == 1 and footage.lost[1, 2]
    there = ~footage.lost
    overlap = (footage.masks & (video[..., 3] > 127))[there].sum() / (video[..., 3] > 127)[there].sum()
    assert overlap > 0.97
    assert footage.masks[there].sum() < 1.05 * (video[..., 3] > 127)[there].sum()


def test_empty_and_opaque_black_pictures_are_missing(video):
    broken = video.copy()
    broken[0, 1] = 0
    broken[3, 2] = (0, 0, 0, 255)
    assert {tuple(k) for k in np.argwhere(read_footage(broken, VIEWMATS, KS).lost)} == {(0, 1), (3, 2)}


@pytest.mark.parametrize("side", [2, 3])
def test_pictures_need_not_be_square(video, side):
    first, last = (int(k) for k in np.nonzero((video[..., 3] > 0).any(tuple({0, 1, 2, 3} - {side})))[0][[0, -1]])
    window = [slice(None)] * 4
    window[side] = slice(first - 2, last + 3)
    moved = KS.copy()
    moved[:, 3 - side, 2] -= first - 2
    whole, cropped = read_footage(video, VIEWMATS, KS), read_footage(video[tuple(window)], VIEWMATS, moved)
    assert video[tuple(window)].shape[side] < SIZE and cropped.size == max(video[tuple(window)].shape[2:4])
    np.testing.assert_allclose(cropped.Ks, moved, rtol=1e-6)
    there = whole.masks[tuple(window)]
    np.testing.assert_array_equal(cropped.masks[tuple(slice(k) for k in there.shape)], there)
    assert cropped.masks.sum() == there.sum()
    twice = np.kron(video[tuple(window)], np.ones((2, 2, 1), np.uint8))
    larger = read_footage(twice, VIEWMATS, moved * [[2], [2], [1]])
    assert larger.size == 2 * cropped.size and larger.masks.sum() == 4 * there.sum()
    window[side] = slice(first - 2, (first + last) // 2)
    with pytest.raises(InputError) as caught:
        read_footage(video[tuple(window)], VIEWMATS, moved)
    assert caught.value.code == "cut_off" and "view 0" in caught.value.message


@pytest.mark.parametrize(("views", "frames"), [(9, 2), (2, 65)])
def test_more_than_fits_is_refused(views, frames):
    video = np.zeros((views, frames, 32, 32, 4), np.uint8)
    with pytest.raises(InputError) as caught:
        read_footage(video, np.tile(np.eye(4), (views, 1, 1)), np.tile(np.eye(3), (views, 1, 1)))
    assert caught.value.code == "video_too_long"
    assert str(frames) in caught.value.message


def test_eight_views_of_sixty_four_frames_are_taken():
    video = np.zeros((8, 64, 32, 32, 4), np.uint8)
    video[:, :, 8:24, 8:24] = 255
    footage = read_footage(video, np.tile(np.eye(4), (8, 1, 1)), np.tile(np.eye(3), (8, 1, 1)))
    assert (footage.views, footage.frames) == (8, 64)
    assert not footage.lost.any()
    assert SIZE > footage.size == 32
