"""Baked light: the rig lights as it says, the bake is what Cycles sees, and a folder becomes an evaluation set."""

import hashlib
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import bpy
import numpy as np
import pytest
from mathutils import Matrix
from track4d_addon import export, lighting, scene_io
from track4d_addon.bake_lighting import Log, bake_folder, write_asset
from track4d_protocol.errors import InputError
from track4d_protocol.splat_files import read_ply

from .conftest import make_grid, make_object

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def registered(empty_scene):
    """The extension switched on in this process."""
    import track4d_addon

    bpy.context.preferences.addons.new().module = "track4d_addon"
    track4d_addon.register()
    yield
    track4d_addon.unregister()


def make_ball(name="Ball", location=(0.0, 0.0, 0.0), radius=1.0):
    bpy.ops.mesh.primitive_uv_sphere_add(segments=16, ring_count=8, radius=radius, location=location)
    obj = bpy.context.object
    obj.name = name
    bpy.context.view_layer.update()
    return obj


def test_a_white_surface_that_faces_a_lamp_is_as_white_as_its_strength():
    grid = make_grid(5, "Card")
    material = bpy.data.materials.new("white")
    if bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    material.node_tree.nodes.clear()
    shader = material.node_tree.nodes.new("ShaderNodeBsdfDiffuse")
    shader.inputs["Color"].default_value = (1, 1, 1, 1)
    output = material.node_tree.nodes.new("ShaderNodeOutputMaterial")
    material.node_tree.links.new(shader.outputs[0], output.inputs[0])
    grid.data.materials.append(material)
    lamp = lighting.Lamp(0, 90, strength=0.6, size=0.1, distance=50)  # straight above, far away
    lighting.add_rig([grid], {"key": lamp})
    lighting.bake([grid], samples=4)
    assert np.allclose(lighting.baked_colors(grid), 0.6, atol=0.02)


@pytest.mark.parametrize("front, axis", [("-Y", (0, -1)), ("+X", (1, 0))])
def test_the_key_light_comes_from_the_fronts_left(front, axis):
    ball = make_ball()
    lighting.add_rig([ball], {"key": lighting.RIG["key"]}, front)
    lamp = bpy.data.objects["Track4D key"]
    place = np.array(lamp.matrix_world)[:3, 3]
    left = axis[0] * place[1] - axis[1] * place[0]
    angle = math.degrees(math.atan2(left, np.dot(axis, place[:2])))
    assert angle == pytest.approx(lighting.RIG["key"].azimuth, abs=0.01)
    shining = -np.array(lamp.matrix_world)[:3, 2]
    assert np.allclose(shining, -place / np.linalg.norm(place), atol=1e-5)
    lighting.bake([ball], samples=4)
    colors = lighting.baked_colors(ball)[:, 0]
    facing = lighting.world_vertices(ball) @ place / np.linalg.norm(place)
    assert colors[facing > 0.7].mean() > 10 * colors[facing < -0.5].mean()


def test_the_scene_is_as_it_was_but_for_the_light():
    ball, other = make_ball(), make_ball("Other", (4, 0, 0))
    other.select_set(True)
    scene = bpy.context.scene
    scene.render.engine, scene.cycles.samples = "BLENDER_WORKBENCH", 7
    collections, lights = len(bpy.data.collections), len(bpy.data.lights)
    lighting.add_rig([ball])
    lighting.add_rig([ball])  # replaces the first
    assert len(bpy.data.lights) == lights + 4
    lighting.bake([ball], samples=1)
    lighting.remove_rig()
    assert (scene.render.engine, scene.cycles.samples, other.select_get()) == ("BLENDER_WORKBENCH", 7, True)
    assert (len(bpy.data.collections), len(bpy.data.lights)) == (collections, lights)
    assert [attribute.name for attribute in ball.data.color_attributes] == [lighting.COLORS]
    lighting.bake([ball], samples=1)  # again into the same attribute
    assert len(ball.data.color_attributes) == 1


def test_splats_lie_on_the_surface_and_face_outwards():
    ball = make_ball()
    ball.data.color_attributes.new(lighting.COLORS, "FLOAT_COLOR", "POINT")
    light = np.tile(np.float32([0.2, 0.5, 2.0, 1.0]), len(ball.data.vertices))
    ball.data.color_attributes[0].data.foreach_set("color", light)
    splats = lighting.to_splats([ball])
    ball.data.calc_loop_triangles()
    assert splats.means.shape[1] == len(ball.data.vertices) + len(ball.data.loop_triangles)
    radius = np.linalg.norm(splats.means[0], axis=1)
    assert 0.93 < radius.min() and radius.max() < 1.001
    w, x, y, z = splats.quats[0].astype(np.float64).T
    thin = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], 1)  # image of +X
    assert (np.abs((thin * splats.means[0]).sum(1) / radius) > 0.97).all()
    assert (splats.scales[:, 0] < 0.5 * splats.scales[:, 1:].min(1)).all()
    assert np.allclose(splats.colors(0, direction=[0, 0, 1])[0], [0.4845, 0.7354, 1.0], atol=1e-3)  # sRGB, clipped
    area = (splats.scales[:, 1] * splats.scales[:, 2]).sum() * 2 * math.pi
    assert 0.5 < area / (4 * math.pi) < 2.5  # together they cover the ball


@pytest.mark.parametrize("broken", ["nothing", "flat", "mode", "shared"])
def test_what_cannot_be_lit_is_named(broken):
    ball = make_ball()
    objects, code = [ball], ""
    if broken == "nothing":
        objects, code = [], "no_mesh_selected"
    elif broken == "flat":
        objects, code = [make_object("Dot", [(0, 0, 0)] * 3, [(0, 1, 2)])], "degenerate_mesh"
    elif broken == "mode":
        bpy.ops.object.mode_set(mode="EDIT")
        code = "in_edit_mode"
    else:
        bpy.context.scene.collection.objects.link(bpy.data.objects.new("Twin", ball.data))
        code = "shared_mesh"
    with pytest.raises(InputError) as caught:
        if broken == "flat":
            lighting.add_rig(objects)
        lighting.bake(objects, samples=1)
    assert caught.value.code == code and caught.value.action


def test_a_folder_becomes_a_set_and_a_second_run_keeps_it(tmp_path):
    models, out = tmp_path / "models", tmp_path / "set"
    models.mkdir()
    (models / "sunflower.glb").write_bytes((EXAMPLES / "sunflower.glb").read_bytes())
    (models / "broken.glb").write_bytes(b"not a model")
    (models / "assets.json").write_text(json.dumps({"sunflower.glb": {"prompt": "the flower is swaying", "licence": "CC0-1.0"}}))
    command = [sys.executable, "-m", "track4d_addon.bake_lighting", str(models), f"--out={out}", "--samples=1", "--key=0.9"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == {"done": {"baked": 1, "kept": 0, "failed": 1}}
    manifest = json.loads((out / "sunflower" / "asset.json").read_text())
    assert manifest["prompt"] == "the flower is swaying" and manifest["licence"] == "CC0-1.0" and manifest["samples"] == 1
    assert manifest["rig"]["key"]["strength"] == 0.9 and set(manifest["sha256"]) == {"source", "mesh.glb", "gaussians.ply"}
    splats = read_ply(out / "sunflower" / "gaussians.ply")
    assert splats.means.shape[1] == manifest["gaussians"] > manifest["vertices"]
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=str(out / "sunflower" / "mesh.glb"))
    assert any(len(mesh.color_attributes) for mesh in bpy.data.meshes)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {(line["file"], line["outcome"]) for line in lines} == {("broken.glb", "failed"), ("sunflower.glb", "baked")}
    assert next(line for line in lines if line["outcome"] == "failed")["error"]["code"] == "unreadable_file"
    before = (out / "sunflower" / "asset.json").stat().st_mtime_ns
    assert bake_folder(models, out, 1, {"key": 0.9}) == {"baked": 0, "kept": 1, "failed": 1}
    assert (out / "sunflower" / "asset.json").stat().st_mtime_ns == before
    (out / "sunflower" / "gaussians.ply").write_bytes(b"")  # damaged: made anew
    (models / "broken.glb").unlink()
    assert bake_folder(models, out, 1, {"key": 0.9})["baked"] == 1


def test_a_model_that_fails_is_tried_once(tmp_path, monkeypatch):
    """Whatever a file sets off ends that file alone; later runs go past it until it, its settings or the user's mind change."""
    out, tried = tmp_path / "set", []
    for name in ("bad.obj", "good.obj"):
        (tmp_path / name).write_text("v 0 0 0\nv 1 0 0\nv 0 1 1\nf 1 2 3\n")

    def load(path):
        tried.append(path.name)
        if path.name == "bad.obj":
            raise ZeroDivisionError("an odd file")
        return original(path)

    original = scene_io.load
    monkeypatch.setattr(scene_io, "load", load)
    assert bake_folder(tmp_path, out, 1) == {"baked": 1, "kept": 0, "failed": 1}
    line = next(line for line in Log(out).lines() if line["file"] == "bad.obj")
    assert line["error"]["code"] == "bake_failed" and "an odd file" in line["error"]["message"] and "load" in line["trace"]
    assert bake_folder(tmp_path, out, 1) == {"baked": 0, "kept": 1, "failed": 1} and tried == ["bad.obj", "good.obj"]
    assert Log(out).lines()[-2]["skipped"] and Log(out).lines()[-2]["error"] == line["error"]
    bake_folder(tmp_path, out, 1, retry=True)
    (tmp_path / "bad.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 2\nf 1 2 3\n")
    bake_folder(tmp_path, out, 1)
    bake_folder(tmp_path, out, 1)
    assert tried == ["bad.obj", "good.obj", "bad.obj", "bad.obj"]


def test_a_file_that_takes_blender_down_is_skipped(tmp_path, monkeypatch, capfd):
    """A real crash of the process in the middle of a batch: another one goes on, and no later run dies at the same file."""
    from track4d_addon import bake_lighting

    out, fake = tmp_path / "set", tmp_path / "python"
    for name in ("a.obj", "deadly.obj", "z.obj"):
        (tmp_path / name).write_text("v 0 0 0\nv 1 0 0\nv 0 1 1\nf 1 2 3\n")
    code = (
        "import faulthandler, runpy, sys; from track4d_addon import scene_io; load = scene_io.load; faulthandler.enable(); "
        "scene_io.load = lambda path: faulthandler._sigsegv() if path.name == 'deadly.obj' else load(path); "
        "sys.argv = sys.argv[2:]; runpy.run_module('track4d_addon.bake_lighting', run_name='__main__', alter_sys=True)"
    )
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(bake_lighting.sys, "executable", str(fake))
    for made in ({"baked": 2, "kept": 0, "failed": 1}, {"baked": 0, "kept": 2, "failed": 1}):
        assert bake_lighting.main([str(tmp_path), f"--out={out}", "--samples=1"]) == 0
        assert json.loads(capfd.readouterr().out.splitlines()[-1]) == {"done": made}
    lines = [line for line in Log(out).lines() if line["file"] == "deadly.obj"]
    assert [line.get("skipped", False) for line in lines] == [False, True, True]
    assert lines[0]["error"]["code"] == "blender_ended" and "deadly.obj" in lines[0]["error"]["message"]
    assert "scene_io" in lines[0]["error"]["message"] or "File" in lines[0]["error"]["message"], "the end of what was said"
    assert not list(out.glob(".working*"))


def test_edited_lights_are_baked_as_they_are_and_said_in_the_manifest(tmp_path, registered):
    ball = make_ball()
    ball.select_set(True)
    bpy.context.view_layer.objects.active = ball
    lights = bpy.context.scene.track4d.lights
    lights.samples = 4
    bpy.ops.track4d.add_lights()
    for name in ("fill", "back", "background"):
        bpy.data.objects.remove(bpy.data.objects[f"Track4D {name}"])
    key = bpy.data.objects["Track4D key"]
    key.matrix_world = Matrix.Translation((0, 0, 5))  # an area light shines along its -Z
    key.data.energy, key.data.color, key.data.size = 900.0, (0.25, 0.5, 1.0), 2.0
    bpy.ops.track4d.bake_lights()
    assert bpy.data.objects["Track4D key"] == key and key.location.z == 5, "the user's light stays"
    colors, up = lighting.baked_colors(ball), lighting.world_vertices(ball)[:, 2]
    top = colors[up > 0.9].mean(0)
    np.testing.assert_allclose(top / top[2], (0.25, 0.5, 1.0), atol=0.02)
    assert colors[up < -0.3].max() < 0.05 * top.max()
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "ball.blend"))
    bpy.ops.track4d.remove_lights()  # what is there when the asset is written doesn't count
    bpy.ops.track4d.write_lit(directory=str(tmp_path))
    manifest = json.loads((tmp_path / "Ball" / "asset.json").read_text())
    (light,) = manifest["lights"]
    assert light == {"name": "Track4D key", "type": "AREA", "energy": 900.0, "color": [0.25, 0.5, 1.0],
                     "position": [0.0, 0.0, 5.0], "direction": [0.0, 0.0, -1.0], "size": [2.0, 2.0]}  # fmt: skip
    assert manifest["samples"] == 4 and manifest["source"] == "ball.blend"
    assert manifest["sha256"]["source"] == hashlib.sha256((tmp_path / "ball.blend").read_bytes()).hexdigest()


def test_the_written_mesh_shows_its_light_and_the_users_own_keeps_its_materials(tmp_path):
    ball, bare = make_ball(), make_ball("Bare", (3, 0, 0))
    red = bpy.data.materials.new("red")
    ball.data.materials.append(red)
    ball.data.materials.append(None)
    for obj in (ball, bare):
        obj.data.color_attributes.new(lighting.COLORS, "FLOAT_COLOR", "POINT")
        obj.data.color_attributes[0].data.foreach_set("color", [0.25, 0.5, 1.5, 1.0] * len(obj.data.vertices))
    write_asset([ball, bare], tmp_path / "Ball", {"name": "Ball"})
    assert [slot.material for slot in ball.material_slots] == [red, None] and not bare.material_slots
    assert list(bpy.data.materials) == [red]
    data = (tmp_path / "Ball" / "mesh.glb").read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree, binary = json.loads(data[20 : 20 + length]), data[28 + length :]
    assert [list(material["extensions"]) for material in tree["materials"]] == [["KHR_materials_unlit"]]
    assert "images" not in tree and tree["materials"][0]["pbrMetallicRoughness"].get("baseColorFactor", [1] * 4) == [1] * 4
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            colors = tree["accessors"][primitive["attributes"]["COLOR_0"]]
            assert colors["componentType"] == 5126, "floats"
            start = tree["bufferViews"][colors["bufferView"]]["byteOffset"]
            assert struct.unpack_from("<3f", binary, start) == (0.25, 0.5, 1.5)


def test_lights_that_nobody_edited_follow_the_selection(registered):
    first, second = make_ball(), make_ball("Second", (50, 0, 0), 3.0)
    settings = bpy.context.scene.track4d
    settings.lights.samples, settings.lights.keep_rig = 1, True
    for ball in (first, second):
        for other in (first, second):
            other.select_set(other == ball)
        bpy.ops.track4d.bake_lights()
    places = [light["position"] for light in lighting.baked_with([second])["lights"]]
    assert len(places) == 4 and np.linalg.norm(np.subtract(places, (50, 0, 0)), axis=1) == pytest.approx([12] * 4, rel=0.01)
    for ball in (first, second):
        ball.select_set(True)
    with pytest.raises(InputError) as caught:
        lighting.baked_with([first, second])
    assert caught.value.code == "not_baked" and "different lights" in caught.value.message


def test_what_blender_can_not_bake_is_said_in_its_words(registered):
    """And engine, samples and selection are the user's again."""
    from track4d_addon import jobs

    ball, scene = make_ball(), bpy.context.scene
    ball.hide_render = True
    scene.render.engine, scene.cycles.samples = "BLENDER_WORKBENCH", 77
    assert bpy.ops.track4d.bake_lights() == {"CANCELLED"}
    problem = jobs.state.problem
    assert problem.code == "bake_failed" and "'Ball'" in problem.message and "not enabled for rendering" in problem.message
    assert (scene.render.engine, scene.cycles.samples, ball.select_get()) == ("BLENDER_WORKBENCH", 77, True)
    ball.hide_render = False
    assert bpy.ops.track4d.bake_lights() == {"FINISHED"}


def test_baked_light_leaves_with_usd(tmp_path):
    """As floats, above 1 too, while the mesh moves."""
    ball = make_ball()
    lighting.add_rig([ball])
    lighting.bake([ball], samples=2)
    ball.shape_key_add(name="Basis")
    moved = ball.shape_key_add(name="moved")
    moved.points[0].co.z += 1
    for frame in (1, 3):
        moved.value = float(frame == 3)
        moved.keyframe_insert("value", frame=frame)
    bpy.context.scene.frame_end = 3
    baked = lighting.baked_colors(ball)
    assert baked.max() > 1
    (path,) = export.export([ball], tmp_path / "ball.usdc")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.wm.usd_import(filepath=str(path))
    (mesh,) = bpy.data.meshes
    colors = np.empty(4 * len(baked), np.float32)
    mesh.color_attributes["Track4D_light"].data.foreach_get("color", colors)
    np.testing.assert_array_equal(colors.reshape(-1, 4)[:, :3], baked)


def test_folders_that_are_of_no_use(tmp_path):
    for folder, code in ((tmp_path / "absent", "missing_folder"), (tmp_path, "no_models")):
        with pytest.raises(InputError) as caught:
            bake_folder(folder, tmp_path / "out")
        assert caught.value.code == code
    (tmp_path / "a.ply").write_bytes(b"")
    (tmp_path / "assets.json").write_text("[1, 2]")
    with pytest.raises(InputError) as caught:
        bake_folder(tmp_path, tmp_path / "out")
    assert caught.value.code == "bad_manifest" and not (tmp_path / "out").exists()
