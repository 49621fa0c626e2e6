"""The whole multi-view video model, with small random weights in the published layout, and the small size without encoders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from track4d.motion.sds import video_prior
from track4d.video.checkpoints import convert_published, load_published
from track4d.video.multiview_video import MultiViewVideo, fitted, straight_bytes
from track4d.video.unet import MultiViewUNet, UNetConfig
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.space import orbit_viewmats

VIEWMATS = orbit_viewmats((0, 90))
PROMPT = "a fox runs"


@pytest.fixture(scope="module")
def model(published: Path, tmp_path_factory: pytest.TempPathFactory) -> MultiViewVideo:
    model = load_published(convert_published(published, tmp_path_factory.mktemp("models") / "published"))
    model.size = 32  # pictures for a test
    return model


@pytest.fixture(scope="module")
def small() -> MultiViewVideo:
    torch.manual_seed(0)
    network = MultiViewUNet(UNetConfig.small()).requires_grad_(False).eval()
    for parameter in network.parameters():  # nothing stays zero
        parameter += 0.02 * torch.randn(parameter.shape)
    model = MultiViewVideo(network)
    model.size = 16
    return model


def pictures(views: int = 2, height: int = 48, width: int = 48, channels: int = 4) -> np.ndarray:
    """A blue disc on nothing."""
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    inside = (x**2 + y**2 < 0.5).astype(np.uint8)
    one = np.stack([inside * 20, inside * 60, inside * 220, inside * 255], -1)
    return np.stack([np.roll(one, 3 * v, 1) for v in range(views)])[..., :channels]


def test_pictures_become_a_video(model: MultiViewVideo) -> None:
    told: list[tuple[int, int, bool]] = []
    video = model.generate(pictures(), VIEWMATS, PROMPT, frames=3, steps=5,
                           report=lambda stage, step, total, preview=None: told.append((step, total, preview is not None)))
    assert video.shape == (2, 3, 32, 32, 4) and video.dtype == np.uint8 and (video[..., 3] == 255).all()
    assert told == [(0, 5, False), (1, 5, False), (2, 5, False), (3, 5, False), (4, 5, False), (5, 5, True)]
    again, other = (model.generate(pictures(), VIEWMATS, PROMPT, frames=3, steps=5, seed=seed) for seed in (0, 1))
    assert np.array_equal(video, again) and not np.array_equal(video, other)


def test_prompt_pictures_and_guidance_each_matter(model: MultiViewVideo) -> None:
    moving = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    rest, _ = fitted(pictures(), 32, model.cell)
    viewmats = torch.from_numpy(VIEWMATS)

    def believed(**changes) -> torch.Tensor:
        given = {"prompt": PROMPT, "viewmats": viewmats, "first_frames": rest, "guidance": 7.5} | changes
        with torch.no_grad():
            return model.denoise(moving, 500, **given)

    plain = believed()
    assert plain.shape == moving.shape and torch.equal(plain, believed())
    for changes in ({"prompt": "a fox sits"}, {"first_frames": rest.flip(3)}, {"viewmats": viewmats.flip(0)}, {"guidance": 1.0}):
        assert not torch.allclose(believed(**changes), plain, atol=1e-5), changes
    half = believed(guidance=0.0)
    torch.testing.assert_close(plain, half + 7.5 * (believed(guidance=1.0) - half), rtol=1e-3, atol=1e-4)
    assert torch.equal(half, believed(guidance=0.0, prompt="something else"))


def test_without_a_prompt_there_is_no_image_embedding_but_the_first_frame(model: MultiViewVideo) -> None:
    calls = []
    handle = model.unet.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
    rest, _ = fitted(pictures(), 32, model.cell)
    conditions = model.conditions(PROMPT, torch.from_numpy(VIEWMATS), rest)
    first = model.encode(rest)
    model.predictions(torch.zeros(2, 2, 4, 4, 4), first, 500, conditions)
    handle.remove()
    free, conditional = calls
    assert (free[4] == 0).all() and (conditional[4] != 0).any()
    assert torch.equal(free[2][0], conditions.no_text) and torch.equal(conditional[2][0], conditions.text)
    for inputs in calls:
        assert torch.equal(inputs[0][0, :, 0], first) and torch.equal(inputs[3][0], conditions.cameras)


def test_gradients_reach_pictures_latents_and_weights(model: MultiViewVideo) -> None:
    rest, _ = fitted(pictures(), 32, model.cell)
    rest.requires_grad_()
    moving = torch.randn(2, 1, 4, 4, 4).requires_grad_()
    weight = model.unet.get_parameter("mid_block.motion_modules.0.proj_out.weight").requires_grad_()
    model.denoise(moving, 100, PROMPT, torch.from_numpy(VIEWMATS), rest).sum().backward()
    weight.requires_grad_(False)
    assert all(float(tensor.grad.abs().sum()) > 0 for tensor in (rest, moving, weight))


@pytest.mark.parametrize("which, size", [("model", 32), ("model", 48), ("small", 16)])
def test_4d_sds_pulls_rendered_pictures(request: pytest.FixtureRequest, which: str, size: int) -> None:
    """Eq. 11 end to end, through VAE or without one: every moving picture is pulled, at transparent places by its alpha."""
    model = request.getfixturevalue(which)
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(2, 4, size, size, generator=generator)
    moving = torch.rand(3, 2, size, size, 4, generator=generator).requires_grad_()  # [M, V, S, S, 4]
    prior = video_prior(model, PROMPT, torch.from_numpy(VIEWMATS), still)
    loss = prior(moving, generator)
    loss.backward()
    assert loss.ndim == 0 and float(loss.detach()) > 0 and torch.isfinite(moving.grad).all()
    assert (moving.grad.abs().amax((2, 3)) > 0).all()
    assert float(prior(moving.detach(), generator)) != float(loss.detach())  # another step, other noise


def test_a_prompt_of_500_words_is_cut_off_as_clip_does_and_says_so(model: MultiViewVideo, small: MultiViewVideo) -> None:
    long = "the fox runs " * 167
    for one in (model, small):
        [warning] = one.prompt_warnings(long)
        assert warning["code"] == "long_prompt" and warning["action"]
        assert one.prompt_warnings(PROMPT) == []
        rest, _ = fitted(pictures(), one.size, one.cell)
        conditions = one.conditions(long, torch.from_numpy(VIEWMATS), rest)
        assert len(conditions.text) == len(conditions.no_text)
    ids = model.encoders.tokenizer(long, padding="max_length", truncation=True).input_ids
    assert len(ids) == 77 and ids[-1] == model.encoders.tokenizer.eos_token_id
    assert "77" in model.prompt_warnings(long)[0]["message"]


@pytest.mark.parametrize("views, frames", [(1, 2), (9, 2), (2, 20)])
def test_any_number_of_views_and_frames(small: MultiViewVideo, views: int, frames: int) -> None:
    viewmats = orbit_viewmats(np.arange(views) * 40.0)
    video = small.generate(pictures(views), viewmats, PROMPT, frames=frames, steps=1, guidance=1)
    assert video.shape == (views, frames, 16, 16, 4)


def test_65_frames_and_a_loop_are_made_in_windows(small: MultiViewVideo) -> None:
    calls = []
    handle = small.unet.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[2]))
    small.size = 8
    video = small.generate(pictures(1), VIEWMATS[:1], PROMPT, frames=65, steps=1, guidance=1, loop=True)
    small.size = 16
    handle.remove()
    assert video.shape[:2] == (1, 65) and calls == [16] * 7


def test_pictures_need_not_be_square(model: MultiViewVideo, small: MultiViewVideo) -> None:
    assert model.generate(pictures(1, 30, 50), VIEWMATS[:1], PROMPT, frames=2, steps=1).shape == (1, 2, 19, 32, 4)
    assert small.generate(pictures(1, 50, 25, 3), VIEWMATS[:1], PROMPT, frames=2, steps=1).shape == (1, 2, 16, 8, 4)
    rest, (height, width) = fitted(pictures(1, 30, 50), 32, 8)
    assert rest.shape == (1, 4, 24, 32) and (height, width) == (19, 32) and (rest[:, :, 19:] == 0).all()


def test_the_small_size_keeps_transparency(small: MultiViewVideo) -> None:
    rest, _ = fitted(pictures(), 48, small.cell)
    back = straight_bytes(small.decode(small.encode(rest)))
    assert np.array_equal(back[..., 3], pictures()[..., 3])
    assert np.abs(back.astype(int) - pictures()).max() <= 1


@pytest.mark.parametrize("changes, code", [
    ({"pictures": np.zeros((2, 8, 8, 4), np.float32)}, "bad_pictures"),
    ({"pictures": np.zeros((8, 8, 4), np.uint8)}, "bad_pictures"),
    ({"viewmats": VIEWMATS[:1]}, "bad_cameras"),
    ({"viewmats": VIEWMATS * np.nan}, "bad_cameras"),
    ({"frames": 1}, "bad_settings"),
    ({"frames": 3, "loop": True}, "bad_settings"),
    ({"steps": 0}, "bad_settings"),
    ({"steps": 1000}, "bad_settings"),
    ({"freeinit": 0}, "bad_settings"),
])
def test_what_cannot_be_used_is_refused(small: MultiViewVideo, changes: dict, code: str) -> None:
    with pytest.raises(InputError) as refused:
        small.generate(**{"pictures": pictures(), "viewmats": VIEWMATS, "prompt": PROMPT} | changes)
    assert refused.value.code == code and refused.value.action


def test_a_report_can_cancel(small: MultiViewVideo) -> None:
    steps = []

    def report(stage: str, step: int, total: int, preview: np.ndarray | None = None) -> None:
        steps.append(step)
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        small.generate(pictures(), VIEWMATS, PROMPT, frames=2, steps=25, report=report)
    assert steps == [0, 1, 2]
