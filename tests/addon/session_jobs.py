"""Scenarios about running jobs, for a Blender of their own; see session.py."""

import os
import signal
import subprocess
import time
from pathlib import Path

import bpy
import session
from session import add_monkey, addon, monkey, pump, shape

SIMPLE = {"BOOLEAN", "INT", "FLOAT", "STRING", "ENUM"}
SKIPPED = {"window_managers", "screens", "workspaces"}


def live():
    from bl_ext.user_default.track4d import live_motion

    return live_motion


def orders_folder() -> Path:
    from bl_ext.user_default.track4d import orders

    return orders.folder()


def fingerprint() -> dict[str, object]:
    """Every data-block of the file with everything in it: all properties, custom properties, points, keys and users."""
    _look()  # reading makes some custom properties, which would be news the second time
    return _look()


def _look() -> dict[str, object]:
    found: dict[str, object] = {}
    for collection in (p.identifier for p in bpy.data.bl_rna.properties if p.type == "COLLECTION"):
        if collection not in SKIPPED:
            for block in getattr(bpy.data, collection):
                _read(block, f"{collection}[{block.name!r}]", found, 0)
    return found


def _read(item, path: str, found: dict, depth: int) -> None:
    if isinstance(item, (bpy.types.ID, bpy.types.PropertyGroup)):
        for key in item.keys():
            found[f"{path}[{key!r}]"] = str(item[key])
    for entry in item.bl_rna.properties:
        name = entry.identifier
        if name in ("rna_type", "is_evaluated", "preview", "session_uid", "tool_settings", "depsgraph") or depth > 4:
            continue
        value = getattr(item, name, None)
        if entry.type in SIMPLE:
            found[f"{path}.{name}"] = tuple(map(str, value)) if getattr(entry, "is_array", False) else str(value)
        elif value is None or isinstance(value, bpy.types.ID):
            found[f"{path}.{name}"] = value and value.name_full
        elif entry.type == "POINTER":
            _read(value, f"{path}.{name}", found, depth + 1)
        elif entry.type == "COLLECTION":
            found[f"{path}.{name}"] = len(value)
            for number, part in enumerate(value):
                if isinstance(part, bpy.types.ID):
                    found[f"{path}.{name}[{number}]"] = part.name_full
                elif number < 600:
                    _read(part, f"{path}.{name}[{number}]", found, depth + 1)


def difference(before: dict, after: dict) -> list[str]:
    return [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]


def cancel_at_many_moments(blend: str) -> dict:
    """Cancel at the click, between two views, when it was sent, while it runs, while its motion is shown or put on."""
    jobs, previews = addon()
    obj = monkey()
    from bl_ext.user_default.track4d import slices

    slices.SLICE = 0.0  # a shape key a turn
    def moving() -> bool:
        return any(keys.key_blocks.get(live().NAME) for keys in bpy.data.shape_keys)

    moments = {
        "click": lambda job: True,
        "view": lambda job: job.phase is jobs.Phase.CAPTURING and job.step >= 2,
        "sent": lambda job: job.phase is not jobs.Phase.CAPTURING,
        "running": lambda job: job.phase is jobs.Phase.RUNNING,
        "moving": lambda job: moving(),
        "applying": lambda job: job.phase is jobs.Phase.APPLYING and obj.data.shape_keys,
    }
    answer = {}
    for name, come in moments.items():
        bpy.context.scene.track4d.prompt = "the monkey nods" if name == "applying" else "the monkey waits for ever"
        before = fingerprint()
        bpy.ops.track4d.animate()
        (job,) = jobs.state.active.values()
        reached = come(job) if name == "click" else pump(lambda come=come, job=job: come(job) or jobs.state.problem)
        if name == "moving":
            film = previews._films.get(job.id)
            answer["film"] = film is not None and list(film.shape)
            pump(lambda: moved(obj) > 0.05)  # it plays, and begins at rest
            answer["moves"] = moved(obj)
            answer["file"] = saves_without(blend)
            jobs.tick()
        start = time.monotonic()
        bpy.ops.track4d.cancel(job_id=job.id)
        idle = not jobs.state.active
        answer[name] = [bool(reached), idle, time.monotonic() - start, difference(before, fingerprint())]
        pump(lambda: False, 0.3)
        answer[name][3] += difference(before, fingerprint())
        assert jobs.state.problem is None, (name, jobs.state.problem)
    answer["pictures"] = len(previews._pictures or ()) + len(previews._films)
    return answer


def temporary(obj: bpy.types.Object):
    return obj.data.shape_keys.key_blocks[live().NAME]


def moved(obj: bpy.types.Object) -> float:
    """How far the temporary key moves the object just now, along Z."""
    return max(abs(p.co[2] - v.co[2]) for p, v in zip(temporary(obj).points, obj.data.vertices))


def saves_without(blend: str) -> bool:
    """Whether a file that is saved while the motion is shown knows nothing of it."""
    bpy.ops.wm.save_as_mainfile(filepath=blend, compress=False, copy=True)
    content = Path(blend).read_bytes()
    return live().NAME.encode() not in content and live().MARK.encode() not in content


def motion_among_the_users_own(blend: str) -> dict:
    """The temporary key beside the user's keys, in edit mode, on a duplicate, and in a file that was saved without asking us."""
    jobs, _ = addon()
    obj = monkey()
    obj.shape_key_add(name="Basis", from_mix=False)
    obj.shape_key_add(name="smile", from_mix=False).value = 0.5
    obj.active_shape_key_index = 1
    before = fingerprint()
    bpy.context.scene.track4d.prompt = "the monkey waits for ever"
    bpy.ops.track4d.animate()
    shown = pump(lambda: live().NAME in obj.data.shape_keys.key_blocks)

    def moved() -> float:
        evaluated = obj.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
        return max(abs(a.co[2] - b.co[2]) for a, b in zip(evaluated.vertices, obj.data.vertices))

    moves = pump(lambda: moved() > 0.02)  # it plays: at its first frame it is still at rest
    bpy.ops.object.mode_set(mode="EDIT")
    edited = saves_without(blend)
    bpy.ops.object.mode_set(mode="OBJECT")
    pump(lambda: live().NAME in obj.data.shape_keys.key_blocks)
    bpy.ops.object.duplicate()
    copy = bpy.context.object
    handlers, bpy.app.handlers.save_pre[:] = list(bpy.app.handlers.save_pre), []  # as Blender's automatic saving does
    bpy.ops.wm.save_as_mainfile(filepath=blend, compress=False, copy=True)
    bpy.app.handlers.save_pre[:] = handlers
    automatic = live().NAME.encode() in Path(blend).read_bytes()
    for job_id in list(jobs.state.active):
        bpy.ops.track4d.cancel(job_id=job_id)
    duplicate = [block.name for block in copy.data.shape_keys.key_blocks]
    bpy.data.meshes.remove(copy.data)
    same = [key for key in difference(before, fingerprint()) if key.startswith(("shape_keys", "actions"))]
    bpy.ops.wm.open_mainfile(filepath=blend)
    opened = {block.name for keys in bpy.data.shape_keys for block in keys.key_blocks}
    return {"shown": shown, "moves": moves, "edited": edited, "automatic": automatic, "duplicate": duplicate,
            "same": same, "opened": sorted(opened)}  # fmt: skip


def leave_several(blend: str) -> dict:
    """Three objects, three jobs; quit when the server has them all."""
    jobs, _ = addon()
    first, second, third = monkey(), add_monkey(), add_monkey()
    for obj, prompt in ((first, "it waits for one"), (second, "it nods"), (third, "it waits for two")):
        bpy.ops.object.select_all(action="DESELECT")
        obj.select_set(True)
        bpy.context.scene.track4d.prompt = prompt
        bpy.ops.track4d.animate()
    listed = [job.objects for job in jobs.state.active.values()]
    sent = pump(lambda: all(j.phase.name not in ("CAPTURING", "SENDING") for j in jobs.state.active.values()))
    lines = [line for line, _ in jobs.status(jobs.state)]
    bpy.ops.wm.save_as_mainfile(filepath=blend)
    return {"listed": listed, "sent": sent, "jobs": list(jobs.state.active), "lines": lines}


def come_back_to_several(blend: str, gate: str) -> dict:
    """Two have finished meanwhile, one still runs: it is shown, and offered when it is done. Another file loses nothing."""
    jobs, _ = addon()
    bpy.ops.wm.open_mainfile(filepath=blend)
    jobs.wake(bpy.context)
    pump(lambda: bool(jobs.state.finished))
    away = sorted(job.objects[0] for job in jobs.state.finished.values() if job.away)
    again = [job.objects for job in jobs.state.active.values()]
    orders = [bool(job.order.batch) for job in [*jobs.state.finished.values(), *jobs.state.active.values()]]
    bpy.ops.wm.read_homefile(use_empty=True, use_factory_startup=True)
    Path(gate).touch()
    elsewhere = pump(lambda: len(jobs.state.finished) == 3 and not jobs.state.active)
    bpy.ops.wm.open_mainfile(filepath=blend)
    for job_id in list(jobs.state.finished):
        bpy.ops.track4d.apply_result(job_id=job_id)
    pump(lambda: not jobs.state.active)
    keys = [shape(obj)["keys"] for obj in bpy.data.objects]
    kept = sorted(p.name for p in orders_folder().iterdir())
    return {"away": away, "again": again, "orders": orders, "elsewhere": elsewhere, "keys": keys, "kept": kept,
            "problem": str(jobs.state.problem or "")}  # fmt: skip


def leave_unsent(blend: str) -> dict:
    """The server is away: the request waits, and Blender is closed."""
    jobs, _ = addon()
    monkey()
    bpy.context.scene.track4d.prompt = "the monkey nods"
    bpy.ops.track4d.animate()
    (job,) = jobs.state.active.values()
    sending = pump(lambda: job.phase is jobs.Phase.SENDING and any(orders_folder().glob("*.request")))
    bpy.ops.wm.save_as_mainfile(filepath=blend)
    return {"sending": sending, "job": job.id}


def truth(pid: int, wait_file: str) -> dict:
    """The first line while the server stops and goes on, is killed and comes back: after how many seconds it is true."""
    jobs, _ = addon()
    monkey()
    jobs.wake(bpy.context)

    def seconds(icon: str) -> float:
        start = time.monotonic()
        assert pump(lambda: jobs.status(jobs.state)[0][1] == icon, 30), jobs.status(jobs.state)
        return time.monotonic() - start

    seconds("CHECKMARK")
    lines = [line for line, _ in jobs.status(jobs.state)]
    pid = int(pid)
    os.kill(pid, signal.SIGSTOP)
    frozen = seconds("UNLINKED")
    os.kill(pid, signal.SIGCONT)
    thawed = seconds("CHECKMARK")
    os.kill(pid, signal.SIGKILL)
    killed = seconds("UNLINKED")
    Path(wait_file).write_text("killed")
    assert pump(lambda: Path(wait_file).read_text() == "back", 60)
    return {"lines": lines, "frozen": frozen, "thawed": thawed, "killed": killed, "back": seconds("CHECKMARK")}


def set_up(setup_python: str) -> dict:
    """Set up the server that the extension carries, with an interruption, use it, and take it back."""
    jobs, _ = addon()
    from bl_ext.user_default.track4d import local_setup
    from track4d_protocol.filelock import holder
    from track4d_protocol.local import SERVER_LOCK

    bpy.context.preferences.system.use_online_access = False
    chosen = bpy.context.preferences.addons[session.ID].preferences
    chosen.setup_python = setup_python
    home, answer = chosen.server_home(), {}
    monkey()
    jobs.wake(bpy.context)
    pump(lambda: jobs.state.server_problem is not None)
    answer["first"] = [jobs.state.server_problem.code, home.exists()]
    no_index = os.environ.pop("PIP_NO_INDEX")
    answer["offline"] = [sorted(bpy.ops.track4d.set_up_server()), jobs.state.problem.code]
    os.environ["PIP_NO_INDEX"] = no_index
    bpy.ops.track4d.set_up_server()
    assert pump(lambda: jobs.state.setup.step == 1), jobs.state.setup
    answer["busy"] = jobs.status(jobs.state)[0]
    answer["twice"] = [sorted(bpy.ops.track4d.set_up_server()), jobs.state.problem.code]
    process = local_setup._processes[home]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    pump(lambda: not jobs.state.setup.busy)
    answer["killed"] = jobs.state.setup.state
    bpy.ops.track4d.set_up_server()
    pump(lambda: not jobs.state.setup.busy, 600)
    answer["ready"] = [jobs.state.setup.state, jobs.state.setup.version, jobs.state.setup.text]
    answer["python"] = chosen.source().python == str(local_setup.environment_python(home))
    answer["log"] = "pip install" in (home / local_setup.LOG).read_text()
    program = local_setup.environment_python(home).with_name("track4d")
    answer["help"] = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    ask = [program.with_name("python"), "-c", "import track4d; print(track4d.__file__)"]
    answer["origin"] = subprocess.run(ask, capture_output=True, text=True, env=local_setup._clean_environment()).stdout
    bpy.ops.track4d.start_server()
    answer["started"] = pump(lambda: jobs.state.server is jobs.link.Server.CONNECTED)
    bpy.ops.track4d.remove_setup()
    pump(lambda: not jobs.state.setup.busy)
    answer["removed"] = [jobs.state.setup.state, sorted(p.name for p in home.iterdir() if p.is_dir())]
    answer["runs"] = holder(home / SERVER_LOCK) is not None
    bpy.ops.track4d.use_existing_server()
    answer["existing"] = chosen.server
    return answer


if __name__ == "__main__":
    session.main(globals())
