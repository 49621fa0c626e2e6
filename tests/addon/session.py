"""One Blender (the bpy module) with the built extension in a fresh user folder: run as a script with a scenario.

    BLENDER_USER_RESOURCES=<fresh folder> python session.py <scenario> '<json arguments>'

The module has no event loop, so a scenario calls `jobs.tick` itself, as often as Blender's timer would. The last line
printed is the scenario's answer as JSON.
"""

import gc
import importlib
import json
import sys
import threading
import time
from pathlib import Path

import bpy

ID = "bl_ext.user_default.track4d"
TYPES = set(dir(bpy.types))  # before the extension


def install(archive: str) -> None:
    bpy.ops.extensions.package_install_files(filepath=archive, repo="user_default", enable_on_install=True)
    assert ID in bpy.context.preferences.addons, "the extension was not enabled"


def use_server(connection: str = "", home: str = "", python: str = "") -> None:
    chosen = bpy.context.preferences.addons[ID].preferences
    chosen.connection_file, chosen.home, chosen.python = connection, home, python
    chosen.server = "FILE" if connection else "LOCAL"


def addon():
    """The installed extension's modules `jobs` and `previews`."""
    from bl_ext.user_default.track4d import jobs, previews

    return jobs, previews


def pump(done, seconds: float = 120.0) -> bool:
    """Tick until `done()`; False when it took too long, which a busy machine may need much of."""
    jobs, _ = addon()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(jobs.tick(), 0.05))
        if done():
            return True
    return False


def monkey() -> bpy.types.Object:
    """A selected Suzanne alone in the scene, with UVs."""
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    return add_monkey()


def add_monkey() -> bpy.types.Object:
    bpy.ops.mesh.primitive_monkey_add(calc_uvs=True)
    return bpy.context.object


def inventory() -> dict[str, list[str]]:
    """Names of every data-block in the file."""
    kinds = {p.identifier: p for p in bpy.data.bl_rna.properties if p.type == "COLLECTION"}
    kinds.pop("all_ids", None)  # of Blender 5.2: the others together
    return {name: sorted(block.name for block in getattr(bpy.data, name)) for name in kinds}


def shape(obj: bpy.types.Object) -> dict:
    """How many shape keys there are and how far the vertices go from rest while the animation plays."""
    keys = obj.data.shape_keys
    scene = bpy.context.scene
    farthest = 0.0
    rest = [tuple(v.co) for v in obj.data.vertices]
    for frame in range(scene.frame_start, scene.frame_start + 20):
        scene.frame_set(frame)
        mesh = obj.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
        farthest = max(farthest, max(abs(v.co[i] - r[i]) for v, r in zip(mesh.vertices, rest) for i in range(3)))
    scene.frame_set(scene.frame_start)
    return {"keys": len(keys.key_blocks) if keys else 0, "farthest": farthest}


def local(prompt: str) -> dict:
    """No server runs: Animate starts this computer's, with the real pipeline."""
    jobs, _ = addon()
    obj = monkey()
    settings = bpy.context.scene.track4d
    settings.prompt, settings.preset, settings.frames = prompt, "fast", 8
    bpy.ops.track4d.animate()
    seen = set()

    def look() -> bool:
        seen.add(jobs.state.server.value)
        return not jobs.state.active

    finished = pump(look, 250)
    problem = str(jobs.state.problem or jobs.state.server_problem or "")
    return {
        "finished": finished,
        "problem": problem,
        "seen": sorted(seen),
        "seconds": jobs.state.last_report.get("seconds"),
        **shape(obj),
    }


def runs() -> bool:
    """Whether all jobs run; a test's gate keeps them from ending meanwhile."""
    jobs, _ = addon()
    return bool(jobs.state.active) and all(job.phase is jobs.Phase.RUNNING for job in jobs.state.active.values())


def animate(blend: str, gates: str) -> dict:
    """Press Animate, wait, look at the mesh; a file saved meanwhile must know nothing of the job."""
    jobs, previews = addon()
    obj = monkey()
    bpy.context.scene.track4d.prompt = "the monkey begins with one and waits for two"
    before = inventory()
    assert bpy.ops.track4d.animate() == {"FINISHED"}
    (job_id,) = jobs.state.active
    assert pump(runs)
    running = inventory()
    bpy.ops.wm.save_as_mainfile(filepath=blend, compress=False, copy=True)
    Path(gates, "one").touch()
    stages, pictures = set(), 0
    prompts = importlib.import_module(f"{ID}.prompts")
    recent, prompts._prompts = prompts.recent(), None  # as another Blender would find them

    def look() -> bool:
        nonlocal pictures
        for job in jobs.state.active.values():
            stages.add(job.stage)
        pictures += len(previews._pictures or ())
        return not jobs.state.active

    pump(lambda: look() or (stages and pictures))
    Path(gates, "two").touch()
    finished = pump(look, 240)
    after = inventory()
    return {
        "finished": finished, "problem": str(jobs.state.problem or ""), "stages": sorted(stages), "pictures": pictures,
        "unchanged_while_running": running == before,
        "new": {k: len(after[k]) - len(before[k]) for k in after if len(after[k]) != len(before[k])},
        "recent": [recent, prompts.recent()],
        "saved_job": job_id.encode() in Path(blend).read_bytes(), "job": job_id, **shape(obj),
        "warnings": [w.code for w in jobs.state.warnings], "pictures_left": len(previews._pictures or ()),
    }  # fmt: skip


def cancel(when: str) -> dict:
    """Cancel while the object is photographed, or while the server works."""
    jobs, _ = addon()
    monkey()
    bpy.context.scene.track4d.prompt = "the monkey waits for ever"
    before = inventory()
    bpy.ops.track4d.animate()
    (job,) = jobs.state.active.values()
    if when == "capture":
        assert pump(lambda: job.step >= 1)
        assert job.phase is jobs.Phase.CAPTURING
    else:
        assert pump(lambda: job.phase is jobs.Phase.RUNNING and job.step > 1)
    start = time.monotonic()
    bpy.ops.track4d.cancel(job_id=job.id)
    idle = not jobs.state.active
    seconds = time.monotonic() - start
    pump(lambda: False, 1.5)
    return {
        "idle": idle,
        "seconds": seconds,
        "same": inventory() == before,
        "problem": str(jobs.state.problem or ""),
        "job": job.id,
    }


def lost(wait_file: str) -> dict:
    """The server dies and comes back while a job runs; nothing is clicked."""
    jobs, _ = addon()
    obj = monkey()
    bpy.context.scene.track4d.prompt = "the monkey waits for more"
    bpy.ops.track4d.animate()
    (job,) = jobs.state.active.values()
    assert pump(lambda: job.phase is jobs.Phase.RUNNING and job.step > 1)
    Path(wait_file).write_text("running")
    noticed = pump(lambda: jobs.state.server is jobs.link.Server.LOST)
    problem = jobs.state.server_problem.code if jobs.state.server_problem else ""
    Path(wait_file).write_text("lost")
    finished = pump(lambda: not jobs.state.active)
    return {
        "noticed": noticed,
        "code": problem,
        "finished": finished,
        "problem": str(jobs.state.problem or ""),
        **shape(obj),
    }


def interrupted(gates: str) -> dict:
    """A result arrives while its object is edited, another one after another file was opened: both wait."""
    jobs, _ = addon()
    obj = monkey()
    bpy.context.scene.track4d.prompt = "the monkey waits for one"
    bpy.ops.track4d.animate()
    assert pump(runs)
    bpy.ops.object.mode_set(mode="EDIT")
    Path(gates, "one").touch()
    pump(lambda: not jobs.state.active)
    (waiting,) = jobs.state.finished
    refused = bpy.ops.track4d.apply_result(job_id=waiting), jobs.state.problem.code
    bpy.ops.object.mode_set(mode="OBJECT")
    bpy.ops.track4d.apply_result(job_id=waiting)
    pump(lambda: not jobs.state.active)
    answer = shape(obj)

    bpy.context.scene.track4d.prompt = "the monkey waits for two"
    bpy.ops.track4d.animate()
    assert pump(runs)
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    Path(gates, "two").touch()
    pump(lambda: not jobs.state.active)
    pump(lambda: len(jobs.state.finished) == 2)
    foreign = next(job_id for job_id in jobs.state.finished if job_id != waiting)
    offered_again = waiting in jobs.state.finished
    bpy.ops.track4d.apply_result(job_id=foreign)
    missing = jobs.state.problem.code
    bpy.ops.track4d.dismiss_result(job_id=foreign)
    return {
        "refused": [sorted(refused[0]), refused[1]],
        "missing": missing,
        "offered_again": offered_again,
        "left": len(jobs.state.finished),
        **answer,
    }


def two() -> dict:
    """Two objects at once: the second waits for its turn, which comes when the first is cancelled."""
    jobs, _ = addon()
    first, second = monkey(), add_monkey()
    for obj, prompt in ((first, "the monkey waits for ever"), (second, "the monkey nods")):
        bpy.ops.object.select_all(action="DESELECT")
        obj.select_set(True)
        bpy.context.scene.track4d.prompt = prompt
        bpy.ops.track4d.animate()
    first_job, second_job = list(jobs.state.active.values())
    queued = pump(lambda: second_job.phase is jobs.Phase.QUEUED)
    bpy.ops.track4d.cancel(job_id=first_job.id)
    finished = pump(lambda: not jobs.state.active)
    return {"queued": queued, "finished": finished, "keys": [shape(obj)["keys"] for obj in (first, second)]}


def leave(blend: str) -> dict:
    """Start a job, save the file, and quit."""
    jobs, _ = addon()
    monkey()
    bpy.context.scene.track4d.prompt = "the monkey waits for more"
    bpy.ops.track4d.animate()
    (job,) = jobs.state.active.values()
    assert pump(runs)
    bpy.ops.wm.save_as_mainfile(filepath=blend)
    return {"job": job.id}


def come_back(blend: str) -> dict:
    """Open the file again: the result is offered, and applied by a click; after that it isn't offered any more."""
    jobs, _ = addon()
    bpy.ops.wm.open_mainfile(filepath=blend)
    jobs.wake(bpy.context)
    pump(lambda: bool(jobs.state.finished))
    offered = list(jobs.state.finished)
    bpy.ops.track4d.apply_result(job_id=offered[0])
    pump(lambda: not jobs.state.active)
    obj = bpy.data.objects["Suzanne"]
    answer = shape(obj)
    jobs.shut_down()
    jobs.wake(bpy.context)
    pump(lambda: jobs.state.server is jobs.link.Server.CONNECTED)
    pump(lambda: False, 0.5)
    bpy.ops.object.select_all(action="DESELECT")
    obj.select_set(True)
    again = list(jobs.state.finished)
    bpy.ops.track4d.remove_animation()
    return {
        "offered": offered,
        "again": again,
        **answer,
        "keys_after_removal": shape(obj)["keys"],
        "problem": str(jobs.state.problem or ""),
    }


def failing() -> dict:
    """A job that fails: the panel has its sentence, the report can be copied, and Animate works again."""
    jobs, _ = addon()
    monkey()
    bpy.context.scene.track4d.prompt = "the monkey fails"
    bpy.ops.track4d.animate()
    pump(lambda: not jobs.state.active)
    from bl_ext.user_default.track4d.operators.report import problem_report

    report, code = problem_report(bpy.context), jobs.state.problem.code
    ready = bpy.ops.track4d.animate.poll()
    bpy.ops.track4d.dismiss_error()
    return {"code": code, "report": report, "ready": ready, "dismissed": jobs.state.problem is None}


def no_server() -> dict:
    """Without a server the panel says so, with a button that exists."""
    jobs, _ = addon()
    from bl_ext.user_default.track4d import panels

    jobs.wake(bpy.context)
    pump(lambda: jobs.state.server_problem is not None)
    code = jobs.state.server_problem.code
    operator = panels.FIXES.get(code, [""])[0]
    return {"code": code, "fix": operator.removeprefix("track4d.") in dir(bpy.ops.track4d)}


def register_twice() -> dict:
    """What is left after the extension was switched off, on, and off again."""
    jobs, previews = addon()
    from bl_ext.user_default.track4d import turns

    package = sys.modules[ID]
    for _ in range(2):
        jobs.wake(bpy.context)
        jobs.tick()
        package.unregister()
        package.register()
    package.unregister()
    gc.collect()
    left = sorted(n for n in set(dir(bpy.types)) - TYPES if "track4d" in n.lower())
    answer = {
        "types": left, "scene": hasattr(bpy.types.Scene, "track4d"),
        "threads": threading.active_count() - 1,
        "timer": bpy.app.timers.is_registered(turns.timer), "operators": dir(bpy.ops.track4d),
    }  # fmt: skip
    package.register()
    return answer


def main(scenarios: dict) -> None:
    """Installs the extension, chooses the server, plays the scenario that the command line names, and prints its answer."""
    arguments = json.loads(sys.argv[2])
    install(arguments.pop("archive"))
    use_server(**{name: arguments.pop(name) for name in ("connection", "home", "python") if name in arguments})
    answer = scenarios[sys.argv[1]](**arguments)
    addon()[0].shut_down()
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(globals())
