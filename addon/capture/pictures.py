"""The picture part of a capture: Cycles on the CPU, in memory, of copies in a temporary scene.

Cycles' Python engine class is wrapped for the length of one render, to read the picture where Blender has it: neither
a file nor the compositor is needed. Light and background are ours, always the same: the pictures serve the motion, and
a side that the user's lamps leave dark could not be followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import bpy
import numpy as np
from mathutils import Matrix
from track4d_protocol.errors import InputError
from track4d_protocol.space import Similarity

from .cameras import set_camera
from .colors import linear_to_srgb, to_bytes
from .mesh import PlainCopies

AMBIENT = 0.25  # radiance of the world without its lamps
MIRRORED = 0.42  # radiance of the world that metal sees
# towards the lamps, in canonical space (front on +X) and at right angles: key, back and fill light
LAMPS = np.array([[0.491, 0.472, 0.732], [-0.84, 0.035, 0.541], [0.23, -0.881, 0.414]])
SHARES = (0.4, 0.25, 0.15)  # radiance of a white surface that faces the lamp
BOUNCES = 2
FILTER = 2  # pixels beyond its outline that an object colours: Cycles blurs by one and a half
HANDLERS = (
    "render_init",
    "render_pre",
    "render_post",
    "render_write",
    "render_complete",
    "render_cancel",
    "render_stats",
    "frame_change_pre",
    "frame_change_post",
)


def render_view(
    copies: PlainCopies,
    from_world: np.ndarray,
    canonical: Similarity,
    viewmat: np.ndarray,
    K: np.ndarray,
    size: int,
    samples: int,
) -> np.ndarray:
    """Renders one picture of the copies; fills their temporary scene when it is called for the first time.

    Args:
        copies: as `plain_copies` gives them.
        from_world: [4, 4], the inverse of `Snapshot.to_world`.
        canonical: from capture space into canonical space; the lamps go with it.
        viewmat: [4, 4] from capture space to the camera; K: [3, 3].
        size: width and height in pixels.
        samples: per pixel.

    Returns:
        uint8 [R, R, 4] sRGB with straight alpha, top row first.

    Raises:
        InputError: cycles_missing, or render_failed with Blender's own words.
    """
    scene = copies.scene
    if scene.camera is None:
        _fill_scene(copies, from_world, canonical, size, samples)
    set_camera(scene.camera, viewmat, K, size, 1 / canonical.scale)
    columns, rows = _window(copies, from_world, viewmat, K, size)
    border = scene.render  # in shares of the picture, from its lower left corner; Blender rounds down
    border.border_min_x, border.border_max_x = ((k + 0.25) / size for k in columns)
    border.border_min_y, border.border_max_y = ((k + 0.25) / size for k in rows)
    color = np.zeros((size, size, 4), np.float32)
    color[slice(*rows), slice(*columns)] = _render(scene)
    alpha = color[..., 3:]
    straight = np.where(alpha > 1e-4, color[..., :3] / np.maximum(alpha, 1e-4), 0.0)
    view = np.concatenate([linear_to_srgb(straight), np.clip(alpha, 0.0, 1.0)], -1)
    return to_bytes(view)[::-1].copy()


def _window(
    copies: PlainCopies, from_world: np.ndarray, viewmat: np.ndarray, K: np.ndarray, size: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The columns and the rows (from below) that can show the copies, first and past the last; the rest needs no rays."""
    whole = (0, size), (0, size)
    materials = [material for copy in copies.items for material in copy.mesh.materials if material is not None]
    if any(material.displacement_method != "BUMP" for material in materials):
        return whole  # the surface may be anywhere
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for copy in copies.items:
        vertices = np.empty(3 * len(copy.mesh.vertices), np.float32)
        copy.mesh.vertices.foreach_get("co", vertices)
        matrix = viewmat @ from_world @ copy.matrix_world
        seen = matrix[:3, :3] @ vertices.reshape(-1, 3).T + matrix[:3, 3:]  # [3, N], whose rows numpy reduces fast
        if not seen.size or seen[2].min() <= 0:
            return whole
        places = seen[:2] / seen[2] * [[K[0, 0]], [-K[1, 1]]] + size / 2
        low, high = np.minimum(low, places.min(1)), np.maximum(high, places.max(1))
    first = np.floor(low - FILTER).clip(0, size - 1).astype(int)
    last = np.maximum(np.ceil(high + FILTER).clip(0, size).astype(int), first + 1)
    return (int(first[0]), int(last[0])), (int(first[1]), int(last[1]))


def _fill_scene(copies: PlainCopies, from_world: np.ndarray, canonical: Similarity, size: int, samples: int) -> None:
    scene = copies.scene

    def add(name: str, data: bpy.types.ID | None) -> bpy.types.Object:
        obj = bpy.data.objects.new(name, data)
        copies.temporary.append(obj)
        scene.collection.objects.link(obj)
        return obj

    origin = add(".Track4D origin", None)
    for copy in copies.items:
        obj = add(".Track4D copy", copy.mesh)
        obj.parent = origin  # its matrix_parent_inverse holds any matrix, also a sheared one
        obj.matrix_parent_inverse = Matrix((from_world @ copy.matrix_world).tolist())
    camera = bpy.data.cameras.new(".Track4D camera")
    copies.temporary.append(camera)
    scene.camera = add(".Track4D camera", camera)
    scene.world = bpy.data.worlds.new(".Track4D world")
    copies.temporary.append(scene.world)
    if bpy.app.version < (5, 0, 0):
        scene.world.use_nodes = True
    lamps = add(".Track4D lamps", None)
    lamps.matrix_world = Matrix((canonical.rotation.T @ LAMPS.T).tolist()).to_4x4()
    _light(scene.world.node_tree, lamps)
    _set_up_render(scene, size, samples)


def _light(tree: bpy.types.NodeTree, lamps: bpy.types.Object) -> None:
    """The world's light: even, and a broad lobe along each axis of the object `lamps`.

    Lamps that are part of the world make a picture a third cheaper than lamps of their own: a ray that leaves the surface finds
    them, and nobody has to aim at them. What mirrors sees an even world: highlights move with the camera, not with the surface.
    """
    new, link = tree.nodes.new, tree.links.new
    place, facing, lobes = new("ShaderNodeTexCoord"), new("ShaderNodeVectorMath"), new("ShaderNodeVectorMath")
    place.object = lamps
    facing.operation, facing.inputs[1].default_value = "MAXIMUM", (0.0, 0.0, 0.0)
    link(place.outputs["Object"], facing.inputs[0])
    # Of radiance 1.5 cos, a surface that faces it collects 1.
    lobes.operation, lobes.inputs[1].default_value = "DOT_PRODUCT", [1.5 * share for share in SHARES]
    link(facing.outputs["Vector"], lobes.inputs[0])
    diffuse, light = new("ShaderNodeMath"), new("ShaderNodeMix")
    diffuse.operation, diffuse.inputs[1].default_value = "ADD", AMBIENT
    link(lobes.outputs["Value"], diffuse.inputs[0])
    link(new("ShaderNodeLightPath").outputs["Is Glossy Ray"], light.inputs["Factor"])
    link(diffuse.outputs[0], light.inputs["A"])
    light.inputs["B"].default_value = MIRRORED
    background = next(node for node in tree.nodes if node.type == "BACKGROUND")
    background.inputs["Color"].default_value = (1.0, 1.0, 1.0, 1.0)
    link(light.outputs[0], background.inputs["Strength"])


def _set_up_render(scene: bpy.types.Scene, size: int, samples: int) -> None:
    try:
        scene.render.engine = "CYCLES"
    except TypeError as error:
        raise InputError(
            "cycles_missing",
            "The render engine Cycles is switched off.",
            "Switch on 'Cycles Render Engine' in Preferences > Add-ons.",
        ) from error
    render, cycles = scene.render, scene.cycles
    render.resolution_x = render.resolution_y = size
    render.resolution_percentage = 100
    render.film_transparent = render.use_border = True
    render.use_crop_to_border = False
    render.use_compositing = render.use_sequencer = render.use_motion_blur = False
    scene.view_settings.view_transform = "Standard"
    cycles.device, cycles.samples, cycles.seed = "CPU", samples, 0
    cycles.use_adaptive_sampling = cycles.use_denoising = False
    cycles.sampling_pattern = "TABULATED_SOBOL"
    scene.world.cycles.sampling_method = "NONE"  # rays that leave the object find the world by themselves
    cycles.max_bounces = cycles.diffuse_bounces = cycles.glossy_bounces = BOUNCES
    cycles.caustics_reflective = cycles.caustics_refractive = False


@contextmanager
def quiet_handlers() -> Iterator[None]:
    """The user's handlers don't hear of a render that isn't theirs."""
    kept = {name: list(getattr(bpy.app.handlers, name)) for name in HANDLERS}
    try:
        for name in HANDLERS:
            getattr(bpy.app.handlers, name).clear()
        yield
    finally:
        for name, functions in kept.items():
            getattr(bpy.app.handlers, name)[:] = functions


def _render(scene: bpy.types.Scene) -> np.ndarray:
    """Linear premultiplied colours [H, W, 4] within the scene's border, bottom row first."""
    from cycles import CyclesRender

    pictures: list[np.ndarray] = []
    original = CyclesRender.__dict__["render"]

    def render_and_keep(self, depsgraph):
        original(self, depsgraph)
        result = self.get_result()
        for entry in result.layers[0].passes:
            if entry.name == "Combined":
                flat = np.empty(result.resolution_x * result.resolution_y * entry.channels, np.float32)
                entry.rect.foreach_get(flat)
                pictures.append(flat.reshape(result.resolution_y, result.resolution_x, entry.channels))

    had_result = "Render Result" in bpy.data.images
    CyclesRender.render = render_and_keep
    try:
        with quiet_handlers():
            bpy.ops.render.render(scene=scene.name)
    except RuntimeError as error:
        raise InputError(
            "render_failed",
            f"Blender can't render the object: {str(error).strip()}",
            "Render it once yourself with Cycles to see what is wrong.",
        ) from error
    finally:
        CyclesRender.render = original
        if not had_result and "Render Result" in bpy.data.images:
            bpy.data.images.remove(bpy.data.images["Render Result"])
    if not pictures:
        raise InputError(
            "render_failed",
            "Cycles gave no picture of the object.",
            "Render it once yourself with Cycles to see what is wrong.",
        )
    return pictures[-1]
