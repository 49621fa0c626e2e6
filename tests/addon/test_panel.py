"""The tab: what it draws, what its buttons do, and several results on one object, against a real server."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bpy
import numpy as np
import pytest
from track4d_addon import (
    capture,
    image_sequences,
    jobs,
    marks,
    orders,
    panels,
    prompts,
    properties,
    results,
    slices,
    sources,
    turns,
)
from track4d_addon.local_setup import Status
from track4d_protocol.errors import InputError
from track4d_protocol.messages import MODELS, PRESETS, Settings
from track4d_protocol.space import canonical_similarity, orbit_viewmats

ROOT = Path(__file__).resolve().parents[2]
ICONS = set(bpy.types.UILayout.bl_rna.functions["label"].parameters["icon"].enum_items.keys())


class Layout:
    """A `UILayout` that writes down what is drawn, and refuses operators and properties that don't exist."""

    def __init__(self, log: list | None = None) -> None:
        self.log = [] if log is None else log

    def _part(self, **_) -> "Layout":
        return Layout(self.log)

    row = column = box = split = _part

    def _note(self, text: str, icon: str) -> None:
        assert icon in ICONS, icon
        self.log.append(text)

    def label(self, text: str = "", icon: str = "NONE", **_) -> None:
        self._note(text, icon)

    def operator(self, name: str, text: str | None = None, icon: str = "NONE", **_):
        operator = getattr(getattr(bpy.ops, name.split(".")[0]), name.split(".")[1])
        rna = operator.get_rna_type()
        self._note(f"[{rna.name if text is None else text}]", icon)
        return Values(rna)

    def operator_menu_enum(self, name: str, prop: str, icon: str = "NONE") -> None:
        rna = getattr(getattr(bpy.ops, name.split(".")[0]), name.split(".")[1]).get_rna_type()
        assert rna.properties[prop].type == "ENUM"
        self._note(f"[{rna.name}]", icon)

    def prop(self, owner, name: str, text: str | None = None, **_) -> None:
        label = owner.bl_rna.properties[name].name
        self.log.append(f"({label if text is None else text})")

    def prop_search(self, owner, name: str, data, collection: str) -> None:
        assert collection in data.bl_rna.properties
        self.prop(owner, name)

    def menu(self, name: str, text: str = "", icon: str = "NONE") -> None:
        assert hasattr(bpy.types, name)
        self._note(f"[{name}]", icon)

    def progress(self, factor: float, text: str) -> None:
        assert 0 <= factor <= 1
        self.log.append(text)

    def template_icon(self, icon_value: int, scale: float) -> None:
        assert icon_value and scale > 0


class Values:
    """The properties of a drawn button."""

    def __init__(self, rna) -> None:
        object.__setattr__(self, "rna", rna)

    def __setattr__(self, name: str, value) -> None:
        prop = self.rna.properties[name]
        assert prop.type != "ENUM" or value in prop.enum_items


@pytest.fixture
def addon(empty_scene, monkeypatch, tmp_path):
    """The extension switched on in this process."""
    import track4d_addon

    bpy.context.preferences.addons.new().module = "track4d_addon"
    monkeypatch.setenv("TRACK4D_HOME", str(tmp_path / "no server"))
    monkeypatch.setattr(prompts, "_path", lambda: tmp_path / "prompts.json")
    monkeypatch.setattr(prompts, "_prompts", None)
    monkeypatch.setattr(orders, "folder", lambda: tmp_path)
    for module in (capture, sources):  # with one sample it is quick
        render = module.render_view
        monkeypatch.setattr(module, "render_view", lambda *values, _render=render: _render(*values[:-1], 1))
    track4d_addon.register()
    yield
    track4d_addon.unregister()


@pytest.fixture
def connected(addon, server):
    """The extension with a real server whose work is a wave."""
    chosen = bpy.context.preferences.addons["track4d_addon"].preferences
    chosen.connection_file, chosen.server = str(server.connection), "FILE"
    return server


def drawn(obj=None, state=None) -> list[str]:
    """All that the tab shows."""
    layout = Layout()
    context = SimpleNamespace(scene=bpy.context.scene, object=obj, region=SimpleNamespace(width=320))
    panels.draw_main(layout, context, state or jobs.state)
    panels.draw_settings(layout, context)
    panels.draw_lights(layout, context)
    return layout.log


def pump(done, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, (jobs.state.problem, jobs.state.active)
        time.sleep(min(jobs.tick(), 0.05))


def idle() -> bool:
    return not jobs.state.active


@pytest.fixture
def cone(kit):
    obj = kit.make_cone()
    choose(obj)
    return obj


def choose(obj) -> None:
    for other in bpy.context.scene.collection.objects:
        other.select_set(other == obj)
    bpy.context.view_layer.objects.active = obj


# What is drawn


@pytest.mark.parametrize("source", ["PROMPT", "VIDEO", "OBJECT"])
def test_every_part_can_be_drawn(addon, cone, source) -> None:
    bpy.context.scene.track4d.source = source
    job = jobs.ActiveJob("1", "it rolls", ["Cone"], step=3, total=16, stage="fit", seconds_left=12.0, phase=jobs.Phase.RUNNING)
    state = jobs.State(
        server=turns.link.Server.CONNECTED, hello={"device": "CPU"}, active={"1": job},
        finished={"2": jobs.FinishedJob("2", "it rolls", ["Cone"]), "3": jobs.FinishedJob("3", "it rolls", ["gone"])},
        problem=jobs.Problem("worker_died", "The worker died.", "Use the preset 'fast'."),
        warnings=[jobs.Problem("note", "A note.", "Nothing to do.")],
    )  # fmt: skip
    found = drawn(cone, state)
    assert "Fitting the motion, 3 of 16, 12 s left" in found
    buttons = {"Animate", "3 Variations", "Cancel", "Choose a Smaller Preset", "Open the Log", "Copy Report", "Apply"}
    assert {f"[{button}]" for button in buttons} <= set(found)
    assert any("[worker_died]" in text for text in found), "the code belongs to the sentence"
    wanted = {"PROMPT": "[VIEW3D_MT_track4d_prompts]", "VIDEO": "(Left)", "OBJECT": "(Moves As)"}
    assert [name for name, text in wanted.items() if text in found] == [source]
    assert drawn(None, jobs.State())


@pytest.mark.parametrize("setup", [Status(), Status("installing", "Making the environment", 1),
                                   Status("interrupted", "The set-up was interrupted.", 2),
                                   Status("ready", "The server is installed.", 3, version="1.2")])  # fmt: skip
def test_the_preferences_can_be_drawn_and_nothing_is_cut(addon, monkeypatch, setup) -> None:
    chosen = bpy.context.preferences.addons["track4d_addon"].preferences
    monkeypatch.setattr(jobs.state, "setup", setup)
    for server in ("LOCAL", "FILE"):
        part = SimpleNamespace(layout=Layout(), server=server, bl_rna=chosen.bl_rna, server_home=chosen.server_home)
        type(chosen).draw(part, SimpleNamespace(region=SimpleNamespace(width=480)))
        assert f"({'Connection File' if server == 'FILE' else 'Server Folder'})" in part.layout.log
        assert all(len(text) < 75 for text in part.layout.log if " " in text), "a line of 480 pixels"


def test_every_button_that_fixes_exists(addon) -> None:
    for code, (operator, text, values) in panels.FIXES.items():
        button = Layout().operator(operator, text)
        for name, value in values.items():
            setattr(button, name, value)
        assert code in (ROOT / "docs" / "errors.md").read_text(), f"no error has the code {code}"


def test_registering_loads_only_what_the_tab_draws() -> None:
    """Captures, outputs, ZeroMQ and (where Blender hasn't loaded it) numpy come with the first click."""
    code = """
import os, sys, bpy
before = set(sys.modules)
import track4d_addon
track4d_addon.register()
print(" ".join(name for name in set(sys.modules) - before), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "track4d_addon.panels" in loaded
    assert not loaded & {"numpy", "zmq", "msgpack", "track4d_addon.capture", "track4d_addon.apply", "track4d_addon.lighting"}


def test_the_length_is_told_at_the_scenes_rate(addon) -> None:
    scene = bpy.context.scene
    scene.render.fps, scene.track4d.frames, scene.frame_start = 12, 30, 5
    assert "2.50 s from frame 5" in drawn()


def test_choices_are_those_of_the_protocol(addon) -> None:
    from track4d_addon import apply, lighting

    assert tuple(item[0] for item in properties.PRESETS) == PRESETS
    assert tuple(item[0] for item in properties.MODELS) == MODELS
    assert tuple(item[0] for item in properties.OUTPUTS) == apply.KINDS
    strengths = bpy.context.scene.track4d.lights.strengths()
    assert strengths == pytest.approx({name: lamp.strength for name, lamp in lighting.RIG.items()})


# Settings and prompts


def test_settings_come_back_from_what_a_result_remembers(addon, cone) -> None:
    settings = bpy.context.scene.track4d
    settings.prompt, settings.seed, settings.strength, settings.loop, settings.output = " it rolls ", 7, 1.5, True, "all"
    settings.source_object, settings.model = cone, "published"
    kept = settings.to_dict()
    message = settings.to_message()
    assert message.model == "published"
    assert (message.prompt, message.seed, message.strength, message.loop, message.task) == ("it rolls", 7, 1.5, True, "animate")
    for name in ("prompt", "seed", "strength", "loop", "output", "model"):
        settings.property_unset(name)
    settings.source_object = None
    settings.use(kept)
    assert settings.to_dict() == kept
    settings.use({"preset": "no such preset", "prompt": "it flies"})
    assert settings.preset == "default" and settings.prompt == "it flies" and settings.source_object is None


def test_recent_prompts_are_kept_over_files(addon, monkeypatch) -> None:
    for prompt in ("it rolls", "it flies", " it rolls ", ""):
        prompts.add(prompt)
    monkeypatch.setattr(prompts, "_prompts", None)
    assert prompts.recent() == ["it rolls", "it flies"]
    bpy.ops.track4d.use_prompt(prompt=prompts.recent()[1])
    assert bpy.context.scene.track4d.prompt == "it flies"
    prompts._path().write_text("not JSON")
    monkeypatch.setattr(prompts, "_prompts", None)
    assert prompts.recent() == []


# Fixes


def test_a_curve_is_refused_with_a_button_that_converts_it(connected, kit) -> None:
    curve = bpy.data.objects.new("Wire", bpy.data.curves.new("Wire", "CURVE"))
    bpy.context.scene.collection.objects.link(curve)
    line = curve.data.splines.new("POLY")
    line.points.add(3)
    curve.data.bevel_depth = 0.2
    for number, point in enumerate(line.points):
        point.co = (number, 0, 0, 1)
    choose(curve)
    bpy.context.scene.track4d.prompt = "it bends"
    assert bpy.ops.track4d.animate() == {"CANCELLED"}
    assert jobs.state.problem.code == "wrong_object_type" and "[Convert to Mesh]" in drawn(curve)
    assert bpy.ops.track4d.convert_to_mesh() == {"FINISHED"} and jobs.state.problem is None
    assert bpy.context.object.type == "MESH"
    assert bpy.ops.track4d.animate() == {"FINISHED"}
    assert not bpy.ops.track4d.convert_to_mesh.poll()


def test_what_is_linked_is_refused_with_a_button_that_makes_it_local(connected, cone, tmp_path) -> None:
    library = tmp_path / "library.blend"
    bpy.data.libraries.write(str(library), {cone})
    with bpy.data.libraries.load(str(library), link=True) as (_, chosen):
        chosen.objects = ["Cone"]
    (linked,) = chosen.objects
    bpy.context.scene.collection.objects.link(linked)
    choose(linked)
    bpy.context.scene.track4d.prompt = "it rolls"
    assert bpy.ops.track4d.animate() == {"CANCELLED"}
    assert jobs.state.problem.code == "linked_data" and "[Make Local]" in drawn(linked)
    operator, _, values = panels.FIXES["linked_data"]
    group, name = operator.split(".")
    getattr(getattr(bpy.ops, group), name)(**values)
    local = bpy.context.object
    assert local != cone and not local.library and not local.data.library
    assert bpy.ops.track4d.animate() == {"FINISHED"}


def test_an_error_that_nobody_foresaw_is_told_and_the_tab_is_idle(connected, cone, monkeypatch) -> None:
    def fail(*_) -> None:
        raise MemoryError("no room for the picture")

    monkeypatch.setattr(capture, "render_view", fail)
    bpy.context.scene.track4d.prompt = "it rolls"
    bpy.ops.track4d.animate()
    pump(idle)
    problem = jobs.state.problem
    assert problem.code == "work_failed" and "Cone" in problem.message and "no room for the picture" in problem.message
    assert "[Animate]" in drawn(cone) and not turns.tasks
    assert [scene.name for scene in bpy.data.scenes] == [bpy.context.scene.name]


@pytest.mark.parametrize("scale, wanted", [((2, -2, 0), (2, -2, 2)), ((0, 3, 0), (3, 3, 3)), ((0, 0, 0), (1, 1, 1)),
                                           ((-1, 2, 3), (-1, 2, 3))])  # fmt: skip
def test_a_flat_object_gets_its_thickness_back(addon, cone, kit, scale, wanted) -> None:
    """Applying a scale of zero would flatten the mesh for good."""
    before = kit.world_positions([cone])
    cone.scale = scale
    bpy.context.view_layer.update()
    if 0 in scale:
        with pytest.raises(InputError) as caught:
            capture.snapshot([cone])
        assert caught.value.code == "flat_transform"
    bpy.ops.track4d.apply_scale()
    assert tuple(cone.scale) == (1, 1, 1)
    np.testing.assert_allclose(kit.world_positions([cone]), before * wanted, atol=1e-6)
    assert len(capture.snapshot([cone]).vertices) == len(before)


def test_a_flat_parent_gets_its_thickness_back(addon, cone, kit) -> None:
    before = kit.world_positions([cone])
    cone.parent = parent = bpy.data.objects.new("Flat", None)
    bpy.context.scene.collection.objects.link(parent)
    parent.scale, cone.delta_scale = (2, 0, 2), (1, 1, 0)
    bpy.ops.track4d.apply_scale()
    np.testing.assert_allclose(kit.world_positions([cone]), 2 * before, atol=1e-6)


def test_the_other_fixes(addon, cone) -> None:
    settings = bpy.context.scene.track4d
    settings.preset = "fine"
    bpy.ops.track4d.smaller_preset()
    bpy.ops.track4d.smaller_preset()
    assert settings.preset == "fast" and not bpy.ops.track4d.smaller_preset.poll()
    assert bpy.ops.track4d.open_log() == {"CANCELLED"}


def test_the_report_has_what_a_developer_asks_for(addon, cone) -> None:
    from track4d_addon.operators.fixes import log_path
    from track4d_addon.operators.report import LOG_LINES, problem_report

    bpy.context.scene.track4d.prompt = "it rolls"
    jobs.state.hello = {"device": "a very fast card", "model": "shipped"}
    jobs.complain(InputError("bad_thing", "A thing is bad.", "Make it good."))
    log = log_path(bpy.context)
    log.parent.mkdir(parents=True)
    log.write_text("\n".join(f"line {n}" for n in range(500)))
    report = problem_report(bpy.context)
    for text in ("Track4D 0", bpy.app.version_string, "a very fast card", "it rolls", "[bad_thing]", "24 frames per second"):
        assert text in report
    assert report.splitlines()[-LOG_LINES:] == [f"line {n}" for n in range(500 - LOG_LINES, 500)]


# Results side by side


def test_three_variations_share_one_capture_and_lie_side_by_side(connected, cone, kit, monkeypatch) -> None:
    views = []
    original = capture.render_view
    monkeypatch.setattr(capture, "render_view", lambda *values: views.append(1) or original(*values))
    settings = bpy.context.scene.track4d
    settings.prompt, settings.seed, settings.frames, settings.keep_root = "it rolls", 5, 6, True
    bpy.ops.track4d.animate(variations=3)
    assert len(jobs.state.active) == 3 and drawn(cone).count("[Cancel]") == 3
    pump(idle)
    assert len(views) == 4
    records = marks.history(cone)
    assert sorted(record["seed"] for record in records.values()) == [5, 6, 7]
    assert len(bpy.data.actions) == 3 and all(action.users for action in bpy.data.actions)
    first = next(iter(records))
    assert results.shown_take(cone) == first, "the first result isn't pushed aside by the others"
    record = records[first]
    assert record["settings"]["keep_root"] is True and record["versions"]["blender"] == bpy.app.version_string
    assert prompts.recent() == ["it rolls"]

    moves = {}
    for take in records:
        bpy.ops.track4d.show_take(take=take)
        assert results.shown_take(cone) == take
        moves[take] = kit.world_positions([cone], 3)
        assert cone.data.shape_keys.animation_data.action == marks.action_of(take)
    found = drawn(cone)
    assert {"seed 5: it rolls", "seed 6: it rolls", "seed 7: it rolls"} <= {text.strip("[]") for text in found}
    assert "Cone moves, frames 1 to 6" in found and "[Play]" in found
    monkeypatch.setattr(jobs.state, "playing", True)
    assert "[Stop]" in drawn(cone)
    jobs.tick()
    assert "[Play]" in drawn(cone), "nothing plays in a Blender without a window"

    settings.prompt, settings.seed, settings.keep_root, settings.frames = "other", 0, False, 20
    bpy.ops.track4d.use_settings(take=first)
    assert (settings.prompt, settings.seed, settings.keep_root, settings.frames) == ("it rolls", 5, True, 6)
    settings.prompt = "other"
    bpy.ops.track4d.again(take=first)
    pump(idle)
    assert [record["seed"] for record in marks.history(cone).values()][-1] == 8
    newest = list(marks.history(cone))[-1]
    assert results.shown_take(cone) == newest, "what was asked for alone is shown"
    settings.prompt, settings.seed = "it rolls", 4
    bpy.ops.track4d.animate(variations=2)
    assert [job.order.settings["seed"] for job in jobs.state.active.values()] == [4, 9], "5 to 8 are there already"
    for job in list(jobs.state.active):
        bpy.ops.track4d.cancel(job_id=job)

    copy = cone.copy()
    copy.data = cone.data.copy()
    bpy.context.scene.collection.objects.link(copy)
    for take in list(marks.history(cone))[:-1]:
        bpy.ops.track4d.remove_take(take=take)
    assert list(marks.history(cone)) == [newest] and len(cone.data.shape_keys.key_blocks) == 7
    assert len(marks.history(copy)) == 4, "a copy goes its own ways"
    bpy.ops.track4d.remove_animation()
    assert not marks.history(cone) and cone.data.shape_keys is None


def test_one_of_three_can_be_cancelled_while_the_object_is_photographed(connected, cone) -> None:
    bpy.context.scene.track4d.prompt = "it rolls"
    bpy.ops.track4d.animate(variations=3)
    jobs.tick()
    first, second, third = jobs.state.active
    bpy.ops.track4d.cancel(job_id=second)
    pump(idle)
    assert set(marks.history(cone)) == {first, third}
    bpy.ops.track4d.animate(variations=2)
    jobs.tick()
    for job in list(jobs.state.active):
        bpy.ops.track4d.cancel(job_id=job)
    assert not turns.tasks and not [scene for scene in bpy.data.scenes if scene.name.startswith(".")]


def test_a_result_in_another_form(connected, cone, tmp_path) -> None:
    """It is fetched from the server once more; a mesh cache wants a saved file and says so."""
    bpy.context.scene.track4d.prompt = "it rolls"
    bpy.ops.track4d.animate()
    pump(idle)
    (take,) = marks.history(cone)
    assert bpy.ops.track4d.output_as(output="mesh_cache") == {"CANCELLED"}
    assert jobs.state.problem.code == "unsaved_file" and "[Save the File]" in drawn(cone)
    bpy.ops.wm.save_as_mainfile(filepath=str(tmp_path / "cone.blend"))
    bpy.ops.track4d.output_as(output="mesh_cache")
    pump(idle)
    assert list(marks.caches(cone)) == [take] and cone.data.shape_keys is None
    record = marks.history(cone)[take]
    assert record["settings"]["output"] == "mesh_cache" and results.shown_take(cone) == take
    bpy.ops.track4d.output_as(output="gaussian_cloud")
    pump(idle)
    assert jobs.state.problem.code == "no_gaussians", "the tiny work makes none"
    bpy.ops.track4d.remove_animation()
    assert not cone.modifiers and not marks.history(cone)


def test_a_cloud_shows_the_history_of_its_object(addon, cone, kit) -> None:
    settings = bpy.context.scene.track4d
    camera = bpy.data.objects.new("Camera", bpy.data.cameras.new("Camera"))
    bpy.context.scene.collection.objects.link(camera)
    bpy.context.scene.camera = camera  # looks down
    settings.prompt, settings.output, settings.cloud_colors = "it rolls", "gaussian_cloud", "FIXED"
    bpy.context.view_layer.update()
    seen = capture.snapshot([cone])
    result = kit.wave(seen.vertices, 4)
    count = 50
    sh = np.zeros((count, 4, 1, 3), np.float32)
    sh[:, 2] = 1.0  # brighter along +Z
    result.arrays |= {
        "gaussian_means": np.zeros((4, count, 3), np.float32),
        "gaussian_quats": np.tile(np.float32([1, 0, 0, 0]), (4, count, 1)),
        "gaussian_scales": np.full((count, 3), 0.1, np.float32),
        "gaussian_opacities": np.ones(count, np.float32),
        "gaussian_colors": np.full((count, 3), 0.5, np.float32),
        "gaussian_sh": sh,
    }
    made = slices.finished(results.put("take", seen, result, jobs.Order(settings.to_dict(), ""), "shipped"))
    cloud = bpy.data.objects[made["cloud"]]
    color = cloud.data.attributes["sh_0_0"].data[0].vector[0]
    assert color < -0.4, "seen from above, looking along -Z, it is dark"
    assert results.subject(cloud) == cone and "[seed 3: it rolls]" in drawn(cloud)
    choose(cloud)
    assert results.chosen(bpy.context) == [cone], "the cloud stands for the object it was made for"
    bpy.ops.object.select_all(action="SELECT")
    assert results.chosen(bpy.context).count(cone) == 1
    choose(cone)
    cone.hide_viewport = True
    bpy.context.view_layer.update()
    assert not bpy.context.selected_objects and results.chosen(bpy.context) == [cone], "nobody can click on it"
    assert bpy.ops.track4d.animate.poll() and bpy.ops.track4d.remove_animation.poll()
    cone.hide_viewport = False
    choose(cloud)
    bpy.ops.track4d.use_settings(take="take")
    bpy.ops.track4d.remove_take(take="take")
    assert len(bpy.context.scene.objects) == 2 and not marks.history(cone)


# Pins and sources


def test_pin_group_becomes_an_array_of_the_request(addon, cone, kit) -> None:
    other = kit.make_cone("Other")
    group = cone.vertex_groups.new(name="Feet")
    cone.vertex_groups.new(name="Unused").add([1], 1.0, "REPLACE")
    group.add([0, 12], 0.25, "REPLACE")
    group.add([3], 1.0, "REPLACE")
    seen = capture.snapshot([cone, other])
    settings = bpy.context.scene.track4d
    settings.pin_group, settings.prompt = "Feet", "it rolls"
    begin, total = sources.plan(settings, capture.known_objects([cone, other]))
    assert total == 4
    request = slices.finished(begin(seen))
    wanted = np.zeros(26, np.float32)
    wanted[[0, 3, 12]] = (0.25, 1.0, 0.25)
    np.testing.assert_array_equal(request.arrays["pin"], wanted)
    settings.pin_group = "No such group"
    with pytest.raises(InputError) as caught:
        sources.plan(settings, capture.known_objects([cone, other]))
    assert caught.value.code == "no_vertex_group"


def finished(work, watch=lambda: None):
    while True:
        try:
            progress = next(work)
            assert progress is None or 0 < progress[0] <= progress[1]
            watch()
        except StopIteration as stop:
            return stop.value


def test_the_motion_of_another_object_is_filmed(addon, cone, kit) -> None:
    """It is seen where it is at each moment, by cameras that stand around it as around the target."""
    source = kit.make_cone("Source")
    source.scale, source.location = (3, 3, 3), (10, 20, 30)
    source.rotation_euler.z = 1.0
    for frame, rise in ((11, 30.0), (14, 33.0)):
        source.location.z = rise
        source.keyframe_insert("location", frame=frame)
    squeeze = source.shape_key_add(name="Basis") and source.shape_key_add(name="Squeeze")
    squeeze.points[12].co.y = 1.0  # the tip goes in
    for frame, value in ((11, 0.0), (14, 1.0)):
        squeeze.value = value
        squeeze.keyframe_insert("value", frame=frame)
    bpy.context.scene.frame_set(1)
    parts = sources.parts_of(source, capture.known_objects([cone]))
    assert sources.own_frames(parts) == (11, 14)
    before = kit.everything()

    def unchanged() -> None:
        assert kit.everything() == before

    seen = capture.snapshot([cone])
    request = finished(sources.from_object(seen, Settings(task="fit"), sources.filming(parts), size=32, samples=1), unchanged)
    video = request.arrays["video"]
    assert video.shape == (4, 4, 32, 32, 4)
    masks = video[..., 3] > 127
    height = [np.nonzero(masks[0, frame].any(1))[0].mean() for frame in range(4)]
    assert height[0] - height[3] > 3, "it rises"
    assert masks[1, 0].sum() > 1.2 * masks[1, 3].sum(), "its tip goes in, as seen from the side"
    near = canonical_similarity(seen.vertices).viewmats_to_world(orbit_viewmats())
    shift, orbit = request.arrays["viewmats"][:, :3, 3], near[:, :3, 3]
    assert np.linalg.norm(shift) > np.linalg.norm(orbit), "the cameras step back, so that all of the motion is seen"
    border = np.concatenate([masks[..., 0, :], masks[..., -1, :], masks[..., :, 0], masks[..., :, -1]], -1)
    assert not border.any()


def test_a_source_must_be_another_mesh(addon, cone) -> None:
    known = capture.known_objects([cone])
    for source in (None, cone, bpy.data.objects.new("Empty", None)):
        with pytest.raises(InputError) as caught:
            sources.parts_of(source, known)
        assert caught.value.code == "no_source_object"


def write_sequence(folder: Path, frames: int, color: tuple, size: int = 40) -> Path:
    Image = pytest.importorskip("PIL.Image", reason="Pillow isn't installed")
    folder.mkdir()
    for frame in range(1, frames + 1):
        Image.new("RGB", (size, size), (*color, frame)).save(folder / f"shot{frame}.png")  # no leading zeros: 2 before 10
    return folder / "shot3.png"


def test_videos_of_single_sides(addon, cone, tmp_path) -> None:
    seen = capture.snapshot([cone])
    settings = bpy.context.scene.track4d
    settings.source = "VIDEO"
    with pytest.raises(InputError) as caught:
        settings.views()
    assert caught.value.code == "no_views"
    settings.view_left = str(write_sequence(tmp_path / "left", 12, (9, 0)))
    settings.view_back = str(write_sequence(tmp_path / "back", 12, (200, 0)).parent)
    request = finished(sources.from_files(seen, settings.to_message(), settings.views(), size=32))
    video = request.arrays["video"]
    assert request.settings.task == "fit" and video.shape == (2, 12, 32, 32, 3)
    assert video[:, 0, 16, 16, 0].tolist() == [9, 200]
    assert video[0, :, 16, 16, 2].tolist() == list(range(1, 13)), "in the order of the numbers"
    wanted = canonical_similarity(seen.vertices).viewmats_to_world(orbit_viewmats([90.0, 180.0]))
    np.testing.assert_allclose(request.arrays["viewmats"], wanted, atol=1e-6)
    settings.view_back = str(write_sequence(tmp_path / "short", 5, (0, 0)))
    with pytest.raises(InputError) as caught:
        finished(sources.from_files(seen, settings.to_message(), settings.views()))
    assert caught.value.code == "sizes_differ" and not bpy.data.images


def test_a_folder_of_views_is_read_a_picture_a_turn(addon, cone, kit, tmp_path) -> None:
    for view in range(4):
        write_sequence(tmp_path / f"view_{view}", 3, (9 * view, 0), size=16)
    settings, seen, before, pauses = bpy.context.scene.track4d, capture.snapshot([cone]), kit.everything(), []
    settings.source, settings.view_front = "VIDEO", str(tmp_path)

    def unchanged() -> None:
        pauses.append(kit.everything() == before)

    request = finished(sources.from_files(seen, settings.to_message(), settings.views()), unchanged)
    assert len(pauses) >= 12 and all(pauses)
    video = request.arrays["video"]
    assert video.shape == (4, 3, 16, 16, 3) and video[:, 2, 8, 8].tolist() == [[9 * view, 0, 3] for view in range(4)]


def test_a_film_is_read_by_blender_itself(addon, tmp_path, kit) -> None:
    render = bpy.context.scene.render
    strips = bpy.context.scene.sequence_editor_create()
    strips = strips.strips if hasattr(strips, "strips") else strips.sequences
    extent = {"length": 20} if bpy.app.version >= (5, 0, 0) else {"frame_end": 21}
    strip = strips.new_effect("fade", "COLOR", 1, 1, **extent)
    for frame, grey in ((1, 0.0), (20, 1.0)):
        strip.color = (grey, grey, grey)
        strip.keyframe_insert("color", frame=frame)
    bpy.context.scene.view_settings.view_transform = "Standard"
    render.resolution_x = render.resolution_y = 64
    bpy.context.scene.frame_start, bpy.context.scene.frame_end = 1, 20
    if hasattr(render.image_settings, "media_type"):
        render.image_settings.media_type = "VIDEO"
    render.image_settings.file_format = "FFMPEG"
    render.ffmpeg.format, render.ffmpeg.codec, render.ffmpeg.constant_rate_factor = "MPEG4", "H264", "PERC_LOSSLESS"
    render.filepath = str(tmp_path / "fade.mp4")
    bpy.ops.render.render(animation=True)
    if not (tmp_path / "fade.mp4").is_file():
        pytest.skip("this Blender writes no films")
    before = kit.everything()
    film = image_sequences.film(tmp_path / "fade.mp4")
    assert len(film) == 20
    frames = np.array([image_sequences.read_frame(frame, 32) for frame in film])
    assert frames.shape == (20, 32, 32, 3)
    assert (np.diff(frames[:, 16, 16, 0].astype(int)) > 0).all() and frames[-1, 16, 16, 0] > 240
    assert kit.everything() == before
    (tmp_path / "broken.mp4").write_bytes(b"not a film")
    with pytest.raises(InputError) as caught:
        image_sequences.film(tmp_path / "broken.mp4")
    assert caught.value.code == "unreadable_file"


def test_a_filmed_object_moves_the_chosen_one(connected, cone, kit) -> None:
    source = kit.make_cone("Source")
    for frame, x in ((1, 0.0), (2, 1.0)):
        source.location.x = x
        source.keyframe_insert("location", index=0, frame=frame)
    settings = bpy.context.scene.track4d
    settings.source, settings.source_object, settings.frames = "OBJECT", source, 6
    bpy.ops.track4d.animate()
    pump(idle)
    (record,) = marks.history(cone).values()
    assert record["title"] == "as Source moves" and record["settings"]["source_object"] == "Source"
    assert prompts.recent() == []


# Light


def test_lights_are_added_baked_and_written(addon, cone, tmp_path) -> None:
    import json

    from track4d_addon import lighting

    lights = bpy.context.scene.track4d.lights
    lights.key, lights.samples = 1.25, 1
    assert not bpy.ops.track4d.remove_lights.poll()
    bpy.ops.track4d.add_lights()
    assert len(bpy.data.collections[lighting.LIGHTS].objects) == 4
    bpy.ops.track4d.remove_lights()
    assert lighting.LIGHTS not in bpy.data.collections and not bpy.data.lights
    assert bpy.ops.track4d.write_lit(directory=str(tmp_path)) == {"CANCELLED"} and jobs.state.problem.code == "not_baked"
    lights.keep_rig = True
    bpy.ops.track4d.bake_lights()
    assert lighting.LIGHTS in bpy.data.collections and lighting.baked_colors(cone).max() > 0.1
    assert bpy.ops.track4d.write_lit(directory=str(tmp_path)) == {"FINISHED"}
    manifest = json.loads((tmp_path / "Cone" / "asset.json").read_text())
    assert sorted(light["name"].split()[1] for light in manifest["lights"]) == ["back", "background", "fill", "key"]
    assert manifest["vertices"] == 13
    assert {path.name for path in (tmp_path / "Cone").iterdir()} == {"asset.json", "mesh.glb", "gaussians.ply"}
    assert cone.select_get() and bpy.context.object == cone


def test_the_benchmark_draws_as_the_panel_does(addon) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import panel
    finally:
        sys.path.pop(0)
    for state, obj in panel.states(jobs, marks).values():
        panels.draw_main(panel.Layout(), panel.context(obj), state)
