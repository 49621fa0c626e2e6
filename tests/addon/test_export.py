"""Every vertex of every frame comes back from every file."""

import json
import struct

import bpy
import numpy as np
import pytest
from mathutils import Euler, Matrix
from scipy.spatial import cKDTree
from track4d_addon import apply, capture, export, files, scene_io
from track4d_addon.apply.gaussian_cloud import gaussian_cloud, placed, read_cloud
from track4d_protocol.errors import InputError
from track4d_protocol.splat_files import read_ply, read_t4d
from track4d_protocol.splats import Splats

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


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference of a coordinate of a vertex at a frame; [F, N, 3] and [F, M, 3].

    Vertices may be split or joined at UV seams, so each whole path is compared with the nearest one, both ways.
    """
    flat = [np.transpose(x, (1, 0, 2)).reshape(x.shape[1], -1) for x in (first, second)]
    return max(np.abs(others[cKDTree(others).query(points)[1]] - points).max() for points, others in (flat, flat[::-1]))


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
    (path,) = export.export(shark, tmp_path / f"shark{suffix}")
    assert kit.everything() == before
    assert path == tmp_path / f"shark{suffix}" and path.is_file() and not list(tmp_path.glob(".track4d*"))

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
    assert apart(expected, shown) < 1e-5 * size
    if suffix in (".usdc", ".abc", ".blend"):
        assert shown.shape == expected.shape


@pytest.mark.parametrize("suffix", [".mdd", ".pc2"])
def test_point_caches_move_the_mesh_in_its_own_space(kit, tmp_path, suffix) -> None:
    cones = [kit.make_cone("One"), kit.make_cone("Two", sides=7)]
    cones[1].location, cones[1].rotation_euler, cones[1].scale = (3, 0, 1), (0.1, 0.2, 0.3), (-1, 2, 0.5)
    cones[0].modifiers.new("Smooth", "SUBSURF")
    seen = capture.snapshot(cones)
    result = kit.wave(seen.vertices, FRAMES)
    apply.shape_keys(seen, result, frame_start=5)
    bpy.context.scene.frame_set(6)
    before = kit.everything()
    written = export.export(cones, tmp_path / f"cones{suffix}")
    assert kit.everything() == before
    assert [path.name for path in written] == [f"cones_One{suffix}", f"cones_Two{suffix}"]
    (alone,) = export.export(cones[1:], tmp_path / f"two{suffix}")
    assert alone.read_bytes() == written[1].read_bytes()
    apply.remove(cones)
    cones[0].modifiers.clear()
    for cone, path in zip(cones, written):  # Blender's own reader
        modifier = cone.modifiers.new("Cache", "MESH_CACHE")
        modifier.cache_format, modifier.filepath, modifier.frame_start = suffix[1:].upper(), str(path), 5
    size = np.ptp(seen.vertices, axis=0).max()
    for frame, vertices in enumerate(result.arrays["vertices"]):
        assert np.abs(kit.world_positions(cones, 5 + frame) - kit.to_world(seen, vertices)).max() < 1e-5 * size
    if suffix == ".mdd":
        count, vertices, *times = struct.unpack(f">ii{FRAMES}f", alone.read_bytes()[: 8 + 4 * FRAMES])
        assert (count, vertices) == (FRAMES, 8) and np.allclose(times, np.arange(FRAMES) / 24)


def test_obj_sequence(kit, tmp_path) -> None:
    cones = [kit.make_cone("One"), kit.make_cone("Two")]
    cones[1].location.x = 3
    for cone in cones:
        cone.data.uv_layers.new()
        cone.data.materials.append(bpy.data.materials.new(cone.name))
    seen = capture.snapshot(cones)
    result = kit.wave(seen.vertices, FRAMES)
    apply.shape_keys(seen, result)
    bpy.context.scene.frame_set(3)
    before = kit.everything()
    written = export.export(cones, tmp_path / "cones.obj")
    assert kit.everything() == before
    assert [path.name for path in written] == [f"cones_{frame:04d}.obj" for frame in range(1, FRAMES + 1)]
    size = np.ptp(seen.vertices, axis=0).max()
    expected = kit.to_world(seen, result.arrays["vertices"])
    for frame, path in enumerate(written):
        bpy.ops.wm.read_factory_settings(use_empty=True)
        bpy.ops.wm.obj_import(filepath=str(path))
        objects = sorted((obj for obj in bpy.context.view_layer.objects if obj.type == "MESH"), key=lambda obj: obj.name)
        assert [obj.name for obj in objects] == ["One", "Two"]
        assert all(obj.data.uv_layers and obj.data.materials for obj in objects)
        assert np.abs(kit.world_positions(objects) - expected[frame]).max() < 1e-5 * size


def colour_wave(obj) -> None:
    """Geometry nodes that paint the mesh anew at every frame: Col = (frame / 10, x, 0.25)."""
    tree = bpy.data.node_groups.new("Paint", "GeometryNodeTree")
    tree.is_modifier = True
    for way in ("INPUT", "OUTPUT"):
        tree.interface.new_socket("Geometry", in_out=way, socket_type="NodeSocketGeometry")
    add = tree.nodes.new
    begin, end, time = add("NodeGroupInput"), add("NodeGroupOutput"), add("GeometryNodeInputSceneTime")
    place, split, tenth = add("GeometryNodeInputPosition"), add("ShaderNodeSeparateXYZ"), add("ShaderNodeMath")
    color, store = add("FunctionNodeCombineColor"), add("GeometryNodeStoreNamedAttribute")
    tenth.operation, tenth.inputs[1].default_value = "MULTIPLY", 0.1
    store.data_type, store.domain = "FLOAT_COLOR", "POINT"
    store.inputs["Name"].default_value = "Col"
    color.inputs["Blue"].default_value = 0.25
    link = tree.links.new
    link(time.outputs["Frame"], tenth.inputs[0])
    link(place.outputs[0], split.inputs[0])
    link(tenth.outputs[0], color.inputs["Red"])
    link(split.outputs["X"], color.inputs["Green"])
    link(color.outputs[0], store.inputs["Value"])
    link(begin.outputs[0], store.inputs["Geometry"])
    link(store.outputs[0], end.inputs[0])
    obj.modifiers.new("Paint", "NODES").node_group = tree


def test_usd_holds_colours_that_change(kit, tmp_path) -> None:
    cone = kit.make_cone()
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices, FRAMES)
    apply.shape_keys(seen, result)
    colour_wave(cone)
    (again,) = imported(*export.export([cone], tmp_path / "cone.usdc"))
    for frame in range(1, FRAMES + 1):
        bpy.context.scene.frame_set(frame)
        mesh = again.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
        colors = np.empty(4 * len(mesh.attributes["Col"].data), np.float32)
        mesh.attributes["Col"].data.foreach_get("color", colors)
        x = result.arrays["vertices"][frame - 1][:, 0]
        wanted = np.stack([np.full_like(x, frame / 10), x, np.full_like(x, 0.25)], 1)
        np.testing.assert_allclose(colors.reshape(-1, 4)[:, :3], wanted, atol=1e-5)


def test_gltf_has_morph_normals_only_when_asked(kit, tmp_path) -> None:
    grid = kit.make_grid(40)
    seen = capture.snapshot([grid])
    apply.shape_keys(seen, kit.wave(seen.vertices, FRAMES))
    sizes = {}
    for asked in (False, True):
        (path,) = export.export([grid], tmp_path / f"{asked}.glb", morph_normals=asked)
        document, _ = read_glb(path)
        targets = {name for mesh in document["meshes"] for name in mesh["primitives"][0]["targets"][0]}
        assert targets == ({"POSITION", "NORMAL"} if asked else {"POSITION"})
        sizes[asked] = path.stat().st_size
    assert sizes[True] > 1.5 * sizes[False]


def read_glb(path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def gaussians(count: int = 40, frames: int = 4, degree: int = 1, terms: int = 2) -> Splats:
    rng = np.random.default_rng(0)
    quats = rng.normal(size=(frames, count, 4))
    quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
    means, sh = rng.normal(size=(frames, count, 3)), rng.normal(0, 0.3, (count, (degree + 1) ** 2, terms, 3))
    arrays = (means, quats, rng.uniform(0.01, 0.1, (count, 3)), rng.uniform(0.2, 1, count), sh)
    return Splats(*(array.astype(np.float32) for array in arrays))


def same_gaussians(one: Splats, other: Splats, frame: int | None = None, tolerance: float = 1e-5) -> None:
    frames = range(one.frames) if frame is None else [frame]
    for k, f in enumerate(frames):
        assert np.abs(one.means[k] - other.means[f]).max() < tolerance
        assert np.abs(np.abs((one.quats[k] * other.quats[f]).sum(-1)) - 1).max() < tolerance
        assert np.abs(one.sh_at(k) - other.sh_at(f)).max() < tolerance if frame is None else True
    np.testing.assert_allclose(one.scales, other.scales, rtol=1e-4)
    np.testing.assert_allclose(one.opacities, other.opacities, atol=1e-4)


@pytest.mark.parametrize("degree", [0, 1])
def test_a_cloud_is_read_back_from_the_scene(kit, degree) -> None:
    splats = gaussians(degree=degree)
    matrix = Matrix.Translation((1, 2, 3)) @ Euler((0.3, 0.4, 0.5)).to_matrix().to_4x4() @ Matrix.Scale(2.5, 4)
    cloud = gaussian_cloud(splats, "cloud", matrix=matrix)
    bpy.context.view_layer.update()
    back, turn = read_cloud(cloud), np.array(matrix)
    same_gaussians(back, placed(splats, turn))
    np.testing.assert_allclose(back.means, splats.means @ turn[:3, :3].T + turn[:3, 3], atol=1e-5)
    np.testing.assert_allclose(back.scales, 2.5 * splats.scales, rtol=1e-5)
    eye = np.array([4.0, -3.0, 2.0])
    seen = back.colors(2, viewer=turn[:3, :3] @ eye + turn[:3, 3])
    np.testing.assert_allclose(seen, splats.colors(2, viewer=eye), atol=1e-5)
    cloud.scale.x *= 2
    bpy.context.view_layer.update()
    with pytest.raises(InputError) as caught:
        read_cloud(cloud)
    assert caught.value.code == "sheared_cloud"


def test_gaussians_as_files(kit, tmp_path) -> None:
    cone = kit.make_cone()
    splats = gaussians()
    cloud = gaussian_cloud(splats, "cloud", frame_start=7)
    cloud.parent = cone
    bpy.context.view_layer.update()
    before = kit.everything()
    written = export.export([cone], tmp_path / "cone.ply")
    assert [path.name for path in written] == [f"cone_{frame:04d}.ply" for frame in range(7, 11)]
    for frame, path in enumerate(written):
        back = read_ply(path)
        same_gaussians(back, splats, frame)
        np.testing.assert_allclose(back.sh_at(0), splats.sh_at(frame), atol=1e-5)
    bpy.ops.wm.ply_import(filepath=str(written[2]))  # as other readers of PLY see it
    read = bpy.context.object
    assert np.allclose([vertex.co for vertex in read.data.vertices], splats.means[2], atol=1e-5)
    assert {"f_dc_0", "f_rest_8", "opacity", "scale_2", "rot_3"} <= set(read.data.attributes.keys())
    mesh = read.data
    bpy.data.objects.remove(read)
    bpy.data.meshes.remove(mesh)

    (archive,) = export.export([cloud], tmp_path / "cone.t4d")
    back = read_t4d(archive)
    order = cKDTree(splats.means[0]).query(back.means[0])[1]
    assert sorted(order) == list(range(40)) and back.fps == 24
    assert np.abs(back.means - splats.means[:, order]).max() < 5e-4 * np.linalg.norm(np.ptp(splats.means.reshape(-1, 3), axis=0))

    (gltf,) = export.export([cloud], tmp_path / "cone.splats.glb")
    document, binary = read_glb(gltf)
    assert document["extensionsUsed"] == ["KHR_gaussian_splatting"] and len(document["meshes"]) == 4
    for frame, mesh in enumerate(document["meshes"]):
        accessor = document["accessors"][mesh["primitives"][0]["attributes"]["POSITION"]]
        start = document["bufferViews"][accessor["bufferView"]]["byteOffset"]
        x, y, z = np.frombuffer(binary, "<f4", 120, start).reshape(-1, 3).T
        np.testing.assert_allclose(np.stack([x, -z, y], 1), splats.means[frame], atol=1e-5)
    assert kit.everything() == before
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".glb", ".ply", ".ply", ".ply", ".ply", ".t4d"]


def test_gaussians_that_are_not_there_or_not_one(kit, tmp_path) -> None:
    cone = kit.make_cone()
    for clouds, code in ((0, "no_gaussians"), (2, "several_clouds")):
        for k in range(clouds):
            gaussian_cloud(gaussians(), f"cloud {k}").parent = cone
        with pytest.raises(InputError) as caught:
            export.export([cone], tmp_path / "cone.t4d")
        assert caught.value.code == code and caught.value.action and not list(tmp_path.iterdir())


def test_what_a_format_can_not_hold_is_said(kit, tmp_path) -> None:
    cone = kit.make_cone()
    (cache,) = export.export([cone], tmp_path / "cone.pc2")
    modifier = cone.modifiers.new("Moves", "MESH_CACHE")
    modifier.cache_format, modifier.filepath = "PC2", str(cache)
    for name in ("a.glb", "a.fbx"):
        with pytest.raises(InputError) as caught:
            export.export([cone], tmp_path / name)
        assert caught.value.code == "needs_shape_keys" and "'Moves'" in caught.value.message
    grown = kit.make_cone("Grown")
    grown.modifiers.new("Build", "BUILD").frame_start = 1
    bpy.context.scene.frame_end = 3
    bpy.context.scene.frame_set(200)  # whole by now
    with pytest.raises(InputError) as caught:
        export.export([grown], tmp_path / "b.pc2")
    assert caught.value.code == "vertices_change" and "'Grown'" in caught.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["cone.pc2"]


def test_gltf_has_one_clip_with_the_prompts_name(kit, load, tmp_path) -> None:
    shark = load("shark.glb")
    seen = capture.snapshot(shark)
    apply.shape_keys(seen, kit.wave(seen.vertices, FRAMES, "the shark swims"))
    objects = imported(*export.export(shark, tmp_path / "shark.glb"))
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
    (again,) = imported(*export.export([cone], tmp_path / "cone.glb"))
    assert again.parent.name == "Parent" and "Smile" in again.data.shape_keys.key_blocks
    shown = kit.world_positions([again], 3)
    assert cKDTree(shown).query(kit.to_world(seen, result.arrays["vertices"][3]))[0].max() < 1e-5


def test_textures_go_along(kit, load, tmp_path) -> None:
    for suffix in (".gltf", ".usdc", ".fbx"):
        folder = tmp_path / suffix[1:]
        folder.mkdir()
        (again,) = imported(*export.export(load("fox.glb"), folder / f"fox{suffix}"))
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
    assert {*export.FORMATS, *files.SPLATS} == set(files.WRITABLE) and set(scene_io.FORMATS) == set(files.READABLE)


def test_hidden_objects_are_not_left_out_silently(kit, tmp_path) -> None:
    cone = kit.make_cone()
    cone.hide_set(True)
    with pytest.raises(InputError) as caught:
        export.export([cone], tmp_path / "a.glb")
    assert caught.value.code == "hidden_object" and "'Cone'" in caught.value.message and list(tmp_path.iterdir()) == []


def test_an_export_that_fails_keeps_the_old_file(kit, tmp_path, monkeypatch) -> None:
    path = tmp_path / "cone.glb"
    path.write_bytes(b"precious")

    def fail(task):
        task.path.write_bytes(b"half")
        raise RuntimeError("the disk is full")

    monkeypatch.setitem(export.FORMATS, ".glb", fail)
    with pytest.raises(InputError) as caught:
        export.export([kit.make_cone()], path)
    assert caught.value.code == "export_failed" and "the disk is full" in caught.value.message
    assert [p.name for p in tmp_path.iterdir()] == ["cone.glb"] and path.read_bytes() == b"precious"


def test_only_the_shown_take_is_written(kit, tmp_path) -> None:
    """A .glb has one clip, that of the result which the object shows."""
    cone = kit.make_cone()
    seen = capture.snapshot([cone])
    results = {f"take {n}": kit.wave(seen.vertices, 5 + n, f"way {n}") for n in range(3)}
    for take, result in results.items():
        apply.shape_keys(seen, result, take=take)
    apply.show([cone], "take 1")
    path = tmp_path / "cone.glb"
    export.export([cone], path)
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=str(path))
    (found,) = [obj for obj in bpy.data.objects if obj.type == "MESH"]
    (action,) = bpy.data.actions
    assert action.name.removesuffix("_Cone") == "Track4D: way 1"  # importers before 4.4 add the object's name
    assert len(found.data.shape_keys.key_blocks) == 7


@pytest.fixture
def operator():
    from track4d_addon.operators import exporting

    exporting.register()
    yield exporting
    exporting.unregister()


def test_operator_writes_what_is_selected(kit, tmp_path, operator) -> None:
    cone, other = kit.make_cone(), kit.make_cone("Other")
    seen = capture.snapshot([cone])
    apply.apply(seen, kit.wave(seen.vertices, FRAMES))
    cone.select_set(True)
    other.select_set(False)
    assert bpy.ops.track4d.export(filepath=str(tmp_path / "cone.obj")) == {"FINISHED"}
    assert len(list(tmp_path.glob("cone_*.obj"))) == FRAMES
    assert bpy.ops.track4d.export(filepath=str(tmp_path / "cone.glb"), morph_normals=True) == {"FINISHED"}
    assert "NORMAL" in read_glb(tmp_path / "cone.glb")[0]["meshes"][0]["primitives"][0]["targets"][0]
    assert [obj.name for obj in imported(tmp_path / "cone.glb")] == ["Cone"]


@pytest.mark.parametrize(
    ("name", "form", "wanted"),
    [
        ("fox.glb", ".splats.glb", "fox.splats.glb"),
        ("fox.splats.glb", ".glb", "fox.glb"),
        ("fox.glb", ".glb", "fox.glb"),
        ("fox", ".t4d", "fox.t4d"),
        ("fox.v2", ".mdd", "fox.v2.mdd"),
    ],
)
def test_the_name_ends_as_the_format_says(tmp_path, operator, name, form, wanted) -> None:
    """What the file browser asks after each change."""
    from types import SimpleNamespace

    asked = SimpleNamespace(filepath=str(tmp_path / name), form=form)
    changed = operator.TRACK4D_OT_export.check(asked, None)
    assert asked.filepath == str(tmp_path / wanted) and changed == (name != wanted)
