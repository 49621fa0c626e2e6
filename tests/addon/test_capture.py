"""What is taken from the user's objects, and that nothing of it shows afterwards."""

import math

import bpy
import numpy as np
import pytest
from mathutils import Euler, Matrix
from track4d_addon import apply, capture, slices
from track4d_addon.capture import colors
from track4d_protocol.errors import Cancelled, InputError
from track4d_protocol.messages import Settings, check_request
from track4d_protocol.space import canonical_similarity

QUICK = {"size": 64, "samples": 2}
FOX = Settings(prompt="the fox is running")


def server_mesh(*arrays):
    """The server's mesh; skips where the server isn't installed, as in the environments of other Blenders."""
    pytest.importorskip("numba", reason="the server isn't installed beside this Blender")
    from track4d.geometry.mesh import Mesh

    return Mesh(*arrays)


def our_pictures(request) -> np.ndarray:
    """The request's views drawn by the server's rasteriser; [V, R, R, 4]."""
    a = request.arrays
    textures = [
        a[f"texture_{k}"].astype(np.float32) / 255 for k in range(sum(name.startswith("texture_") for name in a))
    ]
    mesh = server_mesh(a["vertices"], a["faces"], a["uvs"], a["materials"], textures)
    from track4d.geometry.zbuffer import render

    return render(mesh, mesh.vertices[None], a["viewmats"].astype(np.float32), a["Ks"], a["views"].shape[1])[0]


def assert_pictures_agree(request) -> None:
    """Blender's pictures and the server's show the same mesh in the same place with the same colours."""
    ours, views = our_pictures(request), request.arrays["views"] / 255
    assert np.abs(ours[..., 3] - views[..., 3]).mean() < 0.012
    inside = (ours[..., 3] > 0.99) & (views[..., 3] > 0.99)
    assert inside.mean() > 0.02
    seen, expected = views[..., :3][inside], ours[..., :3][inside]
    light = seen.mean() / expected.mean()
    assert 0.6 < light < 1.2
    assert np.abs(seen.mean(0) - light * expected.mean(0)).max() < 0.06  # the light is neutral
    assert np.abs(seen - light * expected).mean() < 0.1


@pytest.fixture
def fox(load):
    return load("fox.glb")


def test_fox_is_seen_from_four_sides_as_the_server_sees_it(fox) -> None:
    request = capture.capture(fox, FOX, size=128, samples=8)
    check_request(request)
    a = request.arrays
    assert a["vertices"].shape == (1728, 3) and a["faces"].shape == (576, 3) and a["texture_0"].shape == (1024, 1024, 3)
    assert a["views"].shape == (4, 128, 128, 4) and a["views"].dtype == np.uint8 and request.objects == [fox[0].name]
    assert_pictures_agree(request)
    alpha = a["views"][..., 3]
    assert not alpha[:, [0, -1]].any() and not alpha[:, :, [0, -1]].any()  # nothing is cut off
    for view in a["views"]:
        bright = view[view[..., 3] > 250][:, :3].max(-1)
        assert 90 < bright.mean() < 240 and np.quantile(bright, 0.99) < 252  # every side is lit, none is burnt out


def test_only_what_can_be_seen_is_rendered(fox, monkeypatch) -> None:
    """The pictures are those of whole renders, though most of their area gets no rays; displaced surfaces get the whole area."""
    from track4d_addon.capture import pictures

    areas, window = [], pictures._window

    def watched(*values):
        columns, rows = window(*values)
        areas.append((columns[1] - columns[0]) * (rows[1] - rows[0]) / values[-1] ** 2)
        return columns, rows

    monkeypatch.setattr(pictures, "_window", watched)
    cut = capture.capture(fox, FOX, **QUICK).arrays["views"]
    assert max(areas) < 0.7 and min(areas) < 0.3
    monkeypatch.setattr(pictures, "_window", lambda *values: ((0, values[-1]), (0, values[-1])))
    np.testing.assert_array_equal(cut, capture.capture(fox, FOX, **QUICK).arrays["views"])

    areas.clear()
    monkeypatch.setattr(pictures, "_window", watched)
    fox[0].data.materials[0].displacement_method = "BOTH"
    capture.capture(fox, FOX, **QUICK)
    assert areas == [1.0] * 4


def test_first_view_looks_at_the_face(fox) -> None:
    request = capture.capture(fox, FOX, **QUICK)
    vertices, viewmats = request.arrays["vertices"], request.arrays["viewmats"]
    nose, tail = vertices[vertices[:, 1].argmin()], vertices[vertices[:, 1].argmax()]
    depths = [[(M[:3, :3] @ p + M[:3, 3])[2] for p in (nose, tail)] for M in viewmats]
    assert depths[0][0] < depths[0][1] and depths[2][0] > depths[2][1]
    left, right = ((M[:3, :3] @ nose + M[:3, 3])[0] for M in viewmats[[1, 3]])
    assert left < 0 < right  # seen from its left, the fox looks to the left of the picture


def test_a_request_holds_what_the_server_reads_and_no_more(fox) -> None:
    names = {"vertices", "faces", "uvs", "materials", "object_counts", "texture_0", "views", "viewmats", "Ks"}
    assert capture.capture(fox, FOX, **QUICK).arrays.keys() == names


def furnished_scene(kit):
    """A scene in which much could go wrong: lamp, camera, parent, modifiers, keys, materials, handlers, selection."""
    cone = kit.make_cone()
    parent = bpy.data.objects.new("Parent", None)
    lamp = bpy.data.objects.new("Lamp", bpy.data.lights.new("Lamp", "POINT"))
    eye = bpy.data.objects.new("Eye", bpy.data.cameras.new("Eye"))
    for obj in (parent, lamp, eye):
        bpy.context.scene.collection.objects.link(obj)
    bpy.context.scene.camera = eye
    cone.parent, parent.location, parent.rotation_euler.z = parent, (3, 2, 1), 0.6
    cone.modifiers.new("Soft", "SUBSURF")
    cone.modifiers.new("Bent", "SIMPLE_DEFORM").angle = 0.5
    cone.shape_key_add(name="Basis")
    cone.shape_key_add(name="Wide").value = 0.5
    cone.data.materials.append(bpy.data.materials.new("Red"))
    cone.select_set(True)
    bpy.context.view_layer.objects.active = cone
    bpy.context.scene.frame_set(7)
    heard = []
    bpy.app.handlers.render_complete.append(lambda *_: heard.append("render"))
    bpy.app.handlers.frame_change_post.append(lambda *_: heard.append("frame"))
    return cone, heard


def stop_at(step: int):
    def report(_stage: str, done: int, _total: int) -> None:
        if done == step:
            raise Cancelled

    return report


@pytest.mark.parametrize("how", ["whole", "cancelled", "dropped", "failed"])
def test_nothing_of_the_users_is_touched(kit, how, monkeypatch) -> None:
    cone, heard = furnished_scene(kit)
    before = kit.everything()
    from cycles import CyclesRender

    engine = CyclesRender.__dict__["render"]
    if how == "whole":
        capture.capture([cone], FOX, **QUICK)
    elif how == "cancelled":
        with pytest.raises(Cancelled):
            capture.capture([cone], FOX, report=stop_at(2), **QUICK)
    elif how == "dropped":
        working = capture.steps([cone], FOX, **QUICK)
        next(working), next(working)
        working.close()
    else:

        def break_down(self, depsgraph):
            raise RuntimeError("no memory")

        monkeypatch.setattr(CyclesRender, "render", break_down)
        engine = break_down
        with pytest.raises(InputError) as caught:
            capture.capture([cone], FOX, **QUICK)
        assert caught.value.code == "render_failed"
    assert kit.everything() == before
    assert CyclesRender.__dict__["render"] is engine and heard == []


def test_nothing_of_ours_is_there_in_the_pauses(kit) -> None:
    cone, _ = furnished_scene(kit)
    before, working, pauses = kit.everything(), capture.steps([cone], FOX, **QUICK), []
    while True:
        try:
            pauses.append(next(working))
        except StopIteration as stop:
            assert stop.value.arrays["views"].shape == (4, 64, 64, 4)
            break
        assert kit.everything() == before
    assert pauses == [1, 2, 3, 4]


def test_change_in_a_pause_is_noticed(kit) -> None:
    cone = kit.make_cone()
    working = capture.steps([cone], FOX, **QUICK)
    next(working)
    cone.data.vertices[0].co.x += 1
    with pytest.raises(InputError) as caught:
        next(working)
    assert caught.value.code == "changed_during_capture"


def test_renamed_and_deleted_in_a_pause(kit) -> None:
    cone, other = kit.make_cone("A"), kit.make_cone("B")
    working = capture.steps([cone, other], FOX, **QUICK)
    next(working)
    cone.name = "Renamed"
    next(working)
    bpy.data.objects.remove(other)
    with pytest.raises(InputError) as caught:
        next(working)
    assert caught.value.code == "object_missing" and "'B'" in caught.value.message


def test_where_the_object_stands_and_looks_does_not_matter(kit) -> None:
    cone = kit.make_cone()
    still = capture.capture([cone], FOX, **QUICK)
    cone.location, cone.rotation_euler = (1000, -2000, 30), (0, 0, math.radians(130))
    moved = capture.capture([cone], FOX, **QUICK)
    np.testing.assert_allclose(moved.arrays["vertices"], still.arrays["vertices"], atol=1e-5)
    assert np.abs(moved.arrays["views"].astype(int) - still.arrays["views"]).mean() < 1.0
    seen = capture.snapshot([cone])
    np.testing.assert_allclose(kit.to_world(seen, seen.vertices), kit.world_positions([cone]), atol=2e-3)


@pytest.mark.parametrize(
    ("scale", "turn", "expected"),
    [
        ((1, 1, 1), 0, 0),
        ((2, 0.5, 3), 40, 40),
        ((-1, 1, 1), 0, 0),
        ((1, -1, 1), 25, 25),
        ((1, 1, -1), -70, -70),
        ((-2, -1, -1), 10, 10),
    ],
)
def test_front_is_the_objects_own(kit, scale, turn, expected) -> None:
    """Mirrored objects too keep their own -Y as front (up to the mirroring itself)."""
    cone = kit.make_cone()
    cone.scale, cone.rotation_euler = scale, (0, 0, math.radians(turn))
    seen = capture.snapshot([cone])
    yaw = math.degrees(math.atan2(seen.to_world[1, 0], seen.to_world[0, 0]))
    assert abs((yaw - expected + 90) % 180 - 90) < 1e-3
    np.testing.assert_allclose(kit.to_world(seen, seen.vertices), kit.world_positions([cone]), atol=1e-5)
    a, b, c = (seen.vertices[seen.faces[:, k]] for k in range(3))
    assert np.einsum("ij,ij->i", np.cross(a, b), c).sum() > 0  # the outside stays outside


def test_tilt_is_left_in(kit) -> None:
    cone = kit.make_cone()
    cone.rotation_euler = (math.radians(90), 0, 0)  # points downwards
    seen = capture.snapshot([cone])
    assert seen.vertices[:, 2].min() == pytest.approx(-1, abs=1e-5)
    np.testing.assert_allclose(seen.to_world, np.eye(4), atol=1e-6)


@pytest.mark.parametrize("front", ["+X", "-Y", "-X", "+Y"])
def test_the_front_setting_turns_the_cameras(kit, front) -> None:
    request = capture.capture([kit.make_cone()], Settings(prompt="x", front=front), **QUICK)
    centre = canonical_similarity(request.arrays["vertices"]).centre
    eye = -np.linalg.inv(request.arrays["viewmats"][0][:3, :3]) @ request.arrays["viewmats"][0][:3, 3] - centre
    axis = {"X": 0, "Y": 1}[front[1]]
    assert np.argmax(np.abs(eye)) == axis and np.sign(eye[axis]) == float(front[0] + "1")


def test_sheared_by_its_parent(kit) -> None:
    cone, parent = kit.make_cone(), bpy.data.objects.new("Parent", None)
    bpy.context.scene.collection.objects.link(parent)
    parent.scale, cone.parent, cone.rotation_euler = (3, 1, 0.5), parent, Euler((0.3, 0.4, 0.7))
    request = capture.capture([cone], FOX, size=96, samples=4)
    assert_pictures_agree(request)
    seen = capture.snapshot([cone])
    np.testing.assert_allclose(kit.to_world(seen, seen.vertices), kit.world_positions([cone]), atol=1e-5)


def test_modifiers_that_add_vertices_stay_out(kit) -> None:
    cone = kit.make_cone()
    cone.modifiers.new("Smooth", "SUBSURF").levels = 2
    request = capture.capture([cone], FOX, size=96, samples=4)
    assert len(request.arrays["vertices"]) == 13
    assert_pictures_agree(request)  # the pictures show what the server gets


def test_modifiers_below_a_subdivision_count(kit) -> None:
    cone = kit.make_cone()
    bend = cone.modifiers.new("Bend", "SIMPLE_DEFORM")
    bend.deform_method, bend.angle = "TWIST", 1.0
    alone = capture.snapshot([cone])
    cone.modifiers.new("Smooth", "SUBSURF")
    both = capture.snapshot([cone])
    np.testing.assert_array_equal(both.vertices, alone.vertices)
    assert np.abs(alone.vertices - np.array([v.co for v in cone.data.vertices])).max() > 0.05
    assert alone.objects[0].unbend is not None


def test_edit_mode_stays_and_its_changes_count(kit) -> None:
    cone = kit.make_cone()
    bpy.context.view_layer.objects.active = cone
    bpy.ops.object.mode_set(mode="EDIT")
    import bmesh

    edited = bmesh.from_edit_mesh(cone.data)
    edited.verts.ensure_lookup_table()
    edited.verts[12].co.y = -5
    seen = capture.snapshot([cone])
    assert cone.mode == "EDIT" and seen.vertices[12, 1] == -5


def test_hidden_objects_can_be_captured(kit) -> None:
    cone = kit.make_cone()
    cone.hide_viewport = True
    assert capture.capture([cone], FOX, **QUICK).arrays["views"][..., 3].any()


def test_several_objects_are_one_shape(load) -> None:
    shark = load("shark.glb")
    seen = capture.snapshot(shark)
    request = capture.capture(seen, Settings(prompt="the shark swims"), size=96, samples=4)
    assert request.arrays["object_counts"].tolist() == [len(o.data.vertices) for o in shark]
    assert [w["code"] for w in seen.warnings] == ["several_objects"]
    assert_pictures_agree(request)


def test_bone_parented_parts(load) -> None:
    robot = load("robot_expressive.glb")
    assert_pictures_agree(capture.capture(robot, Settings(prompt="the robot walks"), size=128, samples=4))


def test_large_mesh(kit) -> None:
    grid = kit.make_grid(548)
    request = capture.capture([grid], FOX, size=64, samples=1)
    assert len(request.arrays["vertices"]) == 300_304 and len(request.arrays["faces"]) == 2 * 547**2
    assert_pictures_agree(request)


# Colours


def material(name: str, color=(0.8, 0.8, 0.8)):
    made = bpy.data.materials.new(name)
    if bpy.app.version < (5, 0, 0):
        made.use_nodes = True
    shader = next(node for node in made.node_tree.nodes if node.type == "BSDF_PRINCIPLED")
    shader.inputs["Base Color"].default_value = (*color, 1)
    return made, shader


def image(name: str, width: int, height: int, is_float: bool = False):
    made = bpy.data.images.new(name, width, height, float_buffer=is_float)
    ramp = np.zeros((height, width, 4), np.float32)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 1, width), np.linspace(0, 1, height)[:, None]
    ramp[..., 3] = 1
    made.pixels.foreach_set(ramp.ravel())
    return made


def test_plain_colours_are_srgb(kit) -> None:
    cone = kit.make_cone()
    for name, color in (("Grey", (0.2140, 0.2140, 0.2140)), ("Red", (1, 0, 0))):
        cone.data.materials.append(material(name, color)[0])
    cone.data.polygons[0].material_index = 1
    seen = capture.snapshot([cone])
    assert [texture.tolist() for texture in seen.textures] in (
        [[[[127, 127, 127]]], [[[255, 0, 0]]]],
        [[[[128, 128, 128]]], [[[255, 0, 0]]]],
    )
    assert seen.materials.tolist().count(1) == 1 and seen.warnings == []
    assert_pictures_agree(capture.capture(seen, FOX, **QUICK))


def test_texture_times_factor_and_its_uvs(kit) -> None:
    grid = kit.make_grid(5)
    made, shader = material("Painted")
    tree = made.node_tree
    picture, mix = tree.nodes.new("ShaderNodeTexImage"), tree.nodes.new("ShaderNodeMix")
    picture.image, mix.data_type, mix.blend_type = image("Ramp", 2048, 512), "RGBA", "MULTIPLY"
    inputs = {socket.identifier: socket for socket in mix.inputs}
    inputs["Factor_Float"].default_value = 1.0
    inputs["B_Color"].default_value = (0.5, 1, 1, 1)
    tree.links.new(picture.outputs["Color"], inputs["A_Color"])
    tree.links.new(next(s for s in mix.outputs if s.identifier == "Result_Color"), shader.inputs["Base Color"])
    grid.data.materials.append(made)
    wrong, right = grid.data.uv_layers.new(name="Wrong"), grid.data.uv_layers.new(name="Right")
    right.active_render = True
    corners = np.array([grid.data.vertices[loop.vertex_index].co[:2] for loop in grid.data.loops], np.float32)
    right.uv.foreach_set("vector", (corners / 2 + 0.5).ravel())
    wrong.uv.foreach_set("vector", np.zeros(corners.size, np.float32))
    seen = capture.snapshot([grid])
    (texture,) = seen.textures
    assert texture.shape == (256, 1024, 3)
    assert texture[0, 0].tolist() == pytest.approx([0, 254, 0], abs=2)  # the top row comes first
    assert texture[-1, -1].tolist() == pytest.approx([187, 1, 0], abs=3)  # half of white is 0.735 in sRGB
    np.testing.assert_allclose(seen.uvs[:, :, 0], seen.vertices[seen.faces][:, :, 0] / 2 + 0.5, atol=1e-6)


@pytest.mark.parametrize(("kind", "domain"), [("FLOAT_COLOR", "POINT"), ("BYTE_COLOR", "CORNER")])
def test_colour_attributes_become_texels(kit, kind, domain) -> None:
    grid = kit.make_grid(20)
    made, shader = material("Painted")
    node = made.node_tree.nodes.new("ShaderNodeVertexColor")
    node.layer_name = "Paint"
    made.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])
    grid.data.materials.append(made)
    attribute = grid.data.color_attributes.new("Paint", kind, domain)
    where = (
        [v.co for v in grid.data.vertices]
        if domain == "POINT"
        else [grid.data.vertices[x.vertex_index].co for x in grid.data.loops]
    )
    attribute.data.foreach_set(
        "color", np.array([(p[0] / 2 + 0.5, p[1] / 2 + 0.5, 0.1, 1) for p in where], np.float32).ravel()
    )
    seen = capture.snapshot([grid])
    mesh = server_mesh(
        seen.vertices, seen.faces, seen.uvs, seen.materials, [t.astype(np.float32) / 255 for t in seen.textures]
    )
    found = mesh.corner_colors(seen.uvs.mean(1), np.arange(len(seen.faces)))
    middle = seen.vertices[seen.faces].mean(1)[:, :2] / 2 + 0.5
    linear = np.where(found <= 0.04045, found / 12.92, ((found + 0.055) / 1.055) ** 2.4)
    np.testing.assert_allclose(linear[:, :2], middle, atol=0.01)


@pytest.mark.parametrize("code", ["no_material", "missing_texture", "no_uvs"])
def test_missing_colours_are_warnings(kit, code, tmp_path) -> None:
    cone = kit.make_cone()
    if code != "no_material":
        made, shader = material("Painted")
        node = made.node_tree.nodes.new("ShaderNodeTexImage")
        if code == "missing_texture":
            cone.data.uv_layers.new()
            node.image = bpy.data.images.new("Lost", 4, 4)
            node.image.source, node.image.filepath = "FILE", str(tmp_path / "lost.png")
        else:
            node.image = image("Ramp", 8, 8)
        made.node_tree.links.new(node.outputs["Color"], shader.inputs["Base Color"])
        cone.data.materials.append(made)
    seen = capture.snapshot([cone])
    (warning,) = seen.warnings
    assert (
        warning["code"] == code
        and "Cone" in warning["message"] + "Cone" * (code == "missing_texture")
        and warning["action"]
    )
    check_request(capture.capture(seen, FOX, **QUICK))


def test_what_can_not_be_seen(kit) -> None:
    cone = kit.make_cone()
    made, shader = material("Glass")
    shader.inputs["Alpha"].default_value = 0.0
    cone.data.materials.append(made)
    with pytest.raises(InputError) as caught:
        capture.capture([cone], FOX, **QUICK)
    assert caught.value.code == "nothing_visible" and "'Cone'" in caught.value.message


# Any object an artist has


def with_modifiers(kit):
    cone = kit.make_cone()
    cone.modifiers.new("Half", "MIRROR").use_axis = (False, False, True)
    cone.modifiers.new("Smooth", "SUBSURF")
    return [cone]


def with_instances(kit):
    """Geometry nodes put a cube on every vertex, and an empty shows the object's collection a second time."""
    cone = kit.make_cone()
    tree = bpy.data.node_groups.new("Cubes", "GeometryNodeTree")
    tree.is_modifier = True
    for way in ("INPUT", "OUTPUT"):
        tree.interface.new_socket("Geometry", in_out=way, socket_type="NodeSocketGeometry")
    begin, end = tree.nodes.new("NodeGroupInput"), tree.nodes.new("NodeGroupOutput")
    spread, cube = tree.nodes.new("GeometryNodeInstanceOnPoints"), tree.nodes.new("GeometryNodeMeshCube")
    tree.links.new(begin.outputs[0], spread.inputs["Points"])
    tree.links.new(cube.outputs["Mesh"], spread.inputs["Instance"])
    tree.links.new(spread.outputs[0], end.inputs[0])
    cone.modifiers.new("Cubes", "NODES").node_group = tree
    shows = bpy.data.objects.new("Shows", None)
    shows.instance_type, shows.instance_collection = "COLLECTION", bpy.data.collections.new("Cones")
    shows.instance_collection.objects.link(cone)
    bpy.context.scene.collection.objects.link(shows)
    return [cone]


def twins(kit):
    """Two objects with one mesh: what moves one moves the other."""
    cone = kit.make_cone()
    twin = bpy.data.objects.new("Twin", cone.data)
    twin.location = (4, 0, 0)
    bpy.context.scene.collection.objects.link(twin)
    return [cone, twin]


def scaled(kit):
    cone, parent = kit.make_cone(), bpy.data.objects.new("Parent", None)
    bpy.context.scene.collection.objects.link(parent)
    parent.scale, cone.parent, cone.scale, cone.rotation_euler = (3, 1, 0.5), parent, (-1, 2, 0.5), Euler((0.3, 0.4, 0.7))
    return [cone]


def with_hidden_faces(kit):
    cone = kit.make_cone()
    for k in range(4):
        cone.data.polygons[k].hide = True
    cone.data.vertices[0].hide = True
    return [cone]


def with_materials_and_uvs(kit):
    grid = kit.make_grid(12)
    for name in ("One", "Two"):
        grid.data.uv_layers.new(name=name)
        grid.data.materials.append(material(name, (len(name), 0.2, 0.2))[0])
    for k in range(0, len(grid.data.polygons), 2):
        grid.data.polygons[k].material_index = 1
    grid.data.uv_layers.active_index = 1
    return [grid]


def with_loose_vertices(kit):
    """An n-gon, a loose vertex, a loose edge."""
    disc = [(np.cos(a), np.sin(a), 0) for a in np.linspace(0, 2 * np.pi, 11, endpoint=False)]
    obj = kit.make_object("Loose", [*disc, (0, 0, 1), (0, 0, 2), (1, 1, 1)], [range(11)])
    obj.data.edges.add(1)
    obj.data.edges[-1].vertices = (12, 13)
    return [obj]


def with_duplicates(kit):
    """Every face twice in the same place, with vertices of its own."""
    cone = kit.make_cone("Source")
    places, faces = [v.co.copy() for v in cone.data.vertices], [list(p.vertices) for p in cone.data.polygons]
    count = len(places)
    bpy.data.objects.remove(cone)
    return [kit.make_object("Double", places * 2, faces + [[v + count for v in face] for face in faces])]


def with_shape_keys(kit):
    cone = kit.make_cone()
    cone.shape_key_add(name="Basis")
    smile = cone.shape_key_add(name="Smile")
    smile.points[3].co.x += 0.5
    for frame, value in ((1, 0.0), (9, 1.0)):
        smile.value = value
        smile.keyframe_insert("value", frame=frame)
    return [cone]


def with_rig(kit):
    cone = kit.make_cone()
    rig = bpy.data.objects.new("Rig", bpy.data.armatures.new("Rig"))
    bpy.context.scene.collection.objects.link(rig)
    bpy.context.view_layer.objects.active = rig
    bpy.ops.object.mode_set(mode="EDIT")
    rig.data.edit_bones.new("Bone").tail = (0, 0, 1)
    bpy.ops.object.mode_set(mode="OBJECT")
    bone = rig.pose.bones["Bone"]
    bone.rotation_mode = "XYZ"
    for frame, angle in ((1, 0.3), (9, 1.2)):
        bone.rotation_euler.z = angle
        bone.keyframe_insert("rotation_euler", frame=frame)
    cone.vertex_groups.new(name="Bone").add(range(13), 1.0, "REPLACE")
    cone.modifiers.new("Rig", "ARMATURE").object = rig
    return [cone]


def several(kit):
    cones = [kit.make_cone("One"), kit.make_cone("Two", sides=5), kit.make_grid(4, "Three")]
    for k, obj in enumerate(cones):
        obj.location.x, obj.rotation_euler.z = 3 * k, k
    return cones


MOVED_BY_OTHERS = {"with_shape_keys", "with_rig"}
ARTISTS = (
    with_modifiers, with_instances, twins, scaled, with_hidden_faces, with_materials_and_uvs, with_loose_vertices,
    with_duplicates, with_shape_keys, with_rig, several,
)  # fmt: skip


def own_vertices(objects) -> np.ndarray:
    """The objects' own vertices as they stand in the world, without the modifiers that add some."""
    added = [m for obj in objects for m in obj.modifiers if m.type in ("MIRROR", "SUBSURF", "NODES")]
    for modifier in added:
        modifier.show_viewport = False
    bpy.context.view_layer.update()
    graph, places = bpy.context.evaluated_depsgraph_get(), []
    for obj in objects:
        evaluated = obj.evaluated_get(graph)
        co = np.empty(len(evaluated.data.vertices) * 3, np.float32)
        evaluated.data.vertices.foreach_get("co", co)
        matrix = np.array(evaluated.matrix_world)
        places.append(co.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
    for modifier in added:
        modifier.show_viewport = True
    return np.concatenate(places)


@pytest.mark.parametrize("make", ARTISTS, ids=[make.__name__ for make in ARTISTS])
def test_any_object_moves_and_stays_what_it_was(kit, make) -> None:
    """Captured, animated and taken back: same topology, UVs, materials, names, pivots; gone without trace."""
    objects = make(kit)
    scene = bpy.context.scene
    scene.frame_set(1)
    before = kit.everything()
    start = own_vertices(objects)
    request = capture.capture(objects, FOX, size=64, samples=1)
    check_request(request)
    assert request.arrays["views"][..., 3].max() == 255
    assert kit.everything() == before
    seen = capture.snapshot(objects)
    distinct = objects[: len(seen.objects)]
    assert len(request.arrays["vertices"]) == sum(len(obj.data.vertices) for obj in distinct)
    np.testing.assert_allclose(kit.to_world(seen, seen.vertices), start[: len(seen.vertices)], atol=1e-5)
    result = kit.wave(seen.vertices, 5)
    shapes = {mesh.name: capture.mesh.topology_hash(mesh) for mesh in bpy.data.meshes}
    apply.apply(seen, result)
    assert [obj.name for obj in bpy.data.objects] == sorted(before["matrices"])
    assert shapes == {mesh.name: capture.mesh.topology_hash(mesh) for mesh in bpy.data.meshes}
    size = np.ptp(seen.vertices, axis=0).max()
    for frame, vertices in enumerate(result.arrays["vertices"], 1):
        scene.frame_set(frame)
        moved = own_vertices(objects)[: len(seen.vertices)]
        if make.__name__ not in MOVED_BY_OTHERS:
            assert np.abs(moved - kit.to_world(seen, vertices)).max() < 1e-5 * size
            continue
        # layered: without ours the object does what it did, and ours is what is added, turned as the rig turns it
        ours = list(distinct[0].data.shape_keys.key_blocks)[-5:]
        for block in ours:
            block.mute = True
        alone = own_vertices(objects)
        for block in ours:
            block.mute = False
        added, wanted = moved - alone, kit.to_world(seen, vertices) - start
        lengths = [np.linalg.norm(moves, axis=1) for moves in (added, wanted)]
        assert np.abs(lengths[0] - lengths[1]).max() < 1e-4 * size
        assert frame == 1 or np.abs(alone - start).max() > 0.01
    if make is twins:
        assert np.abs(own_vertices(objects[1:]) - own_vertices(objects[:1]) - [4, 0, 0]).max() < 1e-6
    codes = {warning["code"] for warning in seen.warnings}
    assert ("animation_layered" in codes) == (make.__name__ in MOVED_BY_OTHERS) and ("shared_mesh" in codes) == (make is twins)
    assert apply.remove(distinct) == len(distinct)
    scene.frame_set(1)
    assert kit.everything() == before


def test_two_hundred_thousand_vertices_move(kit) -> None:
    grid = kit.make_grid(448)
    seen = capture.snapshot([grid])
    result = kit.wave(seen.vertices, 3)
    apply.apply(seen, result)
    size = np.ptp(seen.vertices, axis=0).max()
    for frame, vertices in enumerate(result.arrays["vertices"], 1):
        assert np.abs(kit.world_positions([grid], frame) - kit.to_world(seen, vertices)).max() < 1e-5 * size
    assert apply.remove([grid]) == 1 and grid.data.shape_keys is None


# What can't be animated


def keyed(owner, path: str = "location") -> None:
    owner.keyframe_insert(path, frame=1)


def lattice(cone):
    cage = bpy.data.objects.new("Cage", bpy.data.lattices.new("Cage"))
    bpy.context.scene.collection.objects.link(cage)
    cone.modifiers.new("Caged", "LATTICE").object = cage
    return cage


def shaped(cone):
    cone.shape_key_add(name="Basis")
    return cone.shape_key_add(name="Key")


def into_nla(cone) -> None:
    keyed(cone)
    action, cone.animation_data.action = cone.animation_data.action, None
    cone.animation_data.nla_tracks.new().strips.new("Strip", 1, action)


def bad_mesh(kit, vertices, faces):
    return [kit.make_object("Bad", vertices, faces)]


SQUARE = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
REFUSED = {
    "no_mesh_selected": lambda kit, cone: [],
    "wrong_object_type": lambda kit, cone: [bpy.data.objects.new("Lamp", bpy.data.lights.new("Lamp", "SUN"))],
    "empty_mesh": lambda kit, cone: bad_mesh(kit, [], []),
    "too_few_vertices": lambda kit, cone: bad_mesh(kit, [(0, 0, 0)], []),
    "no_faces": lambda kit, cone: bad_mesh(kit, SQUARE, []),
    "degenerate_mesh": lambda kit, cone: bad_mesh(kit, [(1, 2, 3)] * 4, [(0, 1, 2, 3)]),
    "not_finite": lambda kit, cone: bad_mesh(kit, [*SQUARE[:3], (float("nan"), 0, 0)], [(0, 1, 2, 3)]),
    "flat_transform": lambda kit, cone: cone.scale.__setitem__(2, 0.0),
    "zero_area": lambda kit, cone: bad_mesh(kit, [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)], [(0, 1, 2), (1, 2, 3)]),
    "wrong_object_type of a curve": lambda kit, cone: [bpy.data.objects.new("Path", bpy.data.curves.new("Path", "CURVE"))],
    "wrong_object_type of an empty": lambda kit, cone: [cone, bpy.data.objects.new("Nothing", None)],
    "wrong_object_type of a volume": lambda kit, cone: [bpy.data.objects.new("Smoke", bpy.data.volumes.new("Smoke"))],
    "absolute_shape_keys": lambda kit, cone: shaped(cone).id_data.__setattr__("use_relative", False),
    "already_animated": lambda kit, cone: cone.modifiers.new("Wave", "WAVE") and None,
    "already_animated by physics": lambda kit, cone: cone.modifiers.new("Cloth", "CLOTH") and None,
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_object_and_leave_no_trace(kit, case) -> None:
    cone = kit.make_cone()
    objects = REFUSED[case](kit, cone)
    objects = [cone] if objects is None else objects
    before = kit.everything()
    with pytest.raises(InputError) as caught:
        capture.capture(objects, FOX, **QUICK)
    assert caught.value.code == case.split()[0] and caught.value.action
    if objects and case != "degenerate_mesh":
        assert f"'{objects[-1].name}'" in caught.value.message
    after = kit.everything()
    if case != "not_finite":  # nan is not equal to itself, but its bytes are
        assert after == before


@pytest.mark.parametrize(
    ("move", "cause"),
    [
        (lambda cone: keyed(cone), "the action"),
        (lambda cone: into_nla(cone), "the NLA strip"),
        (lambda cone: keyed(shaped(cone), "value"), "of its shape keys"),
        (lambda cone: keyed(lattice(cone)), "of 'Cage' through the modifier 'Caged'"),
    ],
    ids=["action", "nla", "keys", "modifier"],
)
def test_what_moves_already_is_told(kit, move, cause) -> None:
    cone = kit.make_cone()
    move(cone)
    (warning,) = [warning for warning in capture.snapshot([cone]).warnings if warning["code"] == "animation_layered"]
    assert "'Cone'" in warning["message"] and cause in warning["message"] and warning["action"]


def test_unknown_front(kit) -> None:
    with pytest.raises(InputError) as caught:
        capture.capture([kit.make_cone()], Settings(prompt="x", front="up"), **QUICK)
    assert caught.value.code == "bad_front"


def test_cycles_switched_off(kit) -> None:
    cone = kit.make_cone()
    bpy.ops.preferences.addon_disable(module="cycles")
    try:
        before = set(bpy.data.objects)
        with pytest.raises(InputError) as caught:
            capture.capture([cone], FOX, **QUICK)
        assert caught.value.code == "cycles_missing" and set(bpy.data.objects) == before
    finally:
        bpy.ops.preferences.addon_enable(module="cycles")
    assert capture.capture([cone], FOX, **QUICK).arrays["views"][..., 3].any()


def test_a_still_rig_is_no_animation(kit) -> None:
    cone = kit.make_cone()
    cage = lattice(cone)
    cage.data.points[0].co_deform.x += 1
    assert capture.snapshot([cone]).objects[0].unbend is not None


def test_matrix_of_a_muted_parent_is_used(kit) -> None:
    """An object that follows an animated parent keeps its own shape still, so it can be animated."""
    cone, parent = kit.make_cone(), bpy.data.objects.new("Carrier", None)
    bpy.context.scene.collection.objects.link(parent)
    cone.parent = parent
    parent.matrix_world = Matrix.Translation((4, 5, 6))
    keyed(parent)
    seen = capture.snapshot([cone])
    np.testing.assert_allclose(seen.to_world[:3, 3], (4, 5, 6), atol=1e-6)


def test_the_server_moves_what_lies_together_alike_and_takes_loose_vertices_along(kit) -> None:
    """Two coincident surfaces don't come apart, and what no face holds isn't left behind."""
    pytest.importorskip("torch", reason="the server isn't installed beside this Blender")
    from track4d.pipeline import run

    objects = [*with_duplicates(kit), *with_loose_vertices(kit)]
    objects[1].location.x = 2
    request = capture.capture(objects, Settings(prompt="it jumps", preset="fast"), size=128, samples=4)
    vertices = run(request, lambda *_, **__: None).arrays["vertices"]
    half = len(objects[0].data.vertices) // 2
    assert np.isfinite(vertices).all() and np.abs(vertices[0] - request.arrays["vertices"]).max() < 1e-5
    np.testing.assert_allclose(vertices[:, :half], vertices[:, half : 2 * half], atol=1e-5)
    ways = np.linalg.norm(vertices - vertices[0], axis=-1).max(0)  # [N]
    assert ways[-3:].min() > 0.3 * np.median(ways) > 0.01


def test_faces_are_cut_as_blender_cuts_them(kit) -> None:
    rng = np.random.default_rng(0)
    places = rng.uniform(-1, 1, (400, 3))
    faces = [(4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3) for k in range(60)]
    faces += [(240 + 3 * k, 241 + 3 * k, 242 + 3 * k) for k in range(50)]
    rng.shuffle(faces)
    for extra in ([], [tuple(range(390, 397))]):
        mesh = kit.make_object("Shards", places, [*faces, *extra]).data
        surface = colors.read_surface(mesh)
        assert (surface.loops is None) == (not extra)
        mesh.calc_loop_triangles()
        wanted = np.array([triangle.loops for triangle in mesh.loop_triangles])
        np.testing.assert_array_equal(surface.cut(capture.mesh.positions(mesh)).loops, wanted)


def test_slices_see_what_one_look_sees(kit) -> None:
    """Also what modifiers do with a motion; and an object that is changed or removed in a pause is told of by name."""
    cone, other = kit.make_cone(), kit.make_cone("Other")
    bend = cone.modifiers.new("Bend", "SIMPLE_DEFORM")
    bend.deform_method, bend.angle = "BEND", 1.0
    whole, work = capture.snapshot([cone, other]), capture.snapshot_steps(capture.known_objects([cone, other]))
    before, pauses = kit.everything(), 0
    while True:
        try:
            next(work)
            pauses += 1
            assert kit.everything() == before, "nothing of ours is there in the pauses"
        except StopIteration as end:
            sliced = end.value
            break
    assert pauses >= 5
    for name in ("to_world", "vertices", "faces", "uvs", "materials"):
        np.testing.assert_array_equal(getattr(sliced, name), getattr(whole, name))
    np.testing.assert_array_equal(sliced.objects[0].unbend, whole.objects[0].unbend)
    assert sliced.warnings == whole.warnings and sliced.objects[1].topology == whole.objects[1].topology

    work = capture.snapshot_steps(capture.known_objects([cone, other]))
    next(work)
    bpy.data.objects.remove(other)
    with pytest.raises(InputError, match="'Other' is no longer there"):
        slices.finished(work)
    work = capture.snapshot_steps(capture.known_objects([cone]))
    next(work)
    bpy.ops.mesh.primitive_monkey_add()
    cone.data = bpy.context.object.data
    with pytest.raises(InputError, match="'Cone' was changed"):
        slices.finished(work)
