"""Results on the user's objects: exact, beside what is there, and gone without trace."""

import bpy
import numpy as np
import pytest
from mathutils import Euler
from track4d_addon import apply, capture, live_motion, marks, slices
from track4d_protocol.errors import InputError, ServerError
from track4d_protocol.messages import Result


def assert_moves_as(kit, seen, result, objects, frame_start=1, step=1.0, tolerance=2e-6) -> None:
    """Blender shows each frame of the result, and the linear way between two."""
    frames = result.arrays["vertices"]
    size = np.ptp(seen.vertices, axis=0).max()
    for number in range(len(frames)):
        shown = kit.world_positions(objects, frame_start + number * step)
        assert np.abs(shown - kit.to_world(seen, frames[number])).max() < tolerance * size
    between = kit.to_world(seen, 0.75 * frames[1] + 0.25 * frames[2])
    assert np.abs(kit.world_positions(objects, frame_start + 1.25 * step) - between).max() < tolerance * size


@pytest.fixture
def cone(kit):
    return kit.make_cone()


def test_two_objects_move_as_the_result_says(kit, load) -> None:
    shark = load("shark.glb")
    seen = capture.snapshot(shark)
    result = kit.wave(seen.vertices, 16, "the shark swims")
    made = apply.shape_keys(seen, result)
    assert_moves_as(kit, seen, result, shark)
    assert made == {
        "objects": [o.name for o in shark],
        "keys": [f"f{n:04d}" for n in range(1, 17)],
        "action": "Track4D: the shark swims",
        "frame_start": 1,
        "frame_end": 16,
        "vertices": 3514,
        "take": made["take"],
    }
    assert {o.data.shape_keys.animation_data.action.name for o in shark} == {"Track4D: the shark swims"}
    assert [a.name for a in bpy.data.actions] == ["Track4D: the shark swims"]
    held = kit.world_positions(shark, 40)
    np.testing.assert_allclose(held, kit.world_positions(shark, 16), atol=1e-6)


@pytest.mark.parametrize("scale", [(1, 1, 1), (2, 0.5, 3), (-1, 2, 1), (-1, -1, -1)])
def test_transforms_and_parents(kit, cone, scale) -> None:
    parent = bpy.data.objects.new("Parent", None)
    bpy.context.scene.collection.objects.link(parent)
    parent.scale, parent.location, parent.rotation_euler = (3, 1, 0.5), (50, -20, 7), Euler((0.2, 0.3, 2.0))
    cone.parent, cone.scale, cone.rotation_euler, cone.location = parent, scale, Euler((0.3, 0.4, 0.7)), (1, 2, 3)
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    apply.shape_keys(seen, result)
    assert_moves_as(kit, seen, result, [cone], tolerance=1e-5)


def test_moved_and_renamed_while_the_job_ran(kit, cone) -> None:
    """The motion is the object's own: it goes where the object goes."""
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    cone.name, cone.location, cone.rotation_euler.z = "Other", (9, 9, 9), 1.0
    apply.shape_keys(seen, result)
    moved = capture.snapshot([cone])
    np.testing.assert_allclose(kit.world_positions([cone], 3), kit.to_world(moved, result.arrays["vertices"][2]), atol=1e-5)


def test_objects_will_do_without_their_snapshot(kit, cone) -> None:
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    cone.keyframe_insert("location", frame=1)  # animated in the meantime: no reason to refuse a result
    apply.shape_keys([cone], result)
    assert_moves_as(kit, seen, result, [cone])


def test_start_and_step(kit, cone) -> None:
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    made = apply.shape_keys(seen, result, frame_start=20, step=2.5)
    assert (made["frame_start"], made["frame_end"]) == (20, 32.5)
    assert_moves_as(kit, seen, result, [cone], 20, 2.5)


def test_subdivision_and_mirror_work_on_top(kit, cone) -> None:
    cone.modifiers.new("Half", "MIRROR").use_axis = (False, False, True)
    cone.modifiers.new("Smooth", "SUBSURF")
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    apply.shape_keys(seen, result)
    for modifier in cone.modifiers:
        modifier.show_viewport = False
    assert_moves_as(kit, seen, result, [cone])


@pytest.mark.parametrize("kind", ["lattice", "rig", "twist", "smooth"])
def test_under_modifiers_that_bend(kit, cone, kind) -> None:
    """What is seen is what the server made, although the keys work before the modifiers."""
    if kind == "rig":
        rig = bpy.data.objects.new("Rig", bpy.data.armatures.new("Rig"))
        bpy.context.scene.collection.objects.link(rig)
        bpy.context.view_layer.objects.active = rig
        bpy.ops.object.mode_set(mode="EDIT")
        bone = rig.data.edit_bones.new("Bone")
        bone.tail = (0, 0, 1)
        bpy.ops.object.mode_set(mode="OBJECT")
        rig.pose.bones["Bone"].rotation_mode, rig.pose.bones["Bone"].rotation_euler = "XYZ", Euler((0.8, 0.1, 0.5))
        cone.vertex_groups.new(name="Bone").add(range(13), 1.0, "REPLACE")
        cone.modifiers.new("Rig", "ARMATURE").object = rig
    elif kind == "lattice":
        cage = bpy.data.objects.new("Cage", bpy.data.lattices.new("Cage"))
        bpy.context.scene.collection.objects.link(cage)
        cage.scale = (4, 4, 4)
        for point in cage.data.points:
            point.co_deform = (
                point.co_deform[0] * 1.5 + 0.3 * point.co_deform[1],
                point.co_deform[1],
                point.co_deform[2] * 0.8,
            )
        cone.modifiers.new("Cage", "LATTICE").object = cage
    elif kind == "twist":
        bend = cone.modifiers.new("Bend", "SIMPLE_DEFORM")
        bend.deform_method, bend.angle, bend.deform_axis = "TWIST", 0.4, "Y"
    else:
        cone.modifiers.new("Soft", "SMOOTH").factor = 0.3
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    result.arrays["vertices"] = (seen.vertices + 0.1 * (result.arrays["vertices"] - seen.vertices)).astype(np.float32)
    apply.shape_keys(seen, result)
    size = np.ptp(seen.vertices, axis=0).max()
    # rigs and cages are linear in a vertex; a twist only nearly, and smoothing also mixes neighbours
    tolerance = {"rig": 1e-4, "lattice": 2e-3, "twist": 5e-3, "smooth": 2e-2}[kind] * size
    for number, frame in enumerate(result.arrays["vertices"], 1):
        assert np.abs(kit.world_positions([cone], number) - kit.to_world(seen, frame)).max() < tolerance


def test_first_frame_is_the_mesh_itself(kit, cone) -> None:
    seen = capture.snapshot([cone])
    before = kit.world_positions([cone])
    apply.shape_keys(seen, kit.wave(seen.vertices))
    np.testing.assert_allclose(kit.world_positions([cone], 1), before, atol=1e-12)
    basis = np.array([p.co for p in cone.data.shape_keys.reference_key.points])
    np.testing.assert_array_equal(basis, np.array([v.co for v in cone.data.vertices]))


def give_keys(cone):
    """Shape keys of the user: one that is named like ours, and one that is at work."""
    cone.shape_key_add(name="Rest")
    smile = cone.shape_key_add(name="Smile")
    smile.points[3].co.x += 0.5
    smile.value = 0.5
    cone.shape_key_add(name="f0002").points[4].co.z -= 0.25
    cone.active_shape_key_index = 1
    return smile


def test_the_users_shape_keys_go_on_working(kit, cone) -> None:
    smile = give_keys(cone)
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    made = apply.shape_keys(seen, result)
    assert_moves_as(kit, seen, result, [cone])
    assert made["keys"][1] == "f0002.001" and cone.active_shape_key_index == 1
    before = kit.world_positions([cone], 3)
    smile.value = 1.0
    moved = kit.world_positions([cone], 3) - before
    assert np.abs(moved[3]).max() == pytest.approx(0.25, abs=1e-5) and np.abs(np.delete(moved, 3, 0)).max() < 1e-6


def test_the_users_key_animation_goes_on_working(kit, cone) -> None:
    smile = give_keys(cone)
    seen = capture.snapshot([cone])
    for frame, value in ((1, 0.5), (6, 1.0)):
        smile.value = value
        smile.keyframe_insert("value", frame=frame)
    action = cone.data.shape_keys.animation_data.action
    before = kit.everything()
    result = kit.wave(seen.vertices)
    made = apply.shape_keys(seen, result)
    assert made["action"] == action.name
    np.testing.assert_allclose(kit.world_positions([cone], 1), kit.to_world(seen, result.arrays["vertices"][0]), atol=1e-6)
    last = kit.world_positions([cone], 6) - kit.to_world(seen, result.arrays["vertices"][5])
    assert np.abs(last[3]).max() == pytest.approx(0.25, abs=1e-5) and np.abs(np.delete(last, 3, 0)).max() < 1e-5
    apply.remove([cone])
    bpy.context.scene.frame_set(before["Scene"][7])
    smile.value = 1.0
    assert kit.everything() == before


@pytest.mark.parametrize("case", ["plain", "with keys", "two objects", "applied twice", "with modifiers"])
def test_removed_without_trace(kit, cone, case) -> None:
    objects = [cone, kit.make_cone("Second")] if case == "two objects" else [cone]
    if case == "with keys":
        give_keys(cone)
    if case == "with modifiers":
        cone.modifiers.new("Smooth", "SUBSURF")
    before = kit.everything()
    seen = capture.snapshot(objects)
    apply.shape_keys(seen, kit.wave(seen.vertices, 9))
    if case == "applied twice":
        apply.shape_keys(capture.snapshot(objects), kit.wave(seen.vertices, 4, "it jumps"))
        assert len(cone.data.shape_keys.key_blocks) == 5 and [a.name for a in bpy.data.actions] == ["Track4D: it jumps"]
    assert kit.everything() != before
    assert apply.remove(objects) == len(objects)
    after = kit.everything()
    assert after == before
    assert apply.remove(objects) == 0


def test_removed_although_the_action_was_pushed_down(kit, cone) -> None:
    before = kit.everything()
    seen = capture.snapshot([cone])
    apply.shape_keys(seen, kit.wave(seen.vertices))
    data = cone.data.shape_keys.animation_data
    data.nla_tracks.new().strips.new("Swim", 1, data.action)
    data.action = None
    apply.remove([cone])
    assert kit.everything() == before


def test_a_second_capture_does_not_see_the_first_result(kit, cone) -> None:
    seen = capture.snapshot([cone])
    apply.shape_keys(seen, kit.wave(seen.vertices))
    bpy.context.scene.frame_set(4)
    again = capture.snapshot([cone])
    np.testing.assert_array_equal(again.vertices, seen.vertices)


def test_mark_tells_what_was_made(kit, cone) -> None:
    from track4d_addon import marks

    seen = capture.snapshot([cone])
    apply.shape_keys(seen, kit.wave(seen.vertices, prompt="the cone rolls"))
    ((take, record),) = marks.history(cone).items()
    assert (record["prompt"], record["seed"], record["preset"]) == ("the cone rolls", 3, "fast")
    assert marks.shown(cone.data.shape_keys) == take and len(marks.takes(cone.data.shape_keys)[take]) == 6


def add_vertex(cone) -> None:
    cone.data.vertices.add(1)


def turn_faces(cone) -> None:
    cone.data.flip_normals()


def enter_edit_mode(cone) -> None:
    bpy.context.view_layer.objects.active = cone
    bpy.ops.object.mode_set(mode="EDIT")


def delete(cone) -> None:
    bpy.data.objects.remove(cone)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (add_vertex, "topology_changed"),
        (turn_faces, "topology_changed"),
        (enter_edit_mode, "in_edit_mode"),
        (delete, "object_missing"),
    ],
)
def test_changed_meanwhile(kit, cone, change, code) -> None:
    other = kit.make_cone("Other")
    seen = capture.snapshot([other, cone])
    change(cone)
    before = kit.everything()
    with pytest.raises(InputError) as caught:
        apply.shape_keys(seen, kit.wave(seen.vertices))
    assert caught.value.code == code and "'Cone'" in caught.value.message and caught.value.action
    assert kit.everything() == before  # the other object neither


@pytest.mark.parametrize("vertices", [np.zeros((4, 5, 3)), np.zeros((26, 3)), np.full((4, 13, 3), np.nan)])
def test_bad_results(kit, cone, vertices) -> None:
    seen, before = capture.snapshot([cone]), kit.everything()
    with pytest.raises(ServerError) as caught:
        apply.shape_keys(seen, Result({}, {"vertices": vertices.astype(np.float32)}))
    assert caught.value.code == "bad_result" and kit.everything() == before


def test_large_mesh(kit) -> None:
    grid = kit.make_grid(300)
    seen = capture.snapshot([grid])
    result = kit.wave(seen.vertices, 16)
    apply.shape_keys(seen, result)
    assert_moves_as(kit, seen, result, [grid])


@pytest.mark.parametrize("case", ["plain", "two objects", "own action"])
def test_takes_side_by_side(kit, cone, case) -> None:
    """Three results on the same objects: each as an action of its own, one at a time, and each gone without trace."""
    from track4d_addon import marks

    objects = [cone, kit.make_cone("Second")] if case == "two objects" else [cone]
    smile = give_keys(cone) if case == "own action" else None
    seen = capture.snapshot(objects)
    if smile:
        smile.keyframe_insert("value", frame=3)
    before = kit.everything()
    results = {f"take {n}": kit.wave(seen.vertices, 4 + n, f"way {n}") for n in range(3)}
    for take, result in results.items():
        made = apply.shape_keys(seen, result, take=take)
        assert made["take"] == take
        assert_moves_as(kit, seen, result, objects)
    keys = cone.data.shape_keys
    if not smile:
        assert sorted(action.name for action in bpy.data.actions) == ["Track4D: way 0", "Track4D: way 1", "Track4D: way 2"]
        assert all(action.users for action in bpy.data.actions), "Blender would drop it on saving"
    for take in ("take 0", "take 2", "take 1"):
        apply.show(objects, take)
        assert marks.shown(keys) == take
        assert_moves_as(kit, seen, results[take], objects)
    apply.shape_keys(seen, results["take 0"], take="take 1")  # the same take again replaces it alone
    assert list(marks.history(cone)) == ["take 0", "take 2", "take 1"]
    assert_moves_as(kit, seen, results["take 0"], objects)
    assert apply.remove(objects, "take 1") == len(objects)
    assert marks.shown(keys) == "take 2"
    assert_moves_as(kit, seen, results["take 2"], objects)
    assert len(keys.key_blocks) == (3 if smile else 1) + 4 + 6
    assert apply.remove(objects, "no such take") == 0
    apply.remove(objects)
    bpy.context.scene.frame_set(before["Scene"][7])
    assert kit.everything() == before and marks.MARK not in cone


# Other kinds of output


def with_gaussians(result: Result, count: int = 30) -> Result:
    """The result with Gaussians that ride on its first vertices."""
    frames, vertices = result.arrays["vertices"].shape[:2]
    rng = np.random.default_rng(0)
    quats = rng.normal(size=(frames, count, 4))
    result.arrays |= {
        "gaussian_means": result.arrays["vertices"][:, np.arange(count) % vertices],
        "gaussian_quats": (quats / np.linalg.norm(quats, axis=-1, keepdims=True)).astype(np.float32),
        "gaussian_scales": rng.uniform(0.01, 0.05, (count, 3)).astype(np.float32),
        "gaussian_opacities": rng.uniform(0.2, 1, count).astype(np.float32),
        "gaussian_colors": rng.uniform(0, 1, (count, 3)).astype(np.float32),
    }
    return result


@pytest.fixture
def saved(tmp_path):
    """The open scene as a file, for what lies beside it."""
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "scene.blend"))
    return tmp_path


def files_of(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and path.suffix == ".pc2")


@pytest.mark.parametrize("scale", [(1, 1, 1), (-1, 2, 0.5)])
def test_mesh_cache(kit, saved, scale) -> None:
    objects = [kit.make_cone("One"), kit.make_cone("Two", sides=7)]
    objects[1].scale, objects[1].location, objects[1].rotation_euler = scale, (3, 2, 1), Euler((0.3, 0.4, 0.7))
    give_keys(objects[0])
    twist = objects[1].modifiers.new("Twist", "SIMPLE_DEFORM")
    twist.deform_method, twist.angle = "TWIST", 0.0
    objects[1].modifiers.new("Smooth", "SUBSURF").show_viewport = False
    seen = capture.snapshot(objects)
    bpy.context.view_layer.update()
    before = kit.everything()
    result = kit.wave(seen.vertices, 9)
    made = apply.apply(seen, result, "mesh_cache", frame_start=4, step=2.0)
    assert_moves_as(kit, seen, result, objects, 4, 2.0, tolerance=1e-5)
    assert (made["frame_start"], made["frame_end"]) == (4, 20) and sorted(made["files"]) == files_of(saved)
    assert len(made["files"]) == 2 and [m.name for m in objects[1].modifiers] == ["Track4D", "Twist", "Smooth"]
    assert np.allclose(capture.snapshot(objects).vertices, seen.vertices, atol=1e-6)  # a second capture doesn't see it
    np.testing.assert_allclose(kit.world_positions(objects, 60), kit.world_positions(objects, 20), atol=1e-6)
    bpy.ops.wm.save_mainfile()
    assert apply.remove(objects) == 2
    bpy.context.scene.frame_set(before["Scene"][7])
    assert kit.everything() == before and not files_of(saved) and not (saved / "track4d_cache").exists()


def test_a_copy_keeps_the_cache_that_it_plays(kit, saved, cone) -> None:
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices)
    apply.apply(seen, result, "mesh_cache")
    copy = cone.copy()
    copy.data = cone.data.copy()
    bpy.context.scene.collection.objects.link(copy)
    apply.remove([cone])
    assert len(files_of(saved)) == 1
    assert_moves_as(kit, seen, result, [copy], tolerance=1e-5)
    apply.remove([copy])
    assert not files_of(saved)


def test_a_cache_needs_a_saved_file(kit, cone) -> None:
    seen, before = capture.snapshot([cone]), kit.everything()
    for kind in ("mesh_cache", "all"):
        with pytest.raises(InputError) as caught:
            apply.apply(seen, with_gaussians(kit.wave(seen.vertices)), kind)
        assert caught.value.code == "unsaved_file" and kit.everything() == before


def test_gaussian_cloud_stands_in_the_object_and_goes_along(kit, cone) -> None:
    from track4d_addon.apply.gaussian_cloud import read_cloud

    cone.location, cone.rotation_euler, cone.scale = (5, 4, 3), Euler((0.2, 0.1, 2.0)), (1, 2, 0.5)
    bpy.context.view_layer.update()
    seen = capture.snapshot([cone])
    before = kit.everything()
    result = with_gaussians(kit.wave(seen.vertices))
    cone.location.x += 10  # while the job ran
    made = apply.apply(seen, result, "gaussian_cloud")
    cloud = bpy.data.objects[made["cloud"]]
    bpy.context.view_layer.update()
    splats = read_cloud(cloud)
    assert splats.means.shape == (6, 30, 3) and cloud.parent == cone and cone.data.shape_keys is None
    np.testing.assert_allclose(splats.means, kit.to_world(seen, result.arrays["gaussian_means"]) + [10, 0, 0], atol=1e-5)
    np.testing.assert_allclose(splats.colors(3, direction=[1, 0, 0]), result.arrays["gaussian_colors"], atol=1e-5)
    cone.location.z += 1
    bpy.context.view_layer.update()
    np.testing.assert_allclose(read_cloud(cloud).means - splats.means, np.broadcast_to([0, 0, 1], (6, 30, 3)), atol=1e-5)
    with pytest.raises(InputError) as caught:
        capture.snapshot([cloud])
    assert caught.value.code == "wrong_object_type"
    apply.remove([cone])
    cone.location = (5, 4, 3)
    bpy.context.view_layer.update()
    assert kit.everything() == before
    apply.apply(seen, result, "gaussian_cloud")
    assert apply.remove([child for child in cone.children]) == 1 and not cone.children


def test_all_kinds_at_once(kit, saved, cone) -> None:
    seen, before = capture.snapshot([cone]), kit.everything()
    result = with_gaussians(kit.wave(seen.vertices))
    made = apply.apply(seen, result, "all")
    assert {"keys", "action", "cloud", "files"} <= made.keys() and len(cone.data.shape_keys.key_blocks) == 7
    assert_moves_as(kit, seen, result, [cone])
    cone.modifiers["Track4D"].show_viewport = True  # either of them alone moves the mesh
    for block in cone.data.shape_keys.key_blocks[1:]:
        block.mute = True
    assert_moves_as(kit, seen, result, [cone])
    apply.remove([cone])
    bpy.context.scene.frame_set(before["Scene"][7])
    assert kit.everything() == before and not files_of(saved)


def test_takes_of_different_kinds_side_by_side(kit, saved, cone) -> None:
    seen, before = capture.snapshot([cone]), kit.everything()
    results = {name: with_gaussians(kit.wave(seen.vertices, 3 + n)) for n, name in enumerate(("keys", "cache", "cloud"))}
    still = Result({}, {"vertices": np.repeat(seen.vertices[None], 3, 0)})
    for (name, result), kind in zip(results.items(), ("shape_keys", "mesh_cache", "gaussian_cloud")):
        apply.apply(seen, result, kind, take=name)
    (cloud,) = cone.children
    for shown in ("cache", "keys", "cloud", "keys", "cache"):
        apply.show([cone], shown)
        assert_moves_as(kit, seen, still if shown == "cloud" else results[shown], [cone])
        assert cloud.hide_viewport == cloud.hide_render == (shown != "cloud")
    apply.remove([cone], "cache")
    assert not files_of(saved) and not cloud.hide_viewport  # the last one that is left
    with pytest.raises(ServerError) as caught:
        apply.apply(seen, kit.wave(seen.vertices), "gaussian_cloud")
    assert caught.value.code == "no_gaussians"
    apply.remove([cone])
    bpy.context.scene.frame_set(before["Scene"][7])
    assert kit.everything() == before


# In slices


@pytest.fixture
def one_key_a_slice(monkeypatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 0.0)


def pauses(work) -> int:
    """Advances work until a key is there; how often it has paused."""
    for count, _ in enumerate(work, 1):
        if any(len(keys.key_blocks) > 3 for keys in bpy.data.shape_keys):
            return count
    raise AssertionError("it didn't pause between keys")


def test_slices_make_what_one_go_makes(kit, one_key_a_slice) -> None:
    cones = [kit.make_cone("One"), kit.make_cone("Two")]
    seen = capture.snapshot(cones)
    result = kit.wave(seen.vertices, 6)
    made = apply.apply(seen, result, take="take")
    places = [kit.world_positions(cones, frame) for frame in (1, 2.5, 6)]
    remembered = [marks.history(cone) for cone in cones]
    apply.remove(cones)
    bpy.context.scene.frame_set(1)
    work, count = apply.apply_steps(seen, result, take="take"), 0
    while True:
        try:
            next(work)
            count += 1
            assert np.array_equal(kit.world_positions(cones), seen_world(kit, seen)), "nothing moves before all is there"
        except StopIteration as end:
            assert end.value == made
            break
    assert count >= 12, "a pause after each key"
    assert all(np.array_equal(kit.world_positions(cones, frame), place) for frame, place in zip((1, 2.5, 6), places))
    assert [marks.history(cone) for cone in cones] == remembered


def seen_world(kit, seen) -> np.ndarray:
    return kit.world_positions(capture.find_objects(seen))


def test_what_is_closed_in_the_middle_leaves_nothing(kit, cone, one_key_a_slice, tmp_path) -> None:
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "cone.blend"))
    seen = capture.snapshot([cone])
    first, second = kit.wave(seen.vertices, 4), with_gaussians(kit.wave(seen.vertices, 6, "it jumps"))
    for earlier in (False, True):
        if earlier:
            apply.apply(seen, first, take="first")
        before = kit.everything()
        work = apply.apply_steps(seen, second, "all", take="second")
        for _ in work:
            keys = cone.data.shape_keys
            if keys and len(marks.takes(keys).get("second", ())) > 2:
                break
        work.close()
        assert kit.everything() == before
        assert not list((tmp_path / "track4d_cache").glob("*")), "no cache file stays"


def test_the_user_may_do_anything_in_a_pause(kit, cone, one_key_a_slice, tmp_path) -> None:
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices, 6)
    bare = kit.mesh_hash(cone.data)

    work = apply.apply_steps(seen, result, take="take")  # save, and take keys away
    pauses(work)
    live_motion._sweep()  # what a save, an undo and a loaded file call
    assert cone.data.shape_keys is None and kit.mesh_hash(cone.data) == bare
    pauses(work)
    cone.shape_key_remove(cone.data.shape_keys.key_blocks["f0001"])
    copy = cone.copy()
    copy.data = cone.data.copy()
    bpy.context.scene.collection.objects.link(copy)
    slices.finished(work)
    assert [block.name for block in cone.data.shape_keys.key_blocks] == ["Basis"] + [f"f{k:04d}" for k in range(1, 7)]
    assert copy.data.shape_keys is None, "a duplicate of what was unfinished has nothing of it"
    apply.remove([cone])
    bpy.data.meshes.remove(copy.data)

    work = apply.apply_steps(seen, result, take="take")  # edit, and change the mesh
    pauses(work)
    bpy.context.view_layer.objects.active = cone
    bpy.ops.object.mode_set(mode="EDIT")
    for _ in range(3):
        next(work)
    bpy.ops.object.mode_set(mode="OBJECT")
    slices.finished(work)
    assert len(cone.data.shape_keys.key_blocks) == 7, "it has waited"
    apply.remove([cone])
    work = apply.apply_steps(seen, result, take="take")
    pauses(work)
    bpy.ops.object.mode_set(mode="EDIT")
    work.close()
    bpy.ops.object.mode_set(mode="OBJECT")
    assert cone.data.shape_keys is None, "also while it is edited a cancel leaves nothing"
    work = apply.apply_steps(seen, result, take="take")
    pauses(work)
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.mesh.select_all(action="SELECT")
    bpy.ops.mesh.duplicate()
    bpy.ops.object.mode_set(mode="OBJECT")
    with pytest.raises(InputError, match="topology_changed"):
        slices.finished(work)
    assert cone.data.shape_keys is None

    other = kit.make_cone("Other")  # delete
    seen = capture.snapshot([other])
    work = apply.apply_steps(seen, kit.wave(seen.vertices, 6), take="take")
    pauses(work)
    bpy.data.objects.remove(other)
    with pytest.raises(InputError, match="object_missing"):
        slices.finished(work)
    assert not bpy.data.actions and not any("unfinished" in marks.read(keys) for keys in bpy.data.shape_keys)
