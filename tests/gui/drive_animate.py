"""What a user does with Track4D, run inside a real Blender window by run.sh: type, press Animate, watch, play, cancel; then
variations, a Gaussian cloud, export and baked light.

The window is touched from outside, as by a hand: a line in /gui/request ("shot name", "click x y", "type words") is
carried out by run.sh, which then removes the file. What is found wrong ends the story with a traceback in /gui/failed.
"""

import importlib
import time
import traceback
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType

import bpy

GUI = Path("/gui")
ADDON = "bl_ext.user_default.track4d"
PROMPT = GUI.joinpath("prompt").read_text().strip()
SECONDS = float(GUI.joinpath("seconds").read_text())  # how long an animation may take
Wait = float | Callable[[], object]


def jobs():
    return importlib.import_module(f"{ADDON}.jobs")


def viewport() -> tuple[bpy.types.Area, bpy.types.Region]:
    area = next(a for a in bpy.context.window_manager.windows[0].screen.areas if a.type == "VIEW_3D")
    return area, next(r for r in area.regions if r.type == "UI")


def ask(request: str) -> Callable[[], bool]:
    """A request to run.sh; the returned function is true when it is done."""
    part = GUI / "request.part"
    part.write_text(request)
    part.rename(GUI / "request")
    return lambda: not (GUI / "request").exists()


def at(below: float, across: float = 0.0) -> str:
    """Screen coordinates `across` of the sidebar's middle, `below` pixels under its top where the server takes two lines."""
    window = bpy.context.window_manager.windows[0]
    _, region = viewport()
    panels = importlib.import_module(f"{ADDON}.panels")
    below += 20 * (sum(len(panels.wrap(text, region.width)) for text, _ in jobs().status(jobs().state)) - 2)
    return f"{region.x + region.width // 2 - 10 + across:.0f} {window.height - (region.y + region.height) + below:.0f}"


def time_ticks() -> dict[str, list[tuple[float, float]]]:
    """What each of the extension's timer ticks holds Blender up for, from now on: wall and CPU milliseconds, by what it did."""
    capture, mesh, turns = (importlib.import_module(f"{ADDON}.{name}") for name in ("capture", "capture.mesh", "turns"))
    spent: dict[str, list[tuple[float, float]]] = {}
    tick, did = turns.tick, []

    def noted(module: ModuleType, name: str, what: str) -> None:
        function = getattr(module, name)
        setattr(module, name, lambda *values: (did.append(what), function(*values))[1])

    def timed() -> float:
        did[:] = [job.phase.name.lower() for job in jobs().state.active.values()][:1] or ["idle"]
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return tick()
        finally:
            times = 1e3 * (time.perf_counter() - wall), 1e3 * (time.thread_time() - cpu)
            spent.setdefault(did[-1], []).append(times)

    noted(capture, "render_view", "a view is rendered")
    noted(mesh, "read_surface", "an object is read")
    noted(mesh, "decode", "an image is decoded")
    noted(mesh, "read_pixels", "an image is read")
    noted(turns, "_push_undo", "Blender keeps an undo step")
    turns.tick = timed
    return spent


def drawings() -> list[float]:
    """When the tab is drawn, from now on; the first window of a new Blender takes its time."""
    panels, times = importlib.import_module(f"{ADDON}.panels"), []
    draw = panels.draw_main
    panels.draw_main = lambda *values: (times.append(time.perf_counter()), draw(*values))
    return times


drawn_sidebars = 0  # counted by Blender's own drawing, from `driver` on


def count_sidebar() -> None:
    global drawn_sidebars
    drawn_sidebars += 1


def redrawn() -> Callable[[], bool]:
    """True when the sidebar was drawn three times more, which takes its time on a busy machine."""
    wanted = drawn_sidebars + 3

    def look() -> bool:
        viewport()[0].tag_redraw()
        return drawn_sidebars >= wanted

    return look


def farthest(obj: bpy.types.Object) -> float:
    """How far a vertex is from rest in this frame."""
    mesh = obj.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
    return max((a.co - b.co).length for a, b in zip(mesh.vertices, obj.data.vertices))


def load() -> bpy.types.Object:
    """The model in the scene, selected, seen from three quarters, lit as in Material Preview."""
    for obj in list(bpy.data.objects):
        if obj.type == "MESH":
            bpy.data.objects.remove(obj)
    model = next(GUI.glob("model.*"), None)
    if model is None:
        bpy.ops.mesh.primitive_monkey_add(calc_uvs=True)
    else:
        bpy.ops.import_scene.gltf(filepath=str(model))
    obj = next(o for o in bpy.data.objects if o.type == "MESH")
    bpy.ops.object.select_all(action="DESELECT")
    obj.select_set(True)
    bpy.context.view_layer.objects.active = obj
    return obj


def open_parts() -> None:
    """The closed parts of the tab once more, open, in a tab "Look" of their own."""
    panels = importlib.import_module(f"{ADDON}.panels")
    for name in ("settings", "export", "lights"):
        closed = getattr(panels, f"VIEW3D_PT_track4d_{name}")
        members = {"bl_idname": f"VIEW3D_PT_look_{name}", "bl_category": "Look", "bl_parent_id": "", "bl_options": set()}
        bpy.utils.register_class(type(f"VIEW3D_PT_look_{name}", (closed,), members))


def settled() -> bool:
    return not jobs().state.active and not jobs().state.setup.busy


def press_animate() -> Generator[Wait, None, None]:
    """Click the button; a slow window sometimes misses a click, so look whether it was taken."""
    for _ in range(4):
        yield ask(f"click {at(127)}")
        yield 3.0
        if jobs().state.active or jobs().state.problem:
            return
    raise AssertionError("the button Animate took no click")


def plays() -> bool:
    return bpy.context.window_manager.windows[0].screen.is_animation_playing


def press_play(wanted: bool) -> Generator[Wait, None, None]:
    """Click the button that starts and stops the animation, until it does."""
    for _ in range(4):
        yield ask(f"click {at(191, across=-60)}")
        yield 2.0
        if plays() is wanted:
            return
    raise AssertionError("the button Play took no click")


def story() -> Generator[Wait, None, None]:
    area, region = viewport()
    space = area.spaces.active
    space.show_region_ui = True
    space.shading.type = "MATERIAL"
    obj = load()
    name = obj.name
    with bpy.context.temp_override(area=area, region=next(r for r in area.regions if r.type == "WINDOW")):
        bpy.ops.view3d.view_selected()
    chosen = bpy.context.preferences.addons[ADDON].preferences
    chosen.connection_file, chosen.server = str(GUI / "connection.json"), "FILE"
    ticks = time_ticks()
    yield 1.0
    region.active_panel_category = "Track4D"
    area.tag_redraw()
    drawn = drawings()
    yield lambda: drawn and jobs().state.server.value == "connected"
    area.tag_redraw()
    yield 2.0
    yield ask("shot 1_ready")

    yield ask(f"doubleclick {at(99)}")
    yield ask(f"type {PROMPT}")
    yield 1.0
    assert bpy.context.scene.track4d.prompt == PROMPT, f"the field holds '{bpy.context.scene.track4d.prompt}'"
    bpy.context.scene.track4d.preset = "fast"
    yield from press_animate()
    assert jobs().state.problem is None, jobs().state.problem
    (job,) = jobs().state.active.values()
    previews = importlib.import_module(f"{ADDON}.previews")
    yield lambda: not jobs().state.active or (previews.icon(job.id) and job.step > 0)
    yield 0.5
    yield ask("shot 2_progress")
    yield lambda: not jobs().state.active
    assert jobs().state.problem is None, jobs().state.problem
    assert len(obj.data.shape_keys.key_blocks) == 17, "the motion was not applied"
    moved = {}
    for frame in range(1, 17):
        bpy.context.scene.frame_set(frame)
        moved[frame] = farthest(obj)
    best = max(moved, key=moved.get)
    assert moved[best] > 0, moved
    bpy.context.scene.frame_set(best)
    yield redrawn()
    yield 2.0
    yield ask("shot 3_applied")

    with bpy.context.temp_override(window=bpy.context.window_manager.windows[0]):
        bpy.ops.ed.undo()
        assert bpy.data.objects[name].data.shape_keys is None, "one undo step doesn't take the animation back"
        bpy.ops.ed.redo()
    obj = bpy.data.objects[name]
    assert len(obj.data.shape_keys.key_blocks) == 17, "redo doesn't bring the animation back"
    yield 1.0

    yield from press_play(True)
    frames = set()
    for _ in range(30):
        frames.add(bpy.context.scene.frame_current)
        yield 0.2
    yield ask("shot 3_playing")
    assert len(frames) > 3 and frames <= set(range(1, 17)), f"it plays the frames {sorted(frames)}"
    yield from press_play(False)
    bpy.context.scene.frame_set(best)

    yield from outputs(obj)
    obj = bpy.data.objects[name]
    keys = len(obj.data.shape_keys.key_blocks)
    yield from press_animate()
    yield lambda: any(j.phase.name == "RUNNING" for j in jobs().state.active.values()) or jobs().state.problem
    (job,) = jobs().state.active.values()
    yield 1.0
    yield ask("shot 4_second")
    assert job.id in jobs().state.active, "the second run was over before it could be cancelled"
    bpy.ops.track4d.cancel(job_id=job.id)
    assert not jobs().state.active
    assert len(obj.data.shape_keys.key_blocks) == keys, "the cancelled run touched the mesh"
    yield redrawn()
    yield 2.0
    yield ask("shot 5_cancelled")

    chosen.home, chosen.server = str(GUI / "nothing"), "LOCAL"
    yield lambda: jobs().state.server_problem is not None
    yield redrawn()
    yield 1.0
    yield ask("shot 6_no_server")
    bpy.ops.track4d.open_preferences()
    yield 3.0
    yield ask("shot 7_preferences")

    chosen.server = "FILE"
    yield lambda: jobs().state.server.value == "connected"
    bpy.ops.track4d.animate()
    yield lambda: any(j.phase.name == "RUNNING" for j in jobs().state.active.values())
    lines = [f"farthest vertex {moved[best]:.3f} in frame {best}"]
    for kind, times in ticks.items():
        wall, cpu = (sorted((time[k] for time in times), reverse=True) for k in range(2))
        longest = "; ".join(", ".join(f"{value:.0f}" for value in values[:6]) for values in (wall, cpu))
        lines.append(f"{kind}: {len(times)} ticks, the longest {longest} ms (wall; CPU)")
    (GUI / "passed").write_text("\n".join(lines) + "\n")
    bpy.ops.wm.quit_blender()  # with a job under way


def outputs(obj: bpy.types.Object) -> Generator[Wait, None, None]:
    """Three variations, a Gaussian cloud, the closed parts of the tab, the export's file browser, and baked light."""
    area, region = viewport()
    space, name = area.spaces.active, obj.name
    bpy.ops.track4d.animate(variations=3)
    yield lambda: any(job.step for job in jobs().state.active.values() if job.phase.name == "RUNNING")
    yield 2.0
    yield ask("shot 8_three_jobs")
    yield settled
    assert jobs().state.problem is None, jobs().state.problem
    obj = bpy.data.objects[name]
    yield 2.0
    yield ask("shot 9_variations")

    bpy.ops.track4d.output_as(output="gaussian_cloud")
    yield settled
    if jobs().state.problem is None:  # the tests' stand-in for the pipeline makes no Gaussians
        bpy.data.objects[name].hide_viewport = True
        yield 4.0
        yield ask("shot 10_cloud")
        bpy.data.objects[name].hide_viewport = False
        bpy.data.objects[name].select_set(True)  # what is hidden is deselected
        bpy.ops.track4d.output_as(output="shape_keys")
        yield settled
    bpy.ops.track4d.dismiss_error()

    open_parts()
    yield redrawn()
    yield 1.0
    region.active_panel_category = "Look"
    yield redrawn()
    yield 2.0
    yield ask("shot 11_parts")
    with bpy.context.temp_override(window=bpy.context.window_manager.windows[0], area=area, region=region):
        bpy.ops.track4d.export("INVOKE_DEFAULT", form=".glb")
    yield 4.0
    yield ask("shot 12_export")
    for window in bpy.context.window_manager.windows:
        for browser in (other for other in window.screen.areas if other.type == "FILE_BROWSER"):
            with bpy.context.temp_override(window=window, area=browser):
                bpy.ops.file.cancel()
    yield 2.0

    bpy.context.scene.track4d.lights.samples = 16
    bpy.context.scene.track4d.lights.keep_rig = True
    bpy.ops.track4d.bake_lights()
    space.shading.type, space.shading.color_type, space.shading.light = "SOLID", "VERTEX", "FLAT"
    yield 2.0
    yield ask("shot 13_baked")
    bpy.ops.track4d.remove_lights()
    space.shading.type, space.shading.color_type, space.shading.light = "MATERIAL", "MATERIAL", "STUDIO"
    region.active_panel_category = "Track4D"
    yield 2.0


def driver() -> Callable[[], float | None]:
    """A timer function that plays the story: a number waits so long, a function until it is true."""
    acts, waiting, left = story(), None, SECONDS
    bpy.types.SpaceView3D.draw_handler_add(count_sidebar, (), "UI", "POST_PIXEL")

    def step() -> float | None:
        nonlocal waiting, left
        try:
            if callable(waiting) and not waiting():
                left -= 0.2
                assert left > 0, f"waited {SECONDS} s for line {acts.gi_frame.f_lineno}"
                return 0.2
            left = SECONDS
            waiting = next(acts)
        except StopIteration:
            return None
        except Exception:  # noqa: BLE001 - told to run.sh, which prints it
            (GUI / "failed").write_text(traceback.format_exc())
            return None
        return waiting if isinstance(waiting, float) else 0.2

    return step


bpy.context.preferences.view.show_splash = False
bpy.app.timers.register(driver(), first_interval=1.0)
(GUI / "ready").write_text("ok")
