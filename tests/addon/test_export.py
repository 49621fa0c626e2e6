"""Every vertex of every frame comes back from every file."""

import bpy
import numpy as np
import pytest
from scipy.spatial import cKDTree
from track4d_addon import apply, capture, export, files, scene_io
from track4d_protocol.errors import InputError

FRAMES = 6


def imported(path):
    """The mesh objects of a file, read into an empty scene by Blender's own importers with their defaults."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.context.scene.render.fps = 24
    reader = {
        ".glb": lambda: bpy.ops.import_scene.gltf(filepath=str(path)),
        ".gltf": lambda: bpy.ops.import_scene.gltf(filepath=str(path)),
        ".fbx": lambda: bpy.ops.import_scene.fbx(filepath=str(path)),
        ".usdc": lambda: bpy.ops.wm.usd_import(filepath=str(path)),
        ".usd": lambda: bpy.ops.wm.usd_import(filepath=str(path)),
        ".abc": lambda: bpy.ops.wm.alembic_import(filepath=str(path)),
        ".blend": lambda: bpy.ops.wm.open_mainfile(filepath=str(path)),
    }
    reader[path.suffix]()
    return [obj for obj in bpy.context.view_layer.objects if obj.type == "MESH"]


# The scene's frame in which the importer shows the first frame of the result: glTF clips start at 0 s, the FBX importer
# moves everything by its option anim_offset (1), the others keep the scene's frames.
FIRST = {".glb": 0, ".gltf": 0, ".fbx": 2, ".usdc": 1, ".usd": 1, ".abc": 1, ".blend": 1}


@pytest.mark.parametrize("suffix", FIRST)
def test_every_vertex_of_every_frame_comes_back(kit, load, tmp_path, suffix) -> None:
    shark = load("shark.glb")
    shark[0].location, shark[0].rotation_euler.z = (3, 2, 1), 0.5
    bpy.ops.mesh.primitive_cube_add()  # is not exported, but in the .blend
    bystander = bpy.context.object.name
    seen = capture.snapshot(shark)
    result = kit.wave(seen.vertices, FRAMES, "the shark swims")
    apply.shape_keys(seen, result)
    bpy.context.scene.frame_set(4)
    before = kit.everything()
    path = export.export(shark, tmp_path / f"shark{suffix}")
    assert kit.everything() == before
    assert path.is_file() and not list(tmp_path.glob(".track4d*"))

    names, meshes = {obj.name for obj in shark}, {obj.data.name for obj in shark}
    objects = imported(path)
    assert (bystander in {obj.name for obj in objects}) == (suffix == ".blend")
    if suffix in (".usd", ".usdc"):  # their importer names an object after its mesh
        names = meshes
    if suffix in (".usd", ".usdc", ".abc"):  # their names may not hold every character
        names = {name.replace(" ", "_").replace(".", "_") for name in names}
    assert names <= {obj.name for obj in objects}
    objects = [obj for obj in objects if obj.name != bystander]
    assert len(objects) == 2 and all(obj.data.uv_layers and obj.data.materials for obj in objects if suffix != ".abc")
    size = np.ptp(seen.vertices, axis=0).max()
    shown = np.stack([kit.world_positions(objects, FIRST[suffix] + f) for f in range(FRAMES)])
    expected = kit.to_world(seen, result.arrays["vertices"])
    # vertices may be split or joined at UV seams: compare whole trajectories
    flat = [np.transpose(x, (1, 0, 2)).reshape(x.shape[1], -1) for x in (expected, shown)]
    for points, others in (flat, flat[::-1]):
        assert cKDTree(others).query(points)[0].max() < 1e-5 * size * FRAMES
    if suffix in (".usdc", ".abc", ".blend"):
        assert shown.shape == expected.shape


def test_gltf_has_one_clip_with_the_prompts_name(kit, load, tmp_path) -> None:
    shark = load("shark.glb")
    seen = capture.snapshot(shark)
    apply.shape_keys(seen, kit.wave(seen.vertices, FRAMES, "the shark swims"))
    objects = imported(export.export(shark, tmp_path / "shark.glb"))
    actions = {
        strip.action.name for obj in objects for track in obj.data.shape_keys.animation_data.nla_tracks for strip in track.strips
    }
    tracks = {track.name for obj in objects for track in obj.data.shape_keys.animation_data.nla_tracks}
    assert tracks == {"Track4D: the shark swims"} and len(actions) <= 2
    assert all(len(obj.data.shape_keys.key_blocks) == FRAMES + 1 for obj in objects)


def test_gltf_keeps_the_users_morphs_and_parents(kit, tmp_path) -> None:
    cone, parent = kit.make_cone(), bpy.data.objects.new("Parent", None)
    bpy.context.scene.collection.objects.link(parent)
    cone.parent, parent.location.x = parent, 5
    cone.shape_key_add(name="Basis")
    cone.shape_key_add(name="Smile").points[0].co.x += 1
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices, FRAMES)
    apply.shape_keys(seen, result)
    (again,) = imported(export.export([cone], tmp_path / "cone.glb"))
    assert again.parent.name == "Parent" and "Smile" in again.data.shape_keys.key_blocks
    shown = kit.world_positions([again], 3)
    assert cKDTree(shown).query(kit.to_world(seen, result.arrays["vertices"][3]))[0].max() < 1e-5


def test_textures_go_along(kit, load, tmp_path) -> None:
    for suffix in (".gltf", ".usdc", ".fbx"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        (again,) = imported(export.export(load("fox.glb"), folder / f"fox{suffix}"))
        node = next(n for n in again.data.materials[0].node_tree.nodes if n.type == "TEX_IMAGE")
        assert tuple(node.image.size) == (1024, 1024)


@pytest.mark.parametrize(
    ("name", "code"),
    [("fox.stl", "unsupported_format"), ("fox", "unsupported_format"), ("no/such/fox.glb", "missing_folder")],
)
def test_paths_that_can_not_be_written(kit, tmp_path, name, code) -> None:
    with pytest.raises(InputError) as caught:
        export.export([kit.make_cone()], tmp_path / name)
    assert caught.value.code == code and caught.value.action and list(tmp_path.iterdir()) == []


def test_every_format_that_is_promised_is_there() -> None:
    assert set(export.FORMATS) == set(files.WRITABLE) and set(scene_io.FORMATS) == set(files.READABLE)


def test_hidden_objects_are_not_left_out_silently(kit, tmp_path) -> None:
    cone = kit.make_cone()
    cone.hide_set(True)
    with pytest.raises(InputError) as caught:
        export.export([cone], tmp_path / "a.glb")
    assert caught.value.code == "hidden_object" and "'Cone'" in caught.value.message and list(tmp_path.iterdir()) == []


def test_an_export_that_fails_keeps_the_old_file(kit, tmp_path, monkeypatch) -> None:
    path = tmp_path / "cone.glb"
    path.write_bytes(b"precious")

    def fail(place, frames):
        open(place, "wb").write(b"half")  # noqa: SIM115
        raise RuntimeError("the disk is full")

    monkeypatch.setitem(export.FORMATS, ".glb", fail)
    with pytest.raises(InputError) as caught:
        export.export([kit.make_cone()], path)
    assert caught.value.code == "export_failed" and "the disk is full" in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["cone.glb"] and path.read_bytes() == b"precious"
