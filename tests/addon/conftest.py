"""An empty Blender scene for each test, and what the tests measure in it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomllib

bpy = pytest.importorskip("bpy", reason="Blender's Python module isn't installed")

from track4d_addon.files import leave  # noqa: E402
from track4d_protocol.client import Client  # noqa: E402
from track4d_protocol.errors import TransportError  # noqa: E402
from track4d_protocol.keys import read_connection  # noqa: E402
from track4d_protocol.messages import Result  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus) -> None:
    session.config.ended_with = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config) -> None:
    """Taking down Blender 4.2 crashes after so much, and taking down 4.5 waits for ever: the last word is that of the tests."""
    if bpy.app.version < (5, 0, 0) and hasattr(config, "ended_with"):
        leave(config.ended_with)


@pytest.fixture(autouse=True)
def empty_scene() -> None:
    """bpy is one global state: every test starts from nothing."""
    bpy.ops.wm.read_factory_settings(use_empty=True)


def make_object(name: str, vertices, faces, link: bool = True):
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata([tuple(map(float, v)) for v in vertices], [], [tuple(map(int, f)) for f in faces])
    obj = bpy.data.objects.new(name, mesh)
    if link:
        bpy.context.scene.collection.objects.link(obj)
    return obj


def make_cone(name: str = "Cone", sides: int = 12):
    """A lying cone whose tip is its front: it points to -Y."""
    angles = np.linspace(0, 2 * np.pi, sides, endpoint=False)
    ring = np.stack([0.4 * np.cos(angles), np.full(sides, 1.0), 0.4 * np.sin(angles)], 1)
    faces = [(k, (k + 1) % sides, sides) for k in range(sides)] + [tuple(reversed(range(sides)))]
    return make_object(name, [*ring, (0.0, -1.0, 0.0)], faces)


def make_grid(side: int, name: str = "Grid"):
    """A plane of side x side vertices; quick also when it is large."""
    xy = np.stack(np.meshgrid(np.linspace(-1, 1, side), np.linspace(-1, 1, side)), -1).reshape(-1, 2)
    index = np.arange(side * side).reshape(side, side)
    quads = np.stack([index[:-1, :-1], index[:-1, 1:], index[1:, 1:], index[1:, :-1]], -1).reshape(-1, 4)
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(len(xy))
    mesh.loops.add(quads.size)
    mesh.polygons.add(len(quads))
    mesh.vertices.foreach_set("co", np.concatenate([xy, np.zeros((len(xy), 1))], 1).astype(np.float32).ravel())
    mesh.loops.foreach_set("vertex_index", quads.astype(np.int32).ravel())
    mesh.polygons.foreach_set("loop_start", np.arange(0, quads.size, 4, dtype=np.int32))
    mesh.update(calc_edges=True)
    obj = bpy.data.objects.new(name, mesh)
    bpy.context.scene.collection.objects.link(obj)
    return obj


def world_positions(objects: Sequence, frame: float | None = None) -> np.ndarray:
    """All vertices as Blender shows them, in the world; [N, 3] float64."""
    if frame is not None:
        bpy.context.scene.frame_set(int(frame // 1), subframe=float(frame % 1))
    bpy.context.view_layer.update()
    graph = bpy.context.evaluated_depsgraph_get()
    parts = []
    for obj in objects:
        evaluated = obj.evaluated_get(graph)
        co = np.empty(len(evaluated.data.vertices) * 3, np.float32)
        evaluated.data.vertices.foreach_get("co", co)
        matrix = np.array(evaluated.matrix_world, np.float64)
        parts.append(co.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
    return np.concatenate(parts)


def mesh_hash(mesh) -> str:
    """Every attribute of a mesh, its shape keys and materials."""
    digest = hashlib.sha256()
    for attribute in mesh.attributes:
        field = {"FLOAT_VECTOR": "vector", "FLOAT2": "vector", "FLOAT_COLOR": "color", "BYTE_COLOR": "color"}.get(
            attribute.data_type, "value"
        )
        if attribute.data_type in ("INT32_2D", "INT16_2D") or not len(attribute.data):
            continue
        width = np.size(getattr(attribute.data[0], field))
        kind = np.float32 if attribute.data_type.startswith(("FLOAT", "BYTE_COLOR")) else np.int32
        values = np.empty(len(attribute.data) * width, bool if attribute.data_type == "BOOLEAN" else kind)
        attribute.data.foreach_get(field, values)
        digest.update(f"{attribute.name} {attribute.domain}".encode() + values.tobytes())
    corners = np.empty(len(mesh.loops), np.int32)
    mesh.loops.foreach_get("vertex_index", corners)
    digest.update(corners.tobytes() + repr([m and m.name for m in mesh.materials]).encode())
    for block in mesh.shape_keys.key_blocks if mesh.shape_keys else ():
        co = np.empty(len(block.data) * 3, np.float32)
        block.data.foreach_get("co", co)
        digest.update(f"{block.name} {block.value} {block.mute}".encode() + co.tobytes())
    return digest.hexdigest()


def everything() -> dict[str, object]:
    """All datablocks with their users, all meshes, and the settings and selection of all scenes."""
    state: dict[str, object] = {}
    for name in dir(bpy.data):
        collection = getattr(bpy.data, name)
        if isinstance(collection, bpy.types.bpy_prop_collection) and name not in (
            "window_managers",
            "screens",
            "workspaces",
        ):
            state[name] = sorted((block.name_full, block.users, block.session_uid) for block in collection)
    state["hashes"] = {mesh.name: mesh_hash(mesh) for mesh in bpy.data.meshes}
    state["matrices"] = {obj.name: [tuple(row) for row in obj.matrix_world] for obj in bpy.data.objects}
    state["modes"] = {
        obj.name: (obj.mode, obj.active_shape_key_index, [m.show_viewport for m in obj.modifiers])
        for obj in bpy.data.objects
    }
    for scene in bpy.data.scenes:
        render, cycles = scene.render, scene.cycles
        state[scene.name] = (
            render.engine,
            render.resolution_x,
            render.film_transparent,
            cycles.samples,
            cycles.device,
            scene.frame_start,
            scene.frame_end,
            scene.frame_current,
            scene.camera and scene.camera.name,
            scene.world and scene.world.name,
            scene.view_settings.view_transform,
            sorted(o.name for o in scene.objects if o.select_get()),
            scene.view_layers[0].objects.active and scene.view_layers[0].objects.active.name,
        )
    state["handlers"] = {
        name: list(getattr(bpy.app.handlers, name))
        for name in dir(bpy.app.handlers)
        if isinstance(getattr(bpy.app.handlers, name), list)
    }
    return state


def wave(vertices: np.ndarray, frames: int = 6, prompt: str = "it swims") -> Result:
    """A result as the server gives it, without the server: a wave that starts from the captured pose."""
    size = float(np.ptp(vertices, axis=0).max())
    times = np.arange(frames)[:, None]
    phase = 3 * vertices[:, 1] / size
    moves = (
        np.stack(
            [
                0.10 * np.sin(times * 0.9 + phase),
                0.05 * np.cos(times * 1.1 + phase),
                0.08 * np.sin(times * 0.7 - phase),
            ],
            -1,
        )
        * size
    )
    return Result(
        {"prompt": prompt, "seed": 3, "preset": "fast", "warnings": []},
        {"vertices": (vertices + moves - moves[:1]).astype(np.float32)},
    )


def to_world(seen, points: np.ndarray) -> np.ndarray:
    """From capture space into the world."""
    return points @ seen.to_world[:3, :3].T + seen.to_world[:3, 3]


@pytest.fixture(scope="session")
def kit() -> SimpleNamespace:
    """The helpers above, since test modules don't import each other."""
    return SimpleNamespace(
        make_object=make_object,
        make_cone=make_cone,
        make_grid=make_grid,
        world_positions=world_positions,
        mesh_hash=mesh_hash,
        everything=everything,
        wave=wave,
        to_world=to_world,
    )


@pytest.fixture
def load(asset: Callable) -> Callable[[str], list]:
    """load("fox.glb") are its mesh objects in the open scene, in rest pose."""
    from track4d_addon import scene_io

    return lambda name: scene_io.load(asset(name))[0]


# Blender with the extension, and a server


@pytest.fixture(scope="session")
def server_python() -> Path:
    """A Python with everything that the real server needs: this one, or that of the project's own environment."""
    if find_spec("torch"):
        return Path(sys.executable)
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("torch is neither here nor in .venv: the real server can't run")
    return python


def load_module(path: Path):
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def builder():
    return load_module(ROOT / "tools" / "build_extension.py")


@pytest.fixture(scope="session")
def tool(builder):
    """Blender's own tool for extensions, as a module."""
    return load_module(builder.blender_tool())


@pytest.fixture(scope="session")
def archive() -> Path:
    """The zip that `make extension` gives."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "build_extension.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    version = tomllib.loads((ROOT / "blender_manifest.toml").read_text("utf-8"))["version"]
    return ROOT / "dist" / f"track4d-{version}.zip"


@pytest.fixture
def blender(archive, tmp_path):
    """blender(scenario, **arguments) runs a scenario of session.py, or of `script`, in a Blender with an empty user folder."""

    def command(scenario: str, script: str = "session.py", **arguments) -> tuple[list[str], dict[str, str]]:
        environment = os.environ | {
            "BLENDER_USER_RESOURCES": str(tmp_path / "blender"),
            "TRACK4D_HOME": str(tmp_path / "no server"),
        }
        arguments = {"archive": str(archive)} | {k: str(v) for k, v in arguments.items()}
        return [sys.executable, str(HERE / script), scenario, json.dumps(arguments)], environment

    def run(scenario: str, seconds: float = 280, **arguments) -> dict:
        line, environment = command(scenario, **arguments)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
        return json.loads(done.stdout.strip().splitlines()[-1])

    run.command = command
    return run


class TestServer:
    """A server process in a home of its own, with the tiny work."""

    __test__ = False

    def __init__(self, home: Path, work: str = "tiny_work:run") -> None:
        self.home, self.connection, self.work = home, home / "connection.json", work
        self.start()

    def start(self) -> None:
        code = "import sys, pathlib, track4d.service as s; s.serve(pathlib.Path(sys.argv[1]), work=sys.argv[2])"
        environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "TINY_WORK_GATES": str(self.home)}
        self.home.mkdir(exist_ok=True)
        self.log = open(self.home / "test.log", "ab")  # noqa: SIM115 - closed in `stop`
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(self.home), self.work], env=environment, stdout=self.log, stderr=self.log
        )
        end = time.monotonic() + 120
        while True:
            try:
                with Client(read_connection(self.connection), timeout=1.0) as client:
                    client.hello()
                return
            except TransportError:
                assert self.process.poll() is None and time.monotonic() < end, (self.home / "test.log").read_text()
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def job(self, job_id: str):
        with Client(read_connection(self.connection)) as client:
            return next(job for job in client.jobs() if job.id == job_id)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()
        self.log.close()


@pytest.fixture
def server(tmp_path):
    running = TestServer(tmp_path / "home")
    yield running
    running.stop()


@pytest.fixture
def server_of(tmp_path):
    """server_of("module:function") is a server that does this work."""
    running: list[TestServer] = []

    def start(work: str) -> TestServer:
        running.append(TestServer(tmp_path / f"home {len(running)}", work))
        return running[-1]

    yield start
    for one in running:
        one.stop()
