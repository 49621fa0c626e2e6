"""4D Gaussians as an object of the scene, played by geometry nodes alone: it renders on a farm, without the add-on.

Two objects: the cloud, one point per Gaussian with what doesn't change (size, opacity, colour coefficients), and a hidden
stack of all frames, one vertex per frame and Gaussian with its place and orientation. Each scene frame samples its part of
the stack, evaluates the 4D spherical harmonics towards the scene's camera (Track4DGen, Eq. 8), and instances an ellipsoid per
Gaussian, whose material is transparent as a splat is: by the Gaussian along the ray.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix
from track4d_protocol.errors import InputError, ServerError
from track4d_protocol.messages import Result
from track4d_protocol.splats import C0, GREY, Splats, sh_rows

from .. import marks

CUTOFF = 3.0  # standard deviations at which an ellipsoid ends
MOST_ROWS = 1 << 24  # beyond it the index, a float where Blender 4.2 computes it, is not exact
TRANSPARENT_BOUNCES = 64  # of Cycles: how many Gaussians a ray may pass
_MATERIAL = "Track4D Gaussians"


def gaussian_cloud(
    splats: Splats,
    name: str,
    frame_start: int = 1,
    step: float = 1.0,
    matrix: np.ndarray | Sequence[Sequence[float]] | None = None,
    direction: Sequence[float] | None = None,
) -> bpy.types.Object:
    """Adds a cloud to the scene's collection, with its stack as a hidden child.

    Args:
        splats: in the cloud's own space.
        name: of the new object.
        frame_start: scene frame of the first frame.
        step: scene frames from one frame to the next; between them the earlier one stands.
        matrix: the cloud's place in the world, [4][4]; its own space by default.
        direction: if given, the colours are those seen along it, [3], from everywhere; else those towards the scene's camera.

    Raises:
        InputError: cloud_too_large.
    """
    check_size(splats)
    return build_cloud(look(splats, direction), name, frame_start, step, matrix)


@dataclass(frozen=True)
class Look:
    """A cloud as it goes into Blender.

    Attributes:
        places: [F * G, 3]; turns: [F * G, 4] wxyz.
        points: attributes of the Gaussians, [G] or [G, 3].
        frames: how many; terms: of the cosine series; degree: of the harmonics towards the camera, 0 without.
    """

    places: np.ndarray
    turns: np.ndarray
    points: dict[str, np.ndarray]
    frames: int
    terms: int
    degree: int


def look(splats: Splats, direction: Sequence[float] | None = None) -> Look:
    """The arithmetic of `gaussian_cloud`; touches no `bpy`."""
    points = {"size": CUTOFF * splats.scales, "opacity": splats.opacities}
    harmonics, terms = splats.sh.shape[1:3]
    towards_camera = direction is None and splats.degree > 0
    if towards_camera:
        points |= {_coefficient(k, w): splats.sh[:, k, w] for k in range(harmonics) for w in range(terms)}
    else:  # colours of one direction: a cosine series of their own
        looking = np.array([0.0, 0.0, -1.0]) if direction is None else np.asarray(direction, np.float64)
        x, y, z = looking / np.linalg.norm(looking)
        basis = np.array(sh_rows(x, y, z, splats.degree))
        points |= {_coefficient(0, w): np.tensordot(splats.sh[:, :, w], basis, (1, 0)) for w in range(terms)}
    degree = splats.degree if towards_camera else 0
    points = {name: np.ascontiguousarray(values, np.float32) for name, values in points.items()}
    return Look(splats.means.reshape(-1, 3), splats.quats.reshape(-1, 4), points, splats.frames, terms, degree)


def build_cloud(
    shown: Look, name: str, frame_start: int = 1, step: float = 1.0, matrix: np.ndarray | Sequence[Sequence[float]] | None = None
) -> bpy.types.Object:
    """Makes the objects of `gaussian_cloud`."""
    stack = _points(f"{name} frames", shown.places, {"rotation": shown.turns})
    cloud = _points(name, shown.places[: len(shown.places) // shown.frames], shown.points)
    collection = bpy.context.scene.collection
    for obj in (cloud, stack):
        collection.objects.link(obj)
    cloud[marks.CLOUD] = {"take": "", "frame_start": frame_start, "step": float(step)}
    if matrix is not None:
        cloud.matrix_world = Matrix(np.asarray(matrix).tolist())  # an array itself would be taken by columns
    stack.parent = cloud
    stack.hide_set(True)
    stack.hide_viewport = stack.hide_render = True
    modifier = cloud.modifiers.new("Gaussians", "NODES")
    modifier.node_group = _play(f"{name} nodes", stack, shown, len(cloud.data.vertices), frame_start, step)
    cycles = getattr(bpy.context.scene, "cycles", None)
    if cycles is not None:
        cycles.transparent_max_bounces = max(cycles.transparent_max_bounces, TRANSPARENT_BOUNCES)
    return cloud


def check_size(splats: Splats) -> None:
    """Raises:
    InputError: cloud_too_large.
    """
    count = splats.means.shape[1]
    if count * splats.frames > MOST_ROWS:
        raise InputError(
            "cloud_too_large",
            f"{count} Gaussians in {splats.frames} frames are more than the {MOST_ROWS} places that one cloud can hold.",
            "Ask for fewer frames, or choose a smaller quality preset.",
        )


def is_cloud(obj: bpy.types.Object) -> bool:
    """Whether an object is a Gaussian cloud of ours."""
    return marks.CLOUD in obj


def splats_of_result(result: Result, fps: float = 24.0) -> Splats:
    """The Gaussians that the server made, in capture space.

    Raises:
        ServerError: no_gaussians, bad_result.
    """
    arrays = result.arrays
    names = ("gaussian_means", "gaussian_quats", "gaussian_scales", "gaussian_opacities")
    if not {*names, "gaussian_colors"} <= arrays.keys():
        raise ServerError("no_gaussians", "The result has no Gaussians.", "Update the server, and animate again.")
    means, quats, scales, opacities = (np.asarray(arrays[name], np.float32) for name in names)
    constant = (np.asarray(arrays["gaussian_colors"], np.float32)[:, None, None] - GREY) / C0  # [G, 1, 1, 3]
    sh = np.asarray(arrays.get("gaussian_sh", constant), np.float32)
    count = means.shape[1] if means.ndim == 3 else -1
    whole = means.shape == (len(means), count, 3) and quats.shape == (len(means), count, 4) and scales.shape == (count, 3)
    if not whole or opacities.shape != (count,) or sh.ndim != 4 or len(sh) != count or sh.shape[3] != 3:
        raise ServerError(
            "bad_result",
            "The Gaussians of the result don't fit together.",
            "Animate again; if it happens again, please report it.",
        )
    if not all(np.isfinite(values).all() for values in (means, quats, scales, opacities, sh)):
        raise ServerError("bad_result", "The result has Gaussians that are not finite.", "Animate again with another seed.")
    return Splats(means, quats, scales, opacities, sh, fps)


def placed(splats: Splats, matrix: np.ndarray | Sequence[Sequence[float]]) -> Splats:
    """The same Gaussians under a matrix [4][4] that turns, moves, and scales along all axes alike.

    Raises:
        InputError: sheared_cloud.
    """
    transform = np.array(matrix, np.float64)
    size = np.cbrt(np.linalg.det(transform[:3, :3]))
    if size <= 0 or np.abs(transform[:3, :3].T @ transform[:3, :3] / size**2 - np.eye(3)).max() > 1e-4:
        raise InputError(
            "sheared_cloud",
            "The Gaussian cloud is mirrored, or scaled differently along its axes.",
            "Give the cloud and its parents the same positive scale along X, Y and Z.",
        )
    turned = splats.turned(transform[:3, :3] / size)
    return replace(
        turned,
        means=(turned.means * size + transform[:3, 3]).astype(np.float32),
        scales=(turned.scales * size).astype(np.float32),
    )


def read_cloud(cloud: bpy.types.Object) -> Splats:
    """What `gaussian_cloud` made a cloud of, as it stands in the world now.

    Of a cloud whose colours were taken along one direction, that is the colour from everywhere.

    Raises:
        InputError: sheared_cloud.
    """
    mesh, render = cloud.data, bpy.context.scene.render
    nodes = next(modifier.node_group.nodes for modifier in cloud.modifiers if modifier.type == "NODES")
    holders = [node.inputs["Object"].default_value for node in nodes if node.bl_idname == "GeometryNodeObjectInfo"]
    stack = next(holder.data for holder in holders if holder is not None)
    count = len(mesh.vertices)

    def read(source: bpy.types.Mesh, attribute: str, width: int, field: str) -> np.ndarray:
        values = np.empty(len(source.vertices) * width, np.float32)
        source.attributes[attribute].data.foreach_get(field, values)
        return values.reshape(-1, width)

    harmonics = 0
    while _coefficient(harmonics, 0) in mesh.attributes:
        harmonics += 1
    terms = 0
    while _coefficient(0, terms) in mesh.attributes:
        terms += 1
    sh = [[read(mesh, _coefficient(k, w), 3, "vector") for w in range(terms)] for k in range(harmonics)]
    splats = Splats(
        means=read(stack, "position", 3, "vector").reshape(-1, count, 3),
        quats=read(stack, "rotation", 4, "value").reshape(-1, count, 4),
        scales=read(mesh, "size", 3, "vector") / CUTOFF,
        opacities=read(mesh, "opacity", 1, "value")[:, 0],
        sh=np.array(sh).transpose(2, 0, 1, 3) / (C0 if harmonics == 1 else 1.0),  # [G, K, W, 3]
        fps=render.fps / render.fps_base / cloud[marks.CLOUD]["step"],
    )
    return placed(splats, cloud.matrix_world)


def remove_cloud(cloud: bpy.types.Object) -> None:
    """Takes a cloud away with everything that only it uses."""
    for obj in [*cloud.children, cloud]:
        mesh = obj.data
        groups = [modifier.node_group for modifier in obj.modifiers if modifier.type == "NODES"]
        bpy.data.objects.remove(obj)
        for block, blocks in [(mesh, bpy.data.meshes), *((group, bpy.data.node_groups) for group in groups)]:
            if block is not None and not block.users:
                blocks.remove(block)
    material = bpy.data.materials.get(_MATERIAL)
    if material is not None and not material.users:
        bpy.data.materials.remove(material)


def _coefficient(harmonic: int, term: int) -> str:
    return f"sh_{harmonic}_{term}"


def _points(name: str, places: np.ndarray, attributes: dict[str, np.ndarray]) -> bpy.types.Object:
    """An object of vertices alone, [N, 3], with attributes [N] or [N, 3] or, quaternions, [N, 4]."""
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(len(places))
    mesh.attributes["position"].data.foreach_set("vector", _flat(places))
    kinds = {1: ("FLOAT", "value"), 3: ("FLOAT_VECTOR", "vector"), 4: ("QUATERNION", "value")}
    for attribute, values in attributes.items():
        kind, field = kinds[1 if values.ndim == 1 else values.shape[1]]
        mesh.attributes.new(attribute, kind, "POINT").data.foreach_set(field, _flat(values))
    mesh.update()
    return bpy.data.objects.new(name, mesh)


def _flat(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, np.float32).ravel()


class _Number:
    """A number in a node tree: arithmetic on it adds Math nodes."""

    def __init__(self, tree: bpy.types.NodeTree, socket: bpy.types.NodeSocket) -> None:
        self.tree, self.socket = tree, socket

    def _with(self, operation: str, *operands: Any) -> _Number:
        return _Number(self.tree, _node(self.tree, "ShaderNodeMath", operands, operation=operation).outputs[0])

    def __add__(self, other: Any) -> _Number:
        return self._with("ADD", self, other)

    def __sub__(self, other: Any) -> _Number:
        return self._with("SUBTRACT", self, other)

    def __mul__(self, other: Any) -> _Number:
        return self._with("MULTIPLY", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def then(self, operation: str, *operands: float) -> _Number:
        return self._with(operation, self, *operands)


def _node(tree: bpy.types.NodeTree, kind: str, inputs: Sequence[Any] | dict[Any, Any] = (), **settings: Any) -> bpy.types.Node:
    """A new node; inputs by position or name: sockets, `_Number`s, or constants."""
    node = tree.nodes.new(kind)
    for setting, value in settings.items():
        setattr(node, setting, value)
    for key, value in inputs.items() if isinstance(inputs, dict) else enumerate(inputs):
        value = value.socket if isinstance(value, _Number) else value
        if isinstance(value, bpy.types.NodeSocket):
            tree.links.new(value, node.inputs[key])
        else:
            node.inputs[key].default_value = value
    return node


def _vector(tree: bpy.types.NodeTree, operation: str, *operands: Any) -> bpy.types.NodeSocket:
    if operation == "SCALE":
        return _node(tree, "ShaderNodeVectorMath", {0: operands[0], "Scale": operands[1]}, operation=operation).outputs[0]
    return _node(tree, "ShaderNodeVectorMath", operands, operation=operation).outputs[0]


def _play(name: str, stack: bpy.types.Object, shown: Look, count: int, frame_start: int, step: float) -> bpy.types.NodeTree:
    """The node group of a cloud."""
    tree = bpy.data.node_groups.new(name, "GeometryNodeTree")
    tree.is_modifier = True
    tree.interface.new_socket("Geometry", in_out="INPUT", socket_type="NodeSocketGeometry")
    tree.interface.new_socket("Geometry", in_out="OUTPUT", socket_type="NodeSocketGeometry")

    def named(attribute: str, kind: str) -> bpy.types.NodeSocket:
        return _node(tree, "GeometryNodeInputNamedAttribute", {"Name": attribute}, data_type=kind).outputs["Attribute"]

    scene_time = _Number(tree, _node(tree, "GeometryNodeInputSceneTime").outputs["Frame"])
    moment = ((scene_time - float(frame_start)) * (1.0 / step)).then("MAXIMUM", 0.0).then("MINIMUM", float(shown.frames - 1))
    moment = (moment + 1e-4).then("FLOOR")
    own = _Number(tree, _node(tree, "GeometryNodeInputIndex").outputs[0])
    row = moment * float(count) + own + 0.25  # to a whole number, by cutting
    frames = _node(tree, "GeometryNodeObjectInfo", {"Object": stack}, transform_space="ORIGINAL").outputs["Geometry"]

    def sampled(attribute: bpy.types.NodeSocket, kind: str) -> bpy.types.NodeSocket:
        node = _node(tree, "GeometryNodeSampleIndex", data_type=kind, domain="POINT")
        for socket, value in (("Geometry", frames), ("Value", attribute), ("Index", row.socket)):
            tree.links.new(value, node.inputs[socket])
        return node.outputs["Value"]

    place = sampled(_node(tree, "GeometryNodeInputPosition").outputs[0], "FLOAT_VECTOR")
    rotation = sampled(named("rotation", "QUATERNION"), "QUATERNION")
    color = _color(tree, shown, moment, place, lambda name: named(name, "FLOAT_VECTOR"))

    begin = _node(tree, "NodeGroupInput").outputs[0]
    placed = _node(tree, "GeometryNodeSetPosition", {"Geometry": begin, "Position": place}).outputs[0]
    stored = _node(
        tree, "GeometryNodeStoreNamedAttribute", {"Geometry": placed, "Name": "color", "Value": color},
        data_type="FLOAT_VECTOR", domain="POINT",
    ).outputs[0]  # fmt: skip
    ball = _node(tree, "GeometryNodeMeshIcoSphere", {"Radius": 1.0, "Subdivisions": 2}).outputs["Mesh"]
    ball = _node(tree, "GeometryNodeSetShadeSmooth", {0: ball}).outputs[0]
    ball = _node(tree, "GeometryNodeSetMaterial", {"Geometry": ball, "Material": _material()}).outputs[0]
    points = _node(tree, "GeometryNodeMeshToPoints", {"Mesh": stored}).outputs[0]
    instances = _node(
        tree, "GeometryNodeInstanceOnPoints",
        {"Points": points, "Instance": ball, "Rotation": rotation, "Scale": named("size", "FLOAT_VECTOR")},
    ).outputs[0]  # fmt: skip
    _node(tree, "NodeGroupOutput", [instances])
    return tree


def _color(
    tree: bpy.types.NodeTree, shown: Look, moment: _Number, place: bpy.types.NodeSocket,
    named: Callable[[str], bpy.types.NodeSocket],
) -> bpy.types.NodeSocket:  # fmt: skip
    """4D SH as nodes: sRGB colour of each Gaussian at this frame, from the camera's place."""
    waves = [(moment * (math.pi * w / shown.frames)).then("COSINE") for w in range(shown.terms)]
    rows: list[Any] = [(1.0, 1.0, 1.0)]
    if shown.degree:
        camera = _node(tree, "GeometryNodeInputActiveCamera").outputs[0]
        eye = _node(tree, "GeometryNodeObjectInfo", {"Object": camera}, transform_space="RELATIVE").outputs["Location"]
        looking = _vector(tree, "NORMALIZE", _vector(tree, "SUBTRACT", place, eye))
        split = _node(tree, "ShaderNodeSeparateXYZ", [looking])
        x, y, z = (_Number(tree, socket) for socket in split.outputs)
        rows = sh_rows(x, y, z, shown.degree)
    total: Any = (GREY, GREY, GREY)
    for harmonic, row in enumerate(rows):
        series: Any = named(_coefficient(harmonic, 0))
        for term in range(1, shown.terms):
            series = _vector(tree, "MULTIPLY_ADD", named(_coefficient(harmonic, term)), waves[term], series)
        total = _vector(tree, "MULTIPLY_ADD", series, row, total)
    return _vector(tree, "MAXIMUM", total, (0.0, 0.0, 0.0))


def _material() -> bpy.types.Material:
    """The splat's look: emission of its colour, as opaque as the Gaussian is along the ray; shared by all clouds.

    On the unit sphere around a Gaussian a ray enters at p and goes on along v; it comes as near to the centre as
    1 - (p . v)^2, which in standard deviations is `CUTOFF`^2 times that.
    """
    material = bpy.data.materials.get(_MATERIAL)
    if material is not None:
        return material
    material = bpy.data.materials.new(_MATERIAL)
    if bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    if hasattr(material, "surface_render_method"):
        material.surface_render_method = "BLENDED"
    tree = material.node_tree
    tree.nodes.clear()

    def instance(attribute: str) -> bpy.types.Node:
        return _node(tree, "ShaderNodeAttribute", attribute_type="INSTANCER", attribute_name=attribute)

    geometry = _node(tree, "ShaderNodeNewGeometry")
    transforms = {"convert_from": "WORLD", "convert_to": "OBJECT"}
    entry = _node(tree, "ShaderNodeVectorTransform", [geometry.outputs["Position"]], vector_type="POINT", **transforms).outputs[0]
    ray = _node(tree, "ShaderNodeVectorTransform", [geometry.outputs["Incoming"]], vector_type="VECTOR", **transforms).outputs[0]
    entry, ray = _vector(tree, "NORMALIZE", entry), _vector(tree, "NORMALIZE", ray)
    along = _Number(tree, _node(tree, "ShaderNodeVectorMath", [entry, ray], operation="DOT_PRODUCT").outputs["Value"])
    nearest = 1.0 + along * along * -1.0
    falloff = (nearest * (-0.5 * CUTOFF**2)).then("EXPONENT")
    front = 1.0 + _Number(tree, geometry.outputs["Backfacing"]) * -1.0
    alpha = falloff * _Number(tree, instance("opacity").outputs["Fac"]) * front
    split = _node(tree, "ShaderNodeSeparateXYZ", [instance("color").outputs["Vector"]])
    linear = [_linear(_Number(tree, channel)) for channel in split.outputs]
    color = _node(tree, "ShaderNodeCombineXYZ", linear).outputs[0]
    shine = _node(tree, "ShaderNodeEmission", {"Color": color}).outputs[0]
    clear = _node(tree, "ShaderNodeBsdfTransparent").outputs[0]
    _node(tree, "ShaderNodeOutputMaterial", [_node(tree, "ShaderNodeMixShader", [alpha, clear, shine]).outputs[0]])
    return material


def _linear(value: _Number) -> _Number:
    """sRGB to linear light (IEC 61966-2-1)."""
    low = value * (1 / 12.92)
    high = ((value + 0.055) * (1 / 1.055)).then("POWER", 2.4)
    bright = value.then("GREATER_THAN", 0.04045)
    return low + (high - low) * bright
