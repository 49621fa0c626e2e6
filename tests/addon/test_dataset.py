"""Animated files become training clips: every clip for itself, every file for itself."""

import json
import sys
from pathlib import Path

import bpy
import numpy as np
import pytest
from track4d.cli import app
from track4d.training import asset_clips, shards
from track4d.training.asset_clips import RenderSettings, render_folder
from track4d.training.video_data import ClipShape, load_batches
from track4d_addon import actions, trajectories
from track4d_protocol.errors import Cancelled, InputError
from typer.testing import CliRunner

SETTINGS = RenderSettings(views=2, frames=4, size=32, renders=2, cameras="orbit")


def add_puppet() -> bpy.types.Object:
    """A column on two bones with two clips: "Wave" turns the upper bone and back, "Fall" turns the lower one for good."""
    bpy.ops.mesh.primitive_cylinder_add(vertices=8, radius=0.2, depth=2)
    column = bpy.context.object
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.mesh.subdivide(number_cuts=3)
    bpy.ops.object.mode_set(mode="OBJECT")
    bpy.ops.object.armature_add(location=(0, 0, -1))
    rig = bpy.context.object
    bpy.ops.object.mode_set(mode="EDIT")
    lower = rig.data.edit_bones[0]
    lower.name, lower.tail = "lower", (0, 0, 1)
    upper = rig.data.edit_bones.new("upper")
    upper.head, upper.tail, upper.parent = (0, 0, 1), (0, 0, 2), lower
    bpy.ops.object.mode_set(mode="OBJECT")
    column.select_set(True)
    bpy.context.view_layer.objects.active = rig
    bpy.ops.object.parent_set(type="ARMATURE_AUTO")
    for clip, bone, turns in (("Fall", "lower", (0, 0.6, 1.4)), ("Wave", "upper", (0, 0.8, 0))):
        actions.assign(rig, bpy.data.actions.new(clip))
        rig.pose.bones[bone].rotation_mode = "XYZ"
        for frame, turn in zip((1, 9, 17), turns):
            rig.pose.bones[bone].rotation_euler.x = turn
            rig.pose.bones[bone].keyframe_insert("rotation_euler", frame=frame)
        track = rig.animation_data.nla_tracks.new()
        track.name = clip
        track.strips.new(clip, 1, rig.animation_data.action)
        rig.animation_data.action = None
        rig.pose.bones[bone].rotation_euler.x = 0
    return rig


def save(path: Path) -> Path:
    if path.suffix == ".glb":
        bpy.ops.export_scene.gltf(filepath=str(path), export_animation_mode="NLA_TRACKS", export_optimize_animation_size=True)
    elif path.suffix == ".fbx":
        bpy.ops.export_scene.fbx(filepath=str(path), bake_anim_use_nla_strips=True, bake_anim_use_all_actions=False)
    else:
        bpy.ops.wm.save_as_mainfile(filepath=str(path))
    return path


@pytest.mark.parametrize("suffix", [".glb", ".fbx", ".blend"])
def test_every_clip_starts_from_its_own_pose(tmp_path, suffix):
    """The wave doesn't lie on the ground although the fall before it ends there."""
    add_puppet()
    arrays, found = trajectories.extract(save(tmp_path / f"puppet{suffix}"), 9, {})
    assert [(clip["name"], clip["loops"]) for clip in found["clips"]] == [("Fall", False), ("Wave", True)]
    fall, wave = arrays["vertices_0"], arrays["vertices_1"]
    assert fall.shape == wave.shape == (9, fall.shape[1], 3) and arrays["faces"].max() < fall.shape[1]
    low = fall[0, :, 2] < fall[0, :, 2].min() + 0.3
    top = fall[0, :, 2] > fall[0, :, 2].max() - 0.1
    np.testing.assert_allclose(wave[0], fall[0], atol=0.02)
    assert np.abs(wave[:, low] - wave[0, low]).max() < 0.05  # only the upper bone moves
    assert fall[-1, top, 2].mean() < fall[0, top, 2].mean() - 1 and wave[4, top, 2].mean() > wave[0, top, 2].mean() - 0.5
    assert np.abs(wave[-1] - wave[0]).max() > 0.05  # a loop's last frame leads to its first, it isn't the first again
    assert found["bones"] == ["lower", "upper"]


def test_a_clip_without_motion_is_left_out(tmp_path):
    rig = add_puppet()
    actions.assign(rig, bpy.data.actions.new("Stand"))
    for frame in (1, 9):
        rig.pose.bones["upper"].keyframe_insert("rotation_euler", frame=frame)
    track = rig.animation_data.nla_tracks.new()
    track.name = "Stand"
    track.strips.new("Stand", 1, rig.animation_data.action)
    rig.animation_data.action = None
    _, found = trajectories.extract(save(tmp_path / "puppet.blend"), 4, {})
    assert [clip["name"] for clip in found["clips"]] == ["Fall", "Wave"]
    (warning,) = found["warnings"]
    assert warning["code"] == "clip_skipped" and "'Stand' of 'puppet.blend'" in warning["message"]


def test_a_mesh_too_large_for_clips_is_refused(kit, tmp_path):
    kit.make_grid(450)  # 202,500 vertices
    with pytest.raises(InputError) as caught:
        trajectories.extract(save(tmp_path / "grid.blend"), 4, {})
    assert caught.value.code == "too_many_vertices" and "202500" in caught.value.message


def test_a_real_asset_moves_as_measured(asset):
    """fox.glb: three clips, each as in the published list, whatever was played before."""
    arrays, found = trajectories.extract(asset("fox.glb"), 8, {"Survey": False})
    assert [clip["name"] for clip in found["clips"]] == ["Run", "Survey", "Walk"]
    assert [clip["loops"] for clip in found["clips"]] == [True, False, True]
    for k in range(3):
        moved = np.linalg.norm(np.ptp(arrays[f"vertices_{k}"], axis=0), axis=1) / np.linalg.norm(
            np.ptp(arrays["vertices_0"][0], axis=0))
        assert 0.02 < moved.mean() < 0.5
    assert arrays["texture_0"].ndim == 3 and arrays["texture_0"].shape[0] > 1 and np.ptp(arrays["uvs"]) > 0.1


@pytest.fixture
def models(tmp_path) -> Path:
    """A folder with two good files, captions and credits for one of them, and two that are none."""
    folder = tmp_path / "models"
    (folder / "more").mkdir(parents=True)
    add_puppet()
    save(folder / "puppet.glb")
    save(folder / "more" / "Stick_Man.glb")
    (folder / "broken.glb").write_bytes(b"glTF but not really")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.mesh.primitive_cube_add()
    bpy.ops.export_scene.gltf(filepath=str(folder / "still.glb"))
    captions = {"puppet.glb": {"noun": "puppet", "clips": {"Wave": {"prompt": "the puppet bows", "verb": "bow", "loops": False}}}}
    (folder / "captions.json").write_text(json.dumps(captions))
    table = "| file | licence | front |\n|---|---|---|\n| puppet.glb | CC0 1.0 | none |\n"
    (folder / "CREDITS.md").write_text(f"{table}\n## puppet.glb\n\n- author: A. Person\n")
    return folder


def test_a_folder_becomes_shards_and_is_gone_on_with(models, tmp_path):
    out = tmp_path / "out"
    steps = []
    made = render_folder(models, out, SETTINGS, lambda stage, step, total, preview=None: steps.append((step, total)))
    assert made == {"files": 2, "clips": 4, "samples": 8, "failed": 2}
    assert steps[0] == (0, 4) and steps[-1] == (4, 4)
    entries = [entry for shard in out.glob("*.tar") for entry in shards.read_index(shard)]
    assert len({entry.key for entry in entries}) == 8
    captions = {entry.info["caption"] for entry in entries}
    assert captions == {"the puppet bows", "the puppet: fall", "the stick man: fall", "the stick man is waving"}
    (credited,) = {entry.info["licence"] for entry in entries if entry.info["model"] == "puppet.glb"}
    assert credited == "CC0 1.0" and next(e for e in entries if e.info["model"] == "puppet.glb").info["author"] == "A. Person"
    assert len({entry.info["rig"] for entry in entries}) == 1  # both files have the same bones
    log = {line["file"]: line for line in map(json.loads, (out / asset_clips.LOG).read_text().splitlines())}
    assert log["broken.glb"]["error"]["code"] == "unreadable_file" and log["still.glb"]["error"]["code"] == "no_clips"
    batch = next(iter(load_batches(shards.open_shards(out, share=0), ClipShape(2, 4, 32), 4, 0, 0, 1, workers=0)))
    assert batch.video.shape == (4, 2, 4, 4, 32, 32) and batch.mask.any(-1).all()

    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert render_folder(models, out, SETTINGS) == made
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.tar")} == before
    with pytest.raises(InputError) as error:
        render_folder(models, out, RenderSettings(views=2, frames=4, size=48))
    assert error.value.code == "dataset_differs" and "size 32 instead of 48" in error.value.message


def test_a_model_that_can_t_be_drawn_is_skipped(models, tmp_path, monkeypatch):
    """What comes out of Blender may still be no object, such as one whose vertices all lie in one point."""

    def collapsed(files, about, frames):
        for path, found in read_models(files, about, frames):
            if path.name == "puppet.glb":
                found["arrays"]["vertices_1"][:] = 0
            yield path, found

    read_models = asset_clips.read_models
    monkeypatch.setattr(asset_clips, "read_models", collapsed)
    made = render_folder(models, tmp_path / "out", SETTINGS)
    assert made == {"files": 1, "clips": 2, "samples": 4, "failed": 3}
    assert all(e.info["model"] != "puppet.glb" for e in shards.read_index(tmp_path / "out" / "shard-00000.tar"))


def test_a_render_that_was_stopped_goes_on(models, tmp_path):
    """What was complete stays, and nothing is there twice."""
    out = tmp_path / "out"

    def stop(stage, step, total, preview=None):
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        render_folder(models, out, SETTINGS, stop)
    assert len(list(out.glob("*.tar"))) == 1 and not list(out.glob("*.new"))
    done = render_folder(models, out, SETTINGS)
    keys = [entry.key for shard in out.glob("*.tar") for entry in shards.read_index(shard)]
    assert done["samples"] == len(keys) == len(set(keys)) == 8


def test_a_file_that_takes_blender_down_is_skipped(models, tmp_path, monkeypatch):
    """The client dies in the middle of the first file: it is reported, and the others are read by a new one."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\ncase \"$3\" in *bad.glb) kill -9 $$;; esac\nexec {sys.executable} \"$@\"\n")
    fake.chmod(0o755)
    monkeypatch.setattr(asset_clips.sys, "executable", str(fake))
    files = [models / "bad.glb", models / "puppet.glb"]
    about = {path: {"clips": {}} for path in files}
    found = list(asset_clips.read_models(files, about, 4))
    assert [path for path, _ in found] == files
    assert found[0][1]["error"]["code"] == "unreadable_file" and "Blender ended" in found[0][1]["error"]["message"]
    assert len(found[1][1]["clips"]) == 2


@pytest.mark.parametrize(("arguments", "code"), [
    (["none", "-o", "out"], "missing_folder"),
    ([".", "-o", "out"], "no_models"),
    ([".", "-o", "out", "--cameras", "fisheye"], "bad_cameras_name"),
    ([".", "-o", "out", "--front", "up"], "bad_front"),
])
def test_the_command_refuses_what_it_can_t_do(tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    ended = CliRunner().invoke(app, ["dataset", "render", *arguments])
    assert isinstance(ended.exception, InputError) and ended.exception.code == code
