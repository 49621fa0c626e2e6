"""Baked light for evaluation sets: a four-point rig, Cycles' light in vertex colours, and static Gaussians of them.

As Track4DGen's section 9 makes its Sketchfab28 set: key, fill, back and background light; direct and indirect light with
all components baked into vertex colours; the mesh turned into 3D Gaussians.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix, Vector
from track4d_protocol.errors import InputError
from track4d_protocol.space import FRONTS
from track4d_protocol.splats import C0, GREY, Splats

LIGHTS = "Track4D lights"  # the rig's collection
COLORS = "Track4D light"  # the colour attribute
PLACED = "track4d_placed"  # property of the collection: the lights as `add_rig` left them
BAKED = "track4d_light"  # property of a mesh: what its light was baked with
PASSES = {"DIRECT", "INDIRECT", "DIFFUSE", "GLOSSY", "TRANSMISSION", "EMIT"}


@dataclass(frozen=True)
class Lamp:
    """An area light that looks at the object's centre.

    Attributes:
        azimuth: degrees from the object's front, positive to its left.
        elevation: degrees above the horizon.
        strength: irradiance at the centre, in units in which a white diffuse surface facing a lamp of 1 is white.
        size: width in radii of the bounding sphere.
        distance: from the centre, in radii.
    """

    azimuth: float
    elevation: float
    strength: float
    size: float = 1.5
    distance: float = 4.0


RIG = {
    "key": Lamp(40.0, 40.0, 0.85),
    "fill": Lamp(-50.0, 20.0, 0.35, size=3.0),
    "back": Lamp(160.0, 50.0, 0.6),
    "background": Lamp(180.0, -30.0, 0.3, size=6.0),
}


def rig_with(**strengths: float) -> dict[str, Lamp]:
    """The rig with other strengths: `rig_with(key=1.0, fill=0.2)`."""
    return {name: replace(lamp, strength=strengths.get(name, lamp.strength)) for name, lamp in RIG.items()}


def rig_to_dict(rig: dict[str, Lamp]) -> dict[str, dict[str, float]]:
    """For a manifest."""
    return {name: asdict(lamp) for name, lamp in rig.items()}


def add_rig(objects: Sequence[bpy.types.Object], rig: dict[str, Lamp] = RIG, front: str = "-Y") -> bpy.types.Collection:
    """Four area lights around the objects' bounding sphere, in a collection of their own; an earlier rig is replaced.

    Raises:
        InputError: bad_front, degenerate_mesh.
    """
    if front not in FRONTS:
        raise InputError("bad_front", f"The front axis '{front}' is not known.", f"Use one of {', '.join(FRONTS)}.")
    centre, radius = bounding_sphere(objects)
    remove_rig()
    collection = bpy.data.collections.new(LIGHTS)
    bpy.context.scene.collection.children.link(collection)
    for name, lamp in rig.items():
        light = bpy.data.lights.new(f"Track4D {name}", "AREA")
        light.shape, light.size = "DISK", lamp.size * radius
        distance = lamp.distance * radius
        light.energy = lamp.strength * math.pi**2 * distance**2  # W; a small Lambertian lamp gives P / (pi d^2)
        obj = bpy.data.objects.new(light.name, light)
        azimuth, elevation = math.radians(lamp.azimuth - FRONTS[front]), math.radians(lamp.elevation)
        outward = Vector((math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation)))
        turn = outward.to_track_quat("Z", "Y").to_matrix().to_4x4()  # an area light shines along its -Z
        obj.matrix_world = Matrix.Translation(Vector(centre) + distance * outward) @ turn
        collection.objects.link(obj)
    collection[PLACED] = json.dumps(rig_lights())
    return collection


def ensure_rig(objects: Sequence[bpy.types.Object], rig: dict[str, Lamp] = RIG, front: str = "-Y") -> bool:
    """Puts the rig around the objects, unless there is one that somebody has edited: that stays; whether it was put there.

    Raises:
        InputError: as `add_rig`.
    """
    collection = bpy.data.collections.get(LIGHTS)
    if collection is not None and rig_lights() not in ([], json.loads(collection.get(PLACED, "[]"))):
        return False
    add_rig(objects, rig, front)
    return True


def rig_lights() -> list[dict[str, Any]]:
    """The rig's lights as they stand in the scene, for a manifest; those that don't render are left out.

    Each has "name", "type", "energy" (W, W/m2 of a sun), "color" (linear), "position" and "direction" (in which it shines) in the
    world, and "size": width and height of an area, diameter of a bulb or spot, angle of a sun in radians.
    """
    collection = bpy.data.collections.get(LIGHTS)
    bpy.context.view_layer.update()
    shown = [obj for obj in collection.all_objects if obj.type == "LIGHT" and not obj.hide_render] if collection else []
    return [_describe(obj) for obj in sorted(shown, key=lambda obj: obj.name)]


def _describe(obj: bpy.types.Object) -> dict[str, Any]:
    light, matrix = obj.data, obj.matrix_world
    if light.type == "AREA":
        across = (light.size, light.size_y if light.shape in ("RECTANGLE", "ELLIPSE") else light.size)
        size = [length * matrix.col[k].to_3d().length for k, length in enumerate(across)]
    else:
        size = [light.angle if light.type == "SUN" else 2 * light.shadow_soft_size]
    color = [channel * factor for channel, factor in zip(light.color, _temperature(light))]
    numbers = {"color": color, "position": matrix.translation, "direction": -matrix.col[2].to_3d().normalized(), "size": size}
    return {"name": obj.name, "type": light.type, "energy": _short(light.energy * 2 ** getattr(light, "exposure", 0.0))} | {
        name: [_short(value) for value in values] for name, values in numbers.items()
    }


def _temperature(light: bpy.types.Light) -> Sequence[float]:
    """The tint of a light's temperature, where one is used (Blender 4.5 and later)."""
    return light.temperature_color if getattr(light, "use_temperature", False) else (1.0, 1.0, 1.0)


def _short(value: float) -> float:
    """Six digits: a float32, without those that single precision makes up."""
    return float(f"{value:.6g}") + 0.0


def remove_rig() -> None:
    """Takes the rig away, where there is one."""
    collection = bpy.data.collections.get(LIGHTS)
    if collection is None:
        return
    for obj in list(collection.objects):
        light = obj.data
        bpy.data.objects.remove(obj)
        if light is not None and not light.users:
            bpy.data.lights.remove(light)
    bpy.data.collections.remove(collection)
    bpy.context.view_layer.update()


def bounding_sphere(objects: Sequence[bpy.types.Object]) -> tuple[np.ndarray, float]:
    """Centre [3] and radius around the middle of the objects' common box, in the world.

    Raises:
        InputError: degenerate_mesh.
    """
    points = np.concatenate([world_vertices(obj) for obj in objects]) if objects else np.zeros((0, 3))
    if len(points) == 0 or not np.isfinite(points).all() or np.ptp(points, axis=0).max() < 1e-9:
        names = ", ".join(f"'{obj.name}'" for obj in objects) or "The selection"
        raise InputError("degenerate_mesh", f"{names} has no size that light could fall on.", "Choose an object with a surface.")
    centre = (points.min(0) + points.max(0)) / 2
    return centre, float(np.linalg.norm(points - centre, axis=1).max())


def world_vertices(obj: bpy.types.Object) -> np.ndarray:
    """[N, 3] float64."""
    flat = np.empty(len(obj.data.vertices) * 3, np.float32)
    obj.data.attributes["position"].data.foreach_get("vector", flat)
    matrix = np.array(obj.matrix_world, np.float64)
    return flat.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3]


def bake(objects: Sequence[bpy.types.Object], samples: int = 64) -> None:
    """Bakes all light that leaves the surfaces into a float colour per vertex, the attribute `COLORS`.

    Lights, world and other objects of the scene take part as they do in a render. The mesh remembers the rig's lights and the
    samples, see `baked_with`.

    Raises:
        InputError: no_mesh_selected, in_edit_mode, shared_mesh, bake_failed with Blender's own words.
    """
    if not objects:
        raise InputError("no_mesh_selected", "No mesh object is selected.", "Select the object to be lit.")
    for obj in objects:
        if obj.mode != "OBJECT":
            raise InputError("in_edit_mode", f"'{obj.name}' is in another mode.", "Switch to object mode (Tab).")
        if obj.data.users > 1:
            raise InputError("shared_mesh", f"The mesh of '{obj.name}' is shared by several objects, which light would fall on "
                             "differently.", "Make it a single user.")  # fmt: skip
    with _baking(samples):
        for obj in objects:
            attribute = obj.data.color_attributes.get(COLORS)
            if attribute is not None and (attribute.domain, attribute.data_type) != ("POINT", "FLOAT_COLOR"):
                obj.data.color_attributes.remove(attribute)
                attribute = None
            if attribute is None:
                attribute = obj.data.color_attributes.new(COLORS, "FLOAT_COLOR", "POINT")
            obj.data.color_attributes.active_color = obj.data.color_attributes[COLORS]
            for other in bpy.context.view_layer.objects:
                other.select_set(other == obj)
            bpy.context.view_layer.objects.active = obj
            try:
                bpy.ops.object.bake(type="COMBINED", pass_filter=PASSES, target="VERTEX_COLORS", use_clear=True)
            except RuntimeError as error:
                raise InputError("bake_failed", f"Blender can't bake '{obj.name}': {str(error).strip()}",
                                 "Apply its modifiers and try again.") from error  # fmt: skip
            obj.data[BAKED] = json.dumps({"lights": rig_lights(), "samples": samples})


def baked_with(objects: Sequence[bpy.types.Object]) -> dict[str, Any]:
    """What the objects' light was baked with: "lights", as `rig_lights` gives them, and "samples".

    Raises:
        InputError: not_baked, where one has no baked light, or that of other lights than the first.
    """
    records = [obj.data.get(BAKED, "") if COLORS in obj.data.color_attributes else "" for obj in objects]
    for obj, record in zip(objects, records):
        if not record:
            raise InputError("not_baked", f"'{obj.name}' has no baked light yet.", "Bake the light first.")
        if record != records[0]:
            raise InputError("not_baked", f"'{objects[0].name}' and '{obj.name}' were baked with different lights.",
                             "Bake the light of all of them at once.")  # fmt: skip
    return json.loads(records[0])


@contextmanager
def _baking(samples: int) -> Iterator[None]:
    """Cycles with these samples; engine, samples and selection as before afterwards."""
    scene, layer = bpy.context.scene, bpy.context.view_layer
    engine, selected, active = scene.render.engine, [obj for obj in layer.objects if obj.select_get()], layer.objects.active
    try:
        scene.render.engine = "CYCLES"
    except TypeError as error:
        raise InputError("cycles_missing", "The render engine Cycles is switched off.",
                         "Switch on 'Cycles Render Engine' in Preferences > Add-ons.") from error  # fmt: skip
    before = scene.cycles.samples, scene.cycles.use_adaptive_sampling, scene.cycles.use_denoising
    scene.cycles.samples, scene.cycles.use_adaptive_sampling, scene.cycles.use_denoising = samples, False, False
    try:
        yield
    finally:
        scene.cycles.samples, scene.cycles.use_adaptive_sampling, scene.cycles.use_denoising = before
        scene.render.engine = engine
        for obj in layer.objects:
            obj.select_set(obj in selected)
        layer.objects.active = active


def baked_colors(obj: bpy.types.Object) -> np.ndarray:
    """The baked light per vertex, linear, not clipped; [N, 3] float32."""
    flat = np.empty(len(obj.data.vertices) * 4, np.float32)
    obj.data.color_attributes[COLORS].data.foreach_get("color", flat)
    return flat.reshape(-1, 4)[:, :3]


def to_splats(objects: Sequence[bpy.types.Object]) -> Splats:
    """Static Gaussians on all vertices and triangles of baked objects, coloured with their light (sRGB); in the world."""
    parts = []
    for obj in objects:
        obj.data.calc_loop_triangles()
        triangles = np.empty(len(obj.data.loop_triangles) * 3, np.int32)
        obj.data.loop_triangles.foreach_get("vertices", triangles)
        parts.append(surface_splats(world_vertices(obj), triangles.reshape(-1, 3), _srgb(baked_colors(obj))))
    return Splats(
        np.concatenate([part.means for part in parts], 1),
        np.concatenate([part.quats for part in parts], 1),
        *(np.concatenate([getattr(part, name) for part in parts]) for name in ("scales", "opacities", "sh")),
    )


def surface_splats(vertices: np.ndarray, triangles: np.ndarray, colors: np.ndarray) -> Splats:
    """Flat Gaussians that cover a surface: one per vertex that a face uses and one per triangle with an area.

    Args:
        vertices: [N, 3]; triangles: [T, 3]; colors: [N, 3] sRGB 0..1.
    """
    corners = vertices[triangles]  # [T, 3, 3]
    cross = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    area = np.linalg.norm(cross, axis=1) / 2
    whole = area > 1e-12 * max(float(area.max(initial=0)), 1e-30)
    triangles, corners, cross, area = triangles[whole], corners[whole], cross[whole], area[whole]
    count = len(vertices)
    around = np.bincount(triangles.ravel(), np.repeat(area, 3), count) / 3  # area of a vertex's own part
    normals = np.stack([np.bincount(triangles.ravel(), np.repeat(cross[:, k], 3), count) for k in range(3)], 1)
    used = around > 0
    centred = corners - corners.mean(1, keepdims=True)
    covariance = np.einsum("tij,tik->tjk", centred, centred) / 12  # of a uniform triangle
    values, axes = np.linalg.eigh(covariance)  # ascending: normal, short, long
    spread = np.sqrt(np.maximum(values, 0))
    axes[:, :, 0] = np.cross(axes[:, :, 1], axes[:, :, 2])
    disc = 0.5 * np.sqrt(around[used] / math.pi)
    means = np.concatenate([vertices[used], corners.mean(1)])
    quats = np.concatenate([_facing(normals[used]), _quats(axes)])
    scales = np.concatenate([np.stack([0.2 * disc, disc, disc], 1), spread * [0, 1, 1] + spread[:, 1:2] * [0.2, 0, 0]])
    looks = np.concatenate([colors[used], colors[triangles].mean(1)])
    arrays = (means[None], quats[None], np.maximum(scales, 1e-9), np.full(len(means), 0.95), ((looks - GREY) / C0)[:, None, None])
    means, quats, scales, opacities, sh = (np.ascontiguousarray(array, np.float32) for array in arrays)
    return Splats(means, quats, scales, opacities, sh)


def _facing(normals: np.ndarray) -> np.ndarray:
    """Quaternions wxyz [N, 4] that turn +X to the normals [N, 3]."""
    x, y, z = (normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)).T
    quats = np.stack([1 + x, np.zeros_like(x), -z, y], 1)
    quats[x < -0.9999] = (0, 0, 1, 0)
    return quats / np.linalg.norm(quats, axis=1, keepdims=True)


def _quats(rotations: np.ndarray) -> np.ndarray:
    """Quaternions wxyz [N, 4] of rotation matrices [N, 3, 3], by the largest component (Shepperd 1978)."""
    r = rotations
    trace = np.trace(r, axis1=1, axis2=2)
    squares = np.stack([trace, r[:, 0, 0], r[:, 1, 1], r[:, 2, 2]], 1)
    best = squares.argmax(1)
    quats = np.empty((len(r), 4))
    for k in range(4):
        m = r[best == k]
        a, b, c = m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]
        d, e, f = m[:, 1, 0] + m[:, 0, 1], m[:, 0, 2] + m[:, 2, 0], m[:, 2, 1] + m[:, 1, 2]
        w, x, y, z = (
            1 + m[:, 0, 0] + m[:, 1, 1] + m[:, 2, 2],
            *(1 + 2 * m[:, j, j] - m[:, 0, 0] - m[:, 1, 1] - m[:, 2, 2] for j in range(3)),
        )
        quats[best == k] = np.stack(((w, a, b, c), (a, x, d, e), (b, d, y, f), (c, e, f, z))[k], 1)
    return quats / np.linalg.norm(quats, axis=1, keepdims=True)


def _srgb(linear: np.ndarray) -> np.ndarray:
    """Linear light to sRGB, clipped to 0..1 (IEC 61966-2-1)."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
