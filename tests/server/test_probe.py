"""Feature probing: points are found again by features that follow the surface, and not by features that don't."""

import cv2
import numpy as np
import pytest
import torch
from track4d.cli import app
from track4d.training import probe
from track4d.training.probe import STANDING_STILL, centred, nearest, track_errors
from track4d.training.video_data import ClipShape, Procedural
from track4d.video.features import all_features, save_small, shipped_small, video_features
from track4d.video.multiview_video import MultiViewVideo
from track4d.video.unet import MultiViewUNet, UNetConfig
from typer.testing import CliRunner

TINY = UNetConfig(channels=(16, 16), attention=(False, True), spatial_motion=(False, True), layers=1, heads=2, motion_heads=2,
                  groups=4, patch=4, text_dim=16, vocabulary=128, text_tokens=16, image_dim=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MultiViewVideo(MultiViewUNet(TINY).eval())


@pytest.fixture(scope="module")
def clip():
    return Procedural(validation=True)(0, 6, ClipShape(2, 6, 64, surface=True))


def surface_codes(clip):
    """Perfect features: a smooth random code of the place on the object that each pixel shows, nothing off it."""
    places = torch.from_numpy(clip.surface.astype(np.float32))  # [V, F, S, S, 3]
    directions = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)) * 8
    codes = torch.cat([(places @ directions).sin(), (places @ directions).cos()], -1)
    return (codes * torch.from_numpy(clip.video[..., 3:] > 127)).movedim(-1, 2)  # [V, F, C, S, S]


def test_features_that_follow_the_surface_track_its_points(clip, model, monkeypatch):
    monkeypatch.setattr(probe, "all_features", lambda *_: {"perfect": surface_codes(clip)})
    perfect, still = track_errors(model, [clip], ["perfect"])
    assert perfect.pck > 0.9 and perfect.error < 3 < still.error and perfect.points == still.points > 20
    assert perfect.likeness > 0.9 and perfect.contrast > 0.5
    assert (perfect.channels, perfect.height, perfect.width) == (96, 64, 64)


def test_standing_still_scores_what_the_points_moved(clip, model, monkeypatch):
    monkeypatch.setattr(probe, "all_features", lambda *_: {"perfect": surface_codes(clip)})
    monkeypatch.setattr(probe, "QUERIES", 1000)  # all of them
    _, still = track_errors(model, [clip], ["perfect"])
    moved = np.linalg.norm(clip.tracks - clip.tracks[:, :1], axis=-1) / 64
    tested = clip.visibility & clip.visibility[:, :1] & clip.mask[:, None] & (moved > 1 / 16)
    assert still.name == STANDING_STILL and still.error == pytest.approx(100 * moved[tested].mean(), rel=1e-5) and still.pck == 0


def test_features_that_stay_where_they_are_score_as_standing_still(clip, model, monkeypatch):
    """Codes of the pixel and not of the surface: the nearest neighbour is where the point was."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    phases = torch.randn(24, 2, generator=torch.Generator().manual_seed(0)) @ torch.stack([rows, columns]).flatten(1)
    codes = torch.cat([phases.sin(), phases.cos()]).view(1, 1, 48, 32, 32).expand(2, 6, -1, -1, -1)
    monkeypatch.setattr(probe, "all_features", lambda *_: {"pixel": codes})
    pixel, still = track_errors(model, [clip], ["pixel"])
    assert pixel.error == pytest.approx(still.error, abs=1.5) and pixel.pck < 0.2


def test_a_common_mode_of_a_frame_is_taken_away_by_centring(clip):
    """What freshly trained networks suffer from: every frame has a mean of its own, far larger than what tells points apart."""
    codes = surface_codes(clip) + 4 * torch.randn(1, 6, 96, 1, 1, generator=torch.Generator().manual_seed(1))
    tracks = torch.from_numpy(clip.tracks / np.float32(64))
    on = torch.from_numpy(clip.video[..., 3] > 127)
    visible = torch.from_numpy(clip.visibility & clip.visibility[:, :1] & clip.mask[:, None])

    def error(features):
        return (nearest(features, tracks[:, 0]) - tracks).norm(dim=-1)[visible].mean()

    assert error(centred(codes, on)) < 0.5 * error(codes)


def test_every_block_is_probed(clip, model):
    scores = track_errors(model, [clip])
    assert [score.name for score in scores] == [*model.unet.feature_names(), STANDING_STILL]
    assert all(np.isfinite([score.error, score.pck, score.likeness, score.contrast]).all() for score in scores)


def test_features_cover_the_picture_and_repeat(clip, model):
    one = video_features(clip.video, "the fox runs", clip.viewmats, network=model)
    assert one.shape == (2, 6, 16, 16, 16) and one.dtype == np.float32
    assert np.array_equal(one, video_features(clip.video, "the fox runs", clip.viewmats, network=model))
    assert not np.array_equal(one, video_features(clip.video, "the fox runs", clip.viewmats, network=model, seed=1))
    still = video_features(clip.video[:, 0], "", clip.viewmats, network=model)
    assert still.shape == (2, 1, 16, 16, 16)
    wide = np.pad(clip.video, ((0, 0), (0, 0), (0, 0), (32, 32), (0, 0)))  # 64 x 128
    assert video_features(wide, "", clip.viewmats, network=model).shape == (2, 6, 16, 8, 16)


def test_a_video_longer_than_the_network_takes_goes_through_in_parts(clip, model):
    """33 frames at once are too many; they go as 17 and 16, each part with a clean first frame."""
    long = np.concatenate([clip.video[:1, :, ::8, ::8]] * 6, 1)[:, :33]
    features = video_features(long, "", clip.viewmats[:1], network=model)
    assert features.shape[:2] == (1, 33) and np.isfinite(features).all()
    np.testing.assert_array_equal(features[:, 17:], video_features(long[:, 17:], "", clip.viewmats[:1], network=model))


def test_the_first_frame_is_not_noised(clip, model):
    """Its features change with the noise only through the other frames; a clip of one frame has none."""
    names = ["down_blocks.0.motion_modules.0"]
    one, other = (all_features(model, clip.video[:, :1], "", clip.viewmats, names, seed=seed)[names[0]] for seed in (0, 1))
    assert torch.equal(one, other)


def test_probe_prints_its_table_and_draws_heat_maps(model, tmp_path):
    weights, picture = tmp_path / "features.safetensors", tmp_path / "heat.png"
    save_small(weights, model.unet.state_dict(), TINY, {})
    command = ["probe", "--weights", str(weights), "--clips", "1", "--views", "1", "--frames", "3", "--heat", str(picture)]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "150"})
    assert result.exit_code == 0, result.output
    assert "up_blocks.1.motion_modules.1 *" in result.output and "best:" in result.output and STANDING_STILL in result.output
    drawn = cv2.imread(str(picture))
    assert drawn.shape[1] == 230 + 3 * 192 and drawn.shape[0] in (2 * 3 * 192, 2 * 4 * 192) and np.ptp(drawn) > 200


def test_the_shipped_network_finds_points_of_objects_it_has_never_seen():
    """Better than standing still does, which an untrained network is not; docs/results.md has the figures of more clips."""
    shape = ClipShape(2, 8, 64)
    clips = [Procedural(validation=True)(7, position, shape) for position in range(3)]
    network = shipped_small()
    scores, still = track_errors(network, clips, [network.unet.config.temporal_feature])
    assert scores.error < still.error and scores.pck > 0.1
