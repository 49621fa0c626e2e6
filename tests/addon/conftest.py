"""An empty Blender scene for each test, and what the tests measure in it."""

import hashlib
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest

bpy = pytest.importorskip("bpy", reason="Blender's Python module isn't installed")

from track4d_protocol.messages import Result  # noqa: E402


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
