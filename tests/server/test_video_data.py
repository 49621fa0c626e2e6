"""The video models' training data: tracks are exact, batches repeatable, stored clips come back."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import trimesh
from track4d.geometry import zbuffer
from track4d.tracking import MovingMesh, exact_tracks
from track4d.training import asset_clips, mv_video, shards, video_data
from track4d.training.objects import make_object
from track4d.training.verbs import Action, animate
from track4d.training.video_data import ClipShape, Mixture, Procedural, fit_clip, load_batches, make_batch, shuffled
from track4d.video.diffusion import frame_times
from track4d.video.text import VERB_NAMES
from track4d_protocol.errors import InputError
from track4d_protocol.space import intrinsics, orbit_viewmats

SMALL = ClipShape(views=2, frames=4, size=32)


@pytest.fixture(scope="module")
def dancer():
    """A dancing biped and its cameras at 96 pixels: (vertices [F, N, 3], faces, viewmats, Ks, fragments)."""
    thing = make_object(np.random.default_rng(1), "biped")
    vertices = animate(thing, Action(VERB_NAMES.index("dance"), 1.3), frame_times(6).numpy())
    viewmats, Ks = video_data.orbit_cameras(ClipShape(3, 6, 96), video_data.reach(vertices))
    return vertices, thing.faces, viewmats, Ks, zbuffer.rasterise(vertices, thing.faces, viewmats, Ks, 96)


def test_tracks_agree_with_rays(dancer):
    """A ray from the camera to where a point should be meets the surface there if and only if the point is visible."""
    vertices, faces, viewmats, Ks, fragments = dancer
    tracks, visibility, mask = video_data.exact_tracks(faces, vertices, viewmats, Ks, fragments)
    column, row = video_data.query_grid(96).T
    agree = []
    for v in range(len(viewmats)):
        on = np.flatnonzero(fragments.faces[v, row, column] >= 0)
        assert mask[v].sum() == len(on) > 10
        np.testing.assert_allclose(tracks[v, 0, : len(on)], np.stack([column, row], 1)[on] + 0.5, atol=2e-3)
        eye = -viewmats[v, :3, :3].T @ viewmats[v, :3, 3]
        for f in range(len(vertices)):
            surface = trimesh.Trimesh(vertices[f], faces, process=False)
            uv = np.concatenate([tracks[v, f, : len(on)], np.ones((len(on), 1))], 1)
            rays = (uv @ np.linalg.inv(Ks[v]).T) @ viewmats[v, :3, :3]
            rays /= np.linalg.norm(rays, axis=1, keepdims=True)
            face, weights = fragments.faces[v, row[on], column[on]], fragments.weights[v, row[on], column[on]]
            weights = np.concatenate([1 - weights.sum(1, keepdims=True), weights], 1)
            points = (vertices[f][faces[face]] * weights[..., None]).sum(1)
            distance = np.linalg.norm(points - eye, axis=1)
            assert np.abs(np.cross(rays, points - eye)).max() < 1e-4  # the track is where the point projects to
            hits, which, _ = surface.ray.intersects_location(np.tile(eye, (len(on), 1)), rays, multiple_hits=False)
            nearest = np.full(len(on), np.inf)
            nearest[which] = np.linalg.norm(hits - eye, axis=1)
            agree.append((nearest > distance - video_data.TOLERANCE) == visibility[v, f, : len(on)])
    assert np.concatenate(agree).mean() > 0.985
    assert 0.5 < visibility[mask[:, None].repeat(6, 1)].mean() < 0.98  # both kinds occur


def test_tracks_agree_with_the_tracker_of_geometry(dancer):
    vertices, faces, viewmats, Ks, fragments = dancer
    tracks, visibility, mask = video_data.exact_tracks(faces, vertices, viewmats, Ks, fragments)
    gaps, agree = [], []
    for v in range(len(viewmats)):
        on = mask[v]
        queries = np.concatenate([np.zeros((on.sum(), 1)), tracks[v, 0, on]], 1)[None].astype(np.float32)
        other = exact_tracks(MovingMesh(vertices, faces, viewmats[[v]], Ks[[v]]), queries, 96)
        gaps.append(np.abs(other.points[0] - tracks[v][:, on]).max((0, 2)))
        agree.append(other.visibility[0] == visibility[v][:, on])
    assert np.median(np.concatenate(gaps)) < 1e-4 and (np.concatenate(gaps) < 0.1).mean() > 0.95  # on an edge either is right
    assert np.concatenate(agree, 1).mean() > 0.95


def test_pixels_of_a_track_show_the_same_place():
    """The surface is a correspondence between all pixels: along a visible track its value stays."""
    clip = Procedural()(3, 1, ClipShape(3, 6, 96, surface=True))
    assert ((clip.surface != 0).any(-1) == (clip.video[..., 3] > 127)).mean() > 0.97
    views, frames, queries = np.nonzero(clip.visibility & clip.mask[:, None])
    column, row = np.floor(clip.tracks[views, frames, queries]).astype(int).T
    start = np.floor(clip.tracks[views, 0, queries]).astype(int).T
    here, there = clip.surface[views, frames, row, column], clip.surface[views, 0, start[1], start[0]]
    gaps = np.linalg.norm(here.astype(float) - there, axis=1)[(here != 0).any(1)]
    assert np.median(gaps) < 0.02 and (gaps < 0.06).mean() > 0.95  # a pixel is 0.025 wide


def test_random_cameras_keep_the_object_in_the_picture():
    for position in range(12):
        video = Procedural()(0, position, ClipShape(4, 5, 48)).video
        alpha = video[..., 3]
        assert alpha.max() == 255 and 0.005 < (alpha > 0).mean() < 0.8
        assert max(alpha[..., 0, :].max(), alpha[..., -1, :].max(), alpha[..., 0].max(), alpha[..., -1].max()) == 0
        assert (video[alpha == 0] == 0).all()


def test_a_batch_is_what_it_says():
    batch = make_batch(Procedural(), replace(SMALL, surface=True), 0, range(3), points=8)
    assert batch.video.shape == (3, 2, 4, 4, 32, 32) and batch.video.dtype == torch.float32
    assert 0 <= batch.video.min() and batch.video.max() <= 1
    assert (batch.video[:, :, :, :3] <= batch.video[:, :, :, 3:] + 1e-6).all()  # premultiplied
    assert batch.viewmats.shape == (3, 2, 4, 4) and batch.Ks.shape == (3, 2, 3, 3) and len(batch.captions) == 3
    assert batch.tracks.shape == (3, 2, 4, 8, 2) and batch.visibility.shape == (3, 2, 4, 8) and batch.mask.shape == (3, 2, 8)
    assert batch.surface.shape == (3, 2, 4, 3, 32, 32)
    exists = batch.mask[:, :, None].expand_as(batch.visibility)
    assert not batch.visibility[~exists].any() and (batch.tracks[~exists] == 0).all()
    assert batch.visibility[:, :, 0][batch.mask].all()
    first = batch.tracks[:, :, 0][batch.mask].long()
    b, v, _ = torch.nonzero(batch.mask).T
    assert (batch.video[b, v, 0, 3, first[:, 1], first[:, 0]] > 0.2).all()  # queries lie on the object
    moved = batch.to("cpu")
    assert moved.captions == batch.captions and torch.equal(moved.tracks, batch.tracks)


def same(a, b) -> bool:
    return a.captions == b.captions and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in ("video", "viewmats", "Ks", "tracks", "visibility", "mask"))


def test_batches_don_t_depend_on_who_makes_them():
    """Worker processes, a resumed training and this process see the same; another rank or seed does not."""
    here = list(load_batches(Procedural(), SMALL, 2, 7, 0, 4, workers=0))
    ahead = list(load_batches(Procedural(), SMALL, 2, 7, 0, 4, workers=2))
    resumed = list(load_batches(Procedural(), SMALL, 2, 7, 2, 4, workers=0))
    assert len(here) == 4 and all(map(same, here, ahead)) and all(map(same, here[2:], resumed))
    ranks = [next(iter(load_batches(Procedural(), SMALL, 1, 7, 0, 1, workers=0, rank=rank, world=2))) for rank in (0, 1)]
    assert same(ranks[0], make_batch(Procedural(), SMALL, 7, [0])) and same(ranks[1], make_batch(Procedural(), SMALL, 7, [1]))
    assert not same(here[0], next(iter(load_batches(Procedural(), SMALL, 2, 8, 0, 1, workers=0))))
    assert not same(here[0], make_batch(Procedural(validation=True), SMALL, 7, range(2)))


def test_shapes_take_turns():
    shapes = [ClipShape(2, 4, 32), ClipShape(1, 8, 16)]
    batches = list(load_batches(Procedural(), shapes, 1, 7, 1, 4, workers=0))
    assert [tuple(batch.video.shape[1:]) for batch in batches] == [(1, 8, 4, 16, 16), (2, 4, 4, 32, 32), (1, 8, 4, 16, 16)]
    assert same(batches[1], make_batch(Procedural(), shapes[0], 7, [2]))


def test_shuffling_visits_every_clip_once_per_round():
    rounds = [[shuffled(5, position, 7) for position in range(start, start + 7)] for start in (0, 7, 14)]
    assert all(sorted(visited) == list(range(7)) for visited in rounds) and rounds[0] != rounds[1]


def test_a_mixture_keeps_its_share_and_each_source_its_order():
    def source(name):
        return lambda seed, position, shape: (name, position)

    drawn = [Mixture(source("a"), source("b"), 0.3)(0, position, SMALL) for position in range(100)]
    assert [n for name, n in drawn if name == "b"] == list(range(30))
    assert [n for name, n in drawn if name == "a"] == list(range(70))


# Stored clips


@pytest.fixture
def folder(tmp_path):
    """Two shards with four clips of four rigs, and the clips."""
    clips = {}
    for k in range(4):
        clip = Procedural()(0, k, ClipShape(4, 6, 48, surface=True))
        clips[f"clip-{k}"] = replace(clip, info={"rig": f"rig {k}", "licence": "CC0 1.0"})
    items = [(key, shards.encode(clip)) for key, clip in clips.items()]
    shards.write_shard(tmp_path / "shard-00000.tar", items[:3])
    shards.write_shard(tmp_path / "shard-00001.tar", items[3:])
    return tmp_path, clips


def test_shards_give_back_what_was_written(folder):
    path, clips = folder
    entries = [entry for shard in sorted(path.glob("*.tar")) for entry in shards.read_index(shard)]
    assert [entry.key for entry in entries] == list(clips)
    for entry in entries:
        clip, read = clips[entry.key], shards.read_clip(entry, surface=True)
        for name in ("video", "viewmats", "Ks", "tracks", "visibility", "mask"):
            np.testing.assert_array_equal(getattr(read, name), getattr(clip, name))
        assert np.abs(read.surface.astype(float) - clip.surface).max() < 2e-3
        assert ((read.surface != 0).any(-1) == (clip.surface != 0).any(-1)).all()
        assert read.caption == clip.caption and read.info["licence"] == "CC0 1.0"


def test_no_rig_is_in_training_and_validation(folder):
    path, clips = folder
    training, validation = shards.open_shards(path), shards.open_shards(path, validation=True)
    rigs = [{entry.info["rig"] for entry in part.entries} for part in (training, validation)]
    assert not rigs[0] & rigs[1] and rigs[0] | rigs[1] == {clip.info["rig"] for clip in clips.values()}
    assert len(shards.open_shards(path, share=0).entries) == 4
    batch = next(iter(load_batches(training, ClipShape(4, 6, 48), 2, 0, 0, 1, workers=0)))
    assert batch.video.shape == (2, 4, 6, 4, 48, 48) and set(batch.captions) <= {clip.caption for clip in clips.values()}
    with pytest.raises(InputError) as error:
        shards.open_shards(path / "none")
    assert error.value.code == "no_shards"


@pytest.mark.parametrize("keep", [100, 3000, 30_000])
def test_a_damaged_shard_is_named(folder, keep):
    path, _ = folder
    shard = path / "shard-00000.tar"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(InputError) as error:
        for entry in shards.read_index(shard):
            shards.read_clip(entry)
    assert error.value.code == "bad_shard" and "shard-00000.tar" in error.value.message


def test_an_unfinished_shard_is_not_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        shards.write_shard(tmp_path / "shard-00000.tar", [])
    assert not list(tmp_path.glob("*.tar"))


def test_a_stored_clip_is_reduced_to_what_is_asked_for():
    clip = Procedural()(0, 2, ClipShape(4, 6, 64, surface=True))
    small = fit_clip(clip, ClipShape(2, 3, 32, surface=True), np.random.default_rng(0))
    assert small.video.shape == (2, 3, 32, 32, 4) and small.surface.shape == (2, 3, 32, 32, 3)
    v = int(np.flatnonzero((clip.viewmats == small.viewmats[0]).all((1, 2)))[0])
    np.testing.assert_array_equal(small.viewmats[1], clip.viewmats[(v + 2) % 4])
    np.testing.assert_allclose(small.Ks[0, :2], clip.Ks[0, :2] / 2)
    f = int(np.abs(clip.tracks[v][:5, None] / 2 - small.tracks[0][None, :1]).max((1, 2, 3)).argmin())
    np.testing.assert_allclose(small.tracks[0], clip.tracks[v][f : f + 5 : 2] / 2, atol=1e-5)
    premultiplied = clip.video[v, f, ..., :3] * (clip.video[v, f, ..., 3:] / 255.0)
    reduced = small.video[0, 0, ..., :3] * (small.video[0, 0, ..., 3:] / 255.0)
    assert np.abs(premultiplied.reshape(32, 2, 32, 2, 3).mean((1, 3)) - reduced).max() < 2
    for shape, code in ((ClipShape(5, 3, 32), "too_few_views"), (ClipShape(2, 7, 32), "too_few_frames"),
                        (ClipShape(2, 3, 65), "clip_too_small")):
        with pytest.raises(InputError) as error:
            fit_clip(clip, shape, np.random.default_rng(0))
        assert error.value.code == code


# MV-Video


@pytest.fixture
def video_list(tmp_path):
    """A list with one clip of 12 frames as MV-Video has it, and the clip before it became video files."""
    import av

    thing = make_object(np.random.default_rng(5), "quadruped")
    vertices = animate(thing, Action(VERB_NAMES.index("walk")), frame_times(12).numpy())
    mesh = video_data.Mesh(thing.vertices, thing.faces, textures=[np.ones((1, 1, 3), np.float32)])
    shape = ClipShape(4, 12, 96)
    viewmats = orbit_viewmats(7 + 90.0 * np.arange(4), 20.0)
    clip = video_data.draw_clip(mesh, vertices, viewmats, intrinsics(96, 4), shape, "the dog walks", {}, thing.colors)
    (tmp_path / "dog").mkdir()
    for v, view in enumerate(clip.video):
        alpha = view[..., 3:] / 255.0
        with av.open(str(tmp_path / "dog" / f"{v}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(24), options={"crf": "5"})
            stream.width = stream.height = 96
            stream.pix_fmt = "yuv444p"
            for picture in (view[..., :3] * alpha + 127 * (1 - alpha)).astype(np.uint8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
    path = tmp_path / "list.json"
    entry = {"data_path": [f"dog/{v}.mp4" for v in range(4)], "text_prompt": clip.caption, "angle": {"elv": 20, "azi_start": 7}}
    path.write_text(json.dumps([entry]))
    return path, clip


def test_mv_video_is_read(video_list):
    path, clip = video_list
    read = mv_video.open_mv_video(path)(0, 0, ClipShape(4, 12, 96))
    assert read.caption == "the dog walks" and read.video.shape == clip.video.shape
    np.testing.assert_allclose(read.viewmats, clip.viewmats, atol=1e-6)
    both = (read.video[..., 3] > 127) & (clip.video[..., 3] > 127)
    either = (read.video[..., 3] > 127) | (clip.video[..., 3] > 127)
    assert both.sum() / either.sum() > 0.9
    assert np.abs(read.video[both][:, :3].astype(int) - clip.video[both][:, :3]).mean() < 12
    assert read.tracks.shape == (4, 12, video_data.GRID**2, 2) and read.mask.sum() > 40
    assert read.video[0, 0][read.video[0, 0, ..., 3] == 0].max() == 0
    batch = make_batch(mv_video.open_mv_video(path), ClipShape(2, 4, 48), 0, [0, 1])  # every third frame, two opposite views
    assert batch.video.shape == (2, 2, 4, 4, 48, 48) and batch.tracks.max() < 60 and batch.mask.any()


def test_mv_video_takes_any_tracker(video_list):
    """The tracks are those of the tracker that was given, asked for on the first frame of the chosen pictures."""
    from track4d.tracking import Tracks

    seen = {}

    def tracker(video, queries):
        seen.update(video=video.shape, frame=queries[..., 0].max())
        points = np.repeat(queries[:, None, :, 1:], video.shape[1], 1)
        return Tracks(points, np.ones(points.shape[:3], bool), np.ones(points.shape[:3], np.float32))

    read = mv_video.open_mv_video(video_list[0], tracker=tracker)(0, 0, ClipShape(2, 4, 48))
    assert seen == {"video": (2, 4, 48, 48, 4), "frame": 0} and (read.tracks == read.tracks[:, :1]).all()


def test_a_list_that_is_none_is_refused(tmp_path, video_list):
    for text in ("[]", '[{"data_path": ["a.mp4"]}]', "{", '{"a": 1}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(InputError) as error:
            mv_video.open_mv_video(tmp_path / "bad.json")
        assert error.value.code in ("bad_video_list", "no_clips_listed")
    (tmp_path / "dog" / "1.mp4").write_bytes(b"no video")
    with pytest.raises(InputError) as error:
        mv_video.open_mv_video(video_list[0])(0, 0, ClipShape(4, 12, 96))
    assert error.value.code == "unreadable_video" and "1.mp4" in error.value.message


# Captions and credits


def test_captions_from_names():
    assert asset_clips.caption_from_names("fox", "Run") == "the fox is running"
    assert asset_clips.caption_from_names("fox", "Walk_Slow2") == "the fox is walking"
    assert asset_clips.caption_from_names("fox", "TailWhip.001") == "the fox: tail whip"
    assert asset_clips.caption_from_names("fox", "001") == "the fox"


def test_credits_are_read_from_tables_and_sections():
    text = "# Credits\n\n| file | front | licence |\n|---|---|---|\n| a.glb | +X | CC0 1.0 |\n| `b.glb` | -Y | CC BY 4.0 |\n" \
           "\n## b.glb\n\n- author: A. Person\n- source: somewhere\n\n## c.glb\n\n- author: B. Other\n"
    assert asset_clips.read_credits(text, "a.glb") == {"front": "+X", "licence": "CC0 1.0"}
    assert asset_clips.read_credits(text, "b.glb") == {
        "front": "-Y", "licence": "CC BY 4.0", "author": "A. Person", "source": "somewhere"}
    assert asset_clips.read_credits(text, "d.glb") == {}


def test_a_loop_that_leaves_its_place_stays_on_the_spot():
    rest = make_object(np.random.default_rng(0)).vertices
    walk = rest + np.linspace(0, 1, 8)[:, None, None] * np.array([2.0, -1.0, 0.5])
    held = asset_clips.on_the_spot(walk.astype(np.float32))
    assert np.abs(held[..., :2] - rest[:, :2]).max() < 1e-5 and np.allclose(held[-1, :, 2], rest[:, 2] + 0.5, atol=1e-5)
    sway = rest + 0.1 * np.sin(np.arange(8))[:, None, None].astype(np.float32)
    assert asset_clips.on_the_spot(sway) is sway
