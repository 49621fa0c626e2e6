"""Makes the three example models: a fox cub, a songbird and a sunflower.

    python examples/make_models.py                      # writes the three .glb files beside this script
    python examples/make_models.py --only songbird --out /tmp

Needs only `bpy` and numpy. A body is a skeleton of limbs: the Skin and Subdivision modifiers give its quads, a smooth
union of the limbs' distance functions gives its final shape. The texture is painted per texel from the place it has on
the surface. The same script makes the same geometry every time. Front is -Y, up is +Z, lengths are metres, feet stand
on z = 0.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector

TEXTURE = 1024  # pixels
SLIM = 0.7  # the first skin is slimmer than the body, so that neighbouring limbs do not touch before they are settled
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------- shapes


@dataclass
class Limb:
    """A chain of spheres, the bone structure of one part.

    Attributes:
        name: what the painter calls it.
        points: [K, 4] x, y, z and radius of each sphere.
        parent: name of the limb that this one grows from and the index of the sphere there; None for the first limb,
            and for flesh that only bulges the others' surface.
        squash: thickness along x, y, z relative to the radius; (1, 0.3, 1) is a leaf that faces y.
        blend: width of the smooth joint with the rest of the body.
        mirror: also make the limb at -x.
    """

    name: str
    points: list[tuple[float, float, float, float]]
    parent: tuple[str, int] | None = None
    squash: tuple[float, float, float] = (1.0, 1.0, 1.0)
    blend: float = 0.04
    mirror: bool = False


def chain_distance(limb: Limb, points: np.ndarray) -> np.ndarray:
    """Approximate signed distance of `points` [N, 3] to one limb; [N]."""
    squash = np.array(limb.squash)
    spheres = np.array(limb.points)
    spheres[:, :3] /= squash
    points = (np.abs(points * [1, 0, 0]) + points * [0, 1, 1] if limb.mirror else points) / squash
    nearest = np.full(len(points), np.inf)
    for start, end in zip(spheres[: max(1, len(spheres) - 1)], spheres[min(1, len(spheres) - 1) :]):
        axis = end[:3] - start[:3]
        along = np.clip((points - start[:3]) @ axis / max(axis @ axis, 1e-12), 0, 1)[:, None]
        radius = start[3] + along[:, 0] * (end[3] - start[3])
        nearest = np.minimum(nearest, np.linalg.norm(points - start[:3] - along * axis, axis=1) - radius)
    return nearest * squash.min()


def distance(limbs: list[Limb], points: np.ndarray) -> np.ndarray:
    """Signed distance of `points` [N, 3] to the smooth union of the limbs; [N]."""
    total = chain_distance(limbs[0], points)
    for limb in limbs[1:]:
        other = chain_distance(limb, points)
        overlap = np.maximum(limb.blend - np.abs(total - other), 0) / limb.blend
        total = np.minimum(total, other) - overlap**2 * limb.blend / 4
    return total


def gradient(limbs: list[Limb], points: np.ndarray, step: float = 1e-4) -> np.ndarray:
    """Central differences of `distance`; [N, 3]."""
    offsets = np.eye(3) * step
    return np.stack([distance(limbs, points + o) - distance(limbs, points - o) for o in offsets], 1) / (2 * step)


def reach(spheres: list[tuple[float, float, float, float]]) -> np.ndarray:
    """The spheres with the last one moved to the tip of its end, where the skin should close; [K, 4]."""
    nodes = np.array(spheres)
    if len(nodes) > 1:
        along = nodes[-1, :3] - nodes[-2, :3]
        nodes[-1, :3] += 0.9 * nodes[-1, 3] * along / np.linalg.norm(along)
    return nodes


def skin(limbs: list[Limb], levels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Quads around a skeleton, by the Skin and Subdivision modifiers; vertices [N, 3] and faces [Q, 4]."""
    nodes: list[tuple[float, float, float, float]] = []
    edges: list[tuple[int, int]] = []
    first: dict[tuple[str, int], int] = {}  # the first node of a limb on a side
    for limb in limbs:
        if nodes and not limb.parent:
            continue
        for side in (1, -1) if limb.mirror else (1,):
            previous = None
            if limb.parent:
                name, index = limb.parent
                previous = first.get((name, side), first[name, 1]) + index
            first[limb.name, side] = len(nodes)
            for x, y, z, radius in reach(limb.points):
                nodes.append((side * x, y, z, SLIM * radius))
                if previous is not None:
                    edges.append((previous, len(nodes) - 1))
                previous = len(nodes) - 1
    mesh = bpy.data.meshes.new("skeleton")
    mesh.from_pydata([node[:3] for node in nodes], edges, [])
    skeleton = bpy.data.objects.new("skeleton", mesh)
    bpy.context.collection.objects.link(skeleton)
    skeleton.modifiers.new("Skin", "SKIN")
    for index, node in enumerate(nodes):
        mesh.skin_vertices[0].data[index].radius = (node[3], node[3])
        mesh.skin_vertices[0].data[index].use_root = index == 0
    skeleton.modifiers.new("Subdivision", "SUBSURF").levels = levels
    evaluated = skeleton.evaluated_get(bpy.context.evaluated_depsgraph_get()).to_mesh()
    vertices = np.array([v.co for v in evaluated.vertices], np.float64)
    faces = np.array([tuple(p.vertices) for p in evaluated.polygons], np.int64)
    bpy.data.objects.remove(skeleton)
    used, faces = np.unique(faces, return_inverse=True)  # the modifier may leave a loose vertex inside a joint
    return vertices[used], faces.reshape(-1, 4)


def settle(limbs: list[Limb], vertices: np.ndarray, faces: np.ndarray, rounds: int = 24) -> np.ndarray:
    """Moves the vertices onto the limbs' smooth union and spreads them evenly; [N, 3]."""
    edges = np.unique(np.sort(np.concatenate([faces[:, [k, (k + 1) % 4]] for k in range(4)]), 1), axis=0)
    ends = np.concatenate([edges, edges[:, ::-1]])
    degree = np.bincount(ends[:, 0], minlength=len(vertices))[:, None]
    for _ in range(rounds):
        total = np.zeros_like(vertices)
        np.add.at(total, ends[:, 0], vertices[ends[:, 1]])
        pull = 0.5 * (total / degree - vertices)
        slope = gradient(limbs, vertices)
        normal = slope / np.maximum(np.linalg.norm(slope, axis=1, keepdims=True), 1e-6)
        # Spread along the surface only: a plain mean would draw the vertices back from the tips.
        vertices = vertices + pull - (pull * normal).sum(1, keepdims=True) * normal
        for _ in range(2):
            slope = gradient(limbs, vertices)
            steepness = np.maximum((slope**2).sum(1, keepdims=True), 0.05)
            vertices = vertices - distance(limbs, vertices)[:, None] * slope / steepness
    return vertices


def nearest_limb(limbs: list[Limb], points: np.ndarray) -> np.ndarray:
    """Index of the limb that each point [N, 3] belongs to; [N]."""
    return np.argmin([chain_distance(limb, points) for limb in limbs], 0)


def body(limbs: list[Limb]) -> tuple[np.ndarray, np.ndarray]:
    """The surface of a skeleton; vertices [N, 3] and faces [Q, 4]."""
    vertices, faces = skin(limbs)
    return settle(limbs, vertices, faces), faces


# --------------------------------------------------------------------------------------------------------- painting


def color(code: str) -> np.ndarray:
    """"#rrggbb" as sRGB 0..1; [3]."""
    return np.array([int(code[k : k + 2], 16) for k in (1, 3, 5)]) / 255


def ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high` (or the other way round when low > high), smooth between."""
    t = np.clip((value - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def dab(canvas: np.ndarray, code: str, amount: np.ndarray) -> None:
    """Paints a colour over `canvas` [M, 3] with opacity `amount` [M]."""
    canvas += amount[:, None] * (color(code) - canvas)


def noise(points: np.ndarray, frequency: float, seed: int = 0) -> np.ndarray:
    """Smooth value noise in -1..1 at `points` [M, 3]; [M]."""
    lattice = np.random.RandomState(seed).uniform(-1, 1, (32, 32, 32))
    scaled = points * frequency
    cell = np.floor(scaled).astype(np.int64)
    t = scaled - cell
    t = t * t * (3 - 2 * t)
    total = np.zeros(len(points))
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, t, 1 - t), 1)
        total += weight * lattice[tuple(((cell + corner) % 32).T)]
    return total


def spot(
    points: np.ndarray, normals: np.ndarray, centre: tuple, facing: tuple, width: float, height: float
) -> np.ndarray:
    """How far texels are from an ellipse painted on the surface: 1 on its rim, 0 in its centre; [M].

    Args:
        points, normals: [M, 3] of the texels.
        centre: x, y, z of the ellipse.
        facing: the direction it looks in; texels that look elsewhere are far away.
        width, height: radii across and up, in metres.
    """
    axis = np.array(facing) / np.linalg.norm(facing)
    across = np.cross([0.0, 0.0, 1.0], axis)
    across /= np.linalg.norm(across)
    offset = points - centre
    ratio = np.hypot(offset @ across / width, offset @ np.cross(axis, across) / height)
    return np.where((normals @ axis > 0.1) & (np.abs(offset @ axis) < 3 * max(width, height)), ratio, 9.0)


def eye(canvas: np.ndarray, points: np.ndarray, normals: np.ndarray, centre: tuple, facing: tuple, size: float) -> None:
    """Paints a dark eye with two highlights at `centre` and at its mirror image."""
    for side in (1, -1):
        where = (side * centre[0], centre[1], centre[2])
        axis = (side * facing[0], facing[1], facing[2])
        rim = spot(points, normals, where, axis, size * 0.86, size)
        dab(canvas, "#1b1210", ramp(rim, 1.06, 0.94))
        dab(canvas, "#6b3a1c", ramp(rim, 0.80, 0.55) * ramp(points[:, 2], centre[2], centre[2] - 0.6 * size) * 0.8)
        shine = (where[0] + 0.25 * size, where[1], where[2] + 0.36 * size)
        dab(canvas, "#ffffff", ramp(spot(points, normals, shine, axis, size * 0.30, size * 0.30), 1.1, 0.9))
        glint = (where[0] - 0.3 * size, where[1], where[2] - 0.42 * size)
        dab(canvas, "#ffffff", 0.8 * ramp(spot(points, normals, glint, axis, size * 0.14, size * 0.14), 1.2, 0.8))


def texels(mesh: bpy.types.Mesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The place on the surface of each texel of the UV map.

    Returns:
        points [size, size, 3], normals [size, size, 3], polygons [size, size], -1 where there is none; bottom row first
        as in `Image.pixels`.
    """
    mesh.calc_loop_triangles()
    triangles = np.array([t.loops for t in mesh.loop_triangles])  # [T, 3]
    polygon = [t.polygon_index for t in mesh.loop_triangles]
    corner_vertex = np.array([loop.vertex_index for loop in mesh.loops])
    places = np.array([v.co for v in mesh.vertices])[corner_vertex]
    directions = np.array([v.normal for v in mesh.vertices])[corner_vertex]
    uvs = np.array([loop.uv for loop in mesh.uv_layers.active.data]) * size - 0.5
    points, normals = np.zeros((size, size, 3)), np.zeros((size, size, 3))
    polygons = np.full((size, size), -1)
    for index, corners in zip(polygon, triangles):
        uv = uvs[corners]
        low = np.maximum(np.ceil(uv.min(0) - 1e-6), 0).astype(int)
        high = np.minimum(np.floor(uv.max(0) + 1e-6), size - 1).astype(int)
        if (high < low).any():
            continue
        column, row = np.meshgrid(np.arange(low[0], high[0] + 1), np.arange(low[1], high[1] + 1))
        to_weights = np.linalg.pinv(np.vstack([uv.T, np.ones(3)]))
        weights = np.stack([column, row, np.ones_like(row)], -1) @ to_weights.T  # [h, w, 3]
        inside = (weights > -1e-4).all(-1)
        target = row[inside], column[inside]
        points[target] = weights[inside] @ places[corners]
        normals[target] = weights[inside] @ directions[corners]
        polygons[target] = index
    return points, normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-9), polygons


def bleed(picture: np.ndarray, covered: np.ndarray, pixels: int = 10) -> np.ndarray:
    """Continues the colours of the covered texels `pixels` outwards, the mean colour beyond; [h, w, 3]."""
    picture, covered = picture.copy(), covered.copy()
    picture[~covered] = picture[covered].mean(0)
    for _ in range(pixels):
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            new = np.roll(covered, shift, axis) & ~covered
            picture[new] = np.roll(picture, shift, axis)[new]
            covered |= new
    return picture


# ------------------------------------------------------------------------------------------------------------ objects


# points [M, 3], normals [M, 3], islands [M] -> sRGB [M, 3]
Painter = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass
class Model:
    """What is needed to build one object: its quads, UV islands (one label per face) and painter."""

    name: str
    vertices: np.ndarray
    faces: np.ndarray
    islands: np.ndarray
    paint: Painter
    closeups: tuple[int, ...]  # the islands that get a larger share of the texture, such as the face


def face_frames(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres and normals of quads; each [Q, 3]."""
    corners = vertices[faces]
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    return corners.mean(1), normals / np.linalg.norm(normals, axis=1, keepdims=True)


def unwrap(thing: bpy.types.Object, islands: np.ndarray, closeups: tuple[int, ...]) -> None:
    """Seams between faces of different `islands` [Q], then a packed UV map with the `closeups` 1.8 times as large."""
    mesh = thing.data
    mesh.uv_layers.new(name="UVMap")
    label: dict[int, int] = {}
    seams = np.zeros(len(mesh.edges), bool)
    for polygon in mesh.polygons:
        for loop in polygon.loop_indices:
            edge = mesh.loops[loop].edge_index
            seams[edge] |= label.setdefault(edge, islands[polygon.index]) != islands[polygon.index]
    mesh.attributes.new("uv_seam", "BOOLEAN", "EDGE").data.foreach_set("value", seams)
    bpy.context.view_layer.objects.active = thing
    thing.select_set(True)
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.mesh.select_all(action="SELECT")
    bpy.ops.uv.unwrap(method="ANGLE_BASED", margin=0.01)
    bpy.ops.uv.select_all(action="SELECT")
    bpy.ops.uv.average_islands_scale()
    bpy.ops.object.mode_set(mode="OBJECT")
    corners = np.repeat(np.isin(islands, closeups), [p.loop_total for p in mesh.polygons])
    uvs = np.empty((len(mesh.loops), 2), np.float32)
    mesh.uv_layers.active.uv.foreach_get("vector", uvs.ravel())
    uvs[corners] *= 1.8
    mesh.uv_layers.active.uv.foreach_set("vector", uvs.ravel())
    bpy.ops.object.mode_set(mode="EDIT")
    bpy.ops.uv.pack_islands(margin=0.012, rotate=True)
    bpy.ops.object.mode_set(mode="OBJECT")


def build(model: Model) -> bpy.types.Object:
    """The object in the scene: mesh, UV map, painted texture packed in an image, one material."""
    mesh = bpy.data.meshes.new(model.name)
    mesh.from_pydata(model.vertices, [], model.faces.tolist())
    mesh.shade_smooth()
    thing = bpy.data.objects.new(model.name, mesh)
    bpy.context.collection.objects.link(thing)
    unwrap(thing, model.islands, model.closeups)

    points, normals, polygons = texels(mesh, TEXTURE)
    covered = polygons >= 0
    picture = np.zeros((TEXTURE, TEXTURE, 3))
    colors = model.paint(points[covered], normals[covered], model.islands[polygons[covered]])
    picture[covered] = np.clip(colors, 0, 1)
    rgba = np.ones((TEXTURE, TEXTURE, 4), np.float32)
    rgba[..., :3] = bleed(picture, covered)
    image = bpy.data.images.new(f"{model.name} colours", TEXTURE, TEXTURE)
    image.pixels.foreach_set(rgba.ravel())
    image.pack()

    material = bpy.data.materials.new(model.name)
    if not material.node_tree:  # Blender before 5.0
        material.use_nodes = True
    shader = material.node_tree.nodes["Principled BSDF"]
    shader.inputs["Roughness"].default_value = 0.85
    texture = material.node_tree.nodes.new("ShaderNodeTexImage")
    texture.image = image
    material.node_tree.links.new(texture.outputs["Color"], shader.inputs["Base Color"])
    mesh.materials.append(material)
    mesh.transform(Matrix.Translation((0, 0, -model.vertices[:, 2].min())))
    return thing


# ------------------------------------------------------------------------------------------------------------- models


def creature_islands(limbs: list[Limb], vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """UV islands of a body, 4 * limb + 0..3; [Q].

    Round limbs on the middle plane are cut into left and right, all others into two shells.
    """
    limbs = [limb for limb in limbs if limb.parent or limb is limbs[0]]
    centres, normals = face_frames(vertices, faces)
    part = nearest_limb(limbs, centres)
    shells = np.array([limb.mirror or min(limb.squash) < 0.5 for limb in limbs])[part]
    thin = np.array([int(np.argmin(limb.squash)) if min(limb.squash) < 1 else 1 for limb in limbs])[part]
    side = centres[:, 0] > 0
    shell = normals[np.arange(len(part)), thin] > 0
    return majority(part * 4 + side * 2 + (shells & shell), faces)


def majority(labels: np.ndarray, faces: np.ndarray, rounds: int = 6) -> np.ndarray:
    """Labels [Q] with smoother borders: each face takes the commonest label around its corners, several times."""
    for _ in range(rounds):
        votes = np.zeros((faces.max() + 1, labels.max() + 1))
        np.add.at(votes, (faces, labels[:, None]), 1)
        labels = (votes[faces].sum(1) + 0.5 * np.eye(votes.shape[1])[labels]).argmax(1)
    return labels


def fox_cub() -> Model:
    """A fox cub that stands on four legs."""
    limbs = [
        Limb("trunk", [(0, 0.26, 0.46, 0.140), (0, 0.08, 0.46, 0.138), (0, -0.12, 0.48, 0.150),
                       (0, -0.23, 0.60, 0.125)]),
        Limb("head", [(0, -0.33, 0.765, 0.195)], ("trunk", 3), (1.14, 0.98, 0.98), 0.06),
        Limb("snout", [(0, -0.52, 0.705, 0.085), (0, -0.625, 0.705, 0.044)], ("head", 0), blend=0.09),
        Limb("tail", [(0, 0.40, 0.53, 0.055), (0, 0.52, 0.57, 0.080), (0, 0.64, 0.68, 0.120), (0, 0.69, 0.83, 0.098),
                      (0, 0.66, 0.98, 0.020)], ("trunk", 0), blend=0.06),
        Limb("ear", [(0.110, -0.31, 0.92, 0.095), (0.190, -0.30, 1.12, 0.016)], ("head", 0), (1, 0.45, 1), 0.04, True),
        Limb("foreleg", [(0.095, -0.16, 0.36, 0.066), (0.098, -0.14, 0.22, 0.050), (0.100, -0.15, 0.085, 0.043),
                         (0.102, -0.195, 0.045, 0.045)], ("trunk", 2), mirror=True),
        Limb("hindleg", [(0.098, 0.27, 0.36, 0.088), (0.104, 0.23, 0.24, 0.060), (0.106, 0.32, 0.155, 0.043),
                         (0.108, 0.305, 0.080, 0.040), (0.110, 0.255, 0.045, 0.045)], ("trunk", 0), mirror=True),
        Limb("cheek", [(0.12, -0.36, 0.70, 0.090), (0.235, -0.34, 0.665, 0.022)], blend=0.06, mirror=True),
        Limb("forepaw", [(0.100, -0.155, 0.046, 0.046), (0.102, -0.205, 0.046, 0.046)], blend=0.03, mirror=True),
        Limb("hindpaw", [(0.108, 0.305, 0.046, 0.046), (0.110, 0.255, 0.046, 0.046)], blend=0.03, mirror=True),
    ]
    vertices, faces = body(limbs)
    names = [limb.name for limb in limbs]

    def paint(points: np.ndarray, normals: np.ndarray, _: np.ndarray) -> np.ndarray:
        x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
        part = nearest_limb(limbs, points)
        on = {name: part == k for k, name in enumerate(names)}
        face = on["head"] | on["snout"] | on["cheek"]
        ragged = 0.02 * noise(points * [1, 1, 0.5], 40) + 0.01 * noise(points, 90, 1)
        canvas = np.tile(color("#e8782a"), (len(points), 1))
        dab(canvas, "#c9561a", ramp(normals[:, 2], 0.3, 1.0) * ~face * 0.7)  # a darker back
        dab(canvas, "#fff1dc", ramp(normals[:, 2] + 8 * ragged, -0.45, -0.75) * on["trunk"])  # belly
        bib = ramp(x + ragged, 0.10, 0.08) * ramp(normals[:, 1], -0.1, -0.35) * ramp(z, 0.36, 0.40)
        dab(canvas, "#fff6e6", bib * (on["trunk"] | (face & (z < 0.62))))
        mask = ramp(z + 0.9 * ragged - 0.30 * x, 0.70, 0.68) * ramp(y, -0.24, -0.30)
        dab(canvas, "#fff6e6", mask * face)
        dab(canvas, "#3a2019", ramp(z + 1.2 * ragged, 0.22, 0.18))
        tip = z + 0.2 * y + 2 * ragged
        dab(canvas, "#b84a14", ramp(tip, 0.83, 0.93) * on["tail"] * 0.6)
        dab(canvas, "#fff6e6", ramp(tip, 0.94, 0.97) * on["tail"])
        dab(canvas, "#3a2019", ramp(z + ragged, 0.99, 1.03) * on["ear"])
        inner = ramp(normals[:, 1], -0.55, -0.8) * on["ear"] * ramp(z, 0.90, 0.94)
        dab(canvas, "#f7c9a8", inner * ramp(z, 1.05, 1.02))
        canvas *= 1 + 0.05 * noise(points * [1, 0.4, 1], 110, 2)[:, None]
        nose = spot(points, normals, (0, -0.66, 0.725), (0, -1, 0.35), 0.042, 0.032)
        dab(canvas, "#1d1413", ramp(nose, 1.05, 0.92))
        shine = spot(points, normals, (0.010, -0.66, 0.738), (0, -1, 0.5), 0.011, 0.006)
        dab(canvas, "#ffffff", 0.7 * ramp(shine, 1.2, 0.8))
        eye(canvas, points, normals, (0.098, -0.51, 0.800), (0.40, -1, 0.1), 0.054)
        return canvas

    return Model("Fox cub", vertices, faces, creature_islands(limbs, vertices, faces), paint, (4, 6))


def songbird() -> Model:
    """A blue tit with spread wings."""
    limbs = [
        Limb("trunk", [(0, 0.24, 0.30, 0.090), (0, 0.11, 0.30, 0.150), (0, -0.02, 0.33, 0.165),
                       (0, -0.13, 0.38, 0.155)]),
        Limb("head", [(0, -0.19, 0.510, 0.156), (0, -0.20, 0.550, 0.156)], ("trunk", 3), (1.06, 1, 1), 0.10),
        Limb("beak", [(0, -0.36, 0.525, 0.038), (0, -0.435, 0.505, 0.010)], ("head", 0), blend=0.02),
        Limb("tail", [(0, 0.36, 0.33, 0.095), (0, 0.48, 0.35, 0.120), (0, 0.60, 0.38, 0.140)],
             ("trunk", 0), (1, 1, 0.22), 0.06),
        Limb("wing", [(0.20, 0.04, 0.43, 0.140), (0.36, 0.06, 0.53, 0.175), (0.51, 0.11, 0.61, 0.150),
                      (0.64, 0.18, 0.67, 0.095), (0.72, 0.25, 0.70, 0.030)], ("trunk", 2), (1, 1, 0.2), 0.06, True),
        Limb("leg", [(0.070, 0.09, 0.15, 0.030), (0.074, 0.09, 0.070, 0.020), (0.078, 0.03, 0.022, 0.022)],
             ("trunk", 1), blend=0.03, mirror=True),
        Limb("toes", [(0.074, 0.100, 0.020, 0.018), (0.080, -0.010, 0.020, 0.020)], blend=0.03, mirror=True),
        Limb("outer toe", [(0.076, 0.060, 0.018, 0.017), (0.125, 0.005, 0.017, 0.017)], blend=0.03, mirror=True),
    ]
    vertices, faces = body(limbs)
    names = [limb.name for limb in limbs]

    def paint(points: np.ndarray, normals: np.ndarray, _: np.ndarray) -> np.ndarray:
        x, y, z = np.abs(points[:, 0]), points[:, 1], points[:, 2]
        part = nearest_limb(limbs, points)
        on = {name: part == k for k, name in enumerate(names)}
        ragged = 0.012 * noise(points, 45) + 0.006 * noise(points, 100, 1)
        canvas = np.tile(color("#f6cf2e"), (len(points), 1))
        dab(canvas, "#fff3c4", on["trunk"] * ramp(z + ragged, 0.20, 0.17))
        behind = ramp(z + ragged, 0.38, 0.40) * ramp(y, -0.10, -0.06)
        back = np.maximum(ramp(normals[:, 2] + 6 * ragged, 0.20, 0.40), behind)
        dab(canvas, "#7fa05a", (on["trunk"] | on["wing"]) * back)

        head = on["head"] | (on["trunk"] & (z > 0.44) & (y < -0.13))
        dab(canvas, "#fdfbf3", head * ramp(z + ragged, 0.455, 0.465))
        dab(canvas, "#2459b8", head * ramp(z + ragged + 0.16 * (y + 0.24), 0.612, 0.619))
        band = np.abs(z + 0.5 * ragged - 0.553 + 0.05 * (y + 0.30))
        dab(canvas, "#16264f", head * ramp(band, 0.020, 0.014))
        dab(canvas, "#2459b8", head * ramp(normals[:, 1], 0.45, 0.55) * ramp(z + ragged, 0.50, 0.51))
        eye(canvas, points, normals, (0.092, -0.33, 0.556), (0.62, -1, 0.1), 0.046)
        dab(canvas, "#3b3a40", on["beak"].astype(float))

        wing = on["wing"] * ramp(chain_distance(limbs[0], points) + 0.5 * ragged, 0.035, 0.045)
        tail = on["tail"]
        dab(canvas, "#2f6fd0", wing)
        trailing = y - 0.07 + ragged - 0.40 * np.maximum(x - 0.40, 0)
        feathers = 0.5 + 0.5 * np.cos(2 * math.pi * (x - 0.25 * y) / 0.075)
        dab(canvas, "#173a86", wing * ramp(trailing, 0.050, 0.065) * (0.55 + 0.45 * feathers))
        bar = np.abs(trailing - 0.040)
        dab(canvas, "#ffffff", wing * ramp(bar, 0.016, 0.010) * ramp(x, 0.19, 0.22) * ramp(x, 0.54, 0.50))
        armpit = ramp(normals[:, 2], -0.2, -0.5) * ramp(trailing, 0.04, 0.02) * ramp(x, 0.42, 0.32)
        dab(canvas, "#f6cf2e", wing * armpit)
        dab(canvas, "#2f6fd0", tail * ramp(y, 0.32, 0.36))
        barbs = 0.5 + 0.5 * np.cos(2 * math.pi * x / 0.05)
        dab(canvas, "#173a86", tail * ramp(y, 0.42, 0.52) * (0.4 + 0.6 * barbs))
        dab(canvas, "#ffffff", tail * ramp(y + 0.5 * ragged, 0.700, 0.710) * 0.9)
        dab(canvas, "#4d5a78", (on["leg"] | on["toes"] | on["outer toe"]).astype(float))
        canvas *= 1 + 0.04 * noise(points, 120, 2)[:, None]
        return canvas

    return Model("Songbird", vertices, faces, creature_islands(limbs, vertices, faces), paint, (4, 6))


def lathe(profile: list[tuple[float, float]], segments: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """A closed surface of revolution about z; the profile [K, 2] of radius and height runs from axis to axis.

    The caps are quads too: each takes two segments. Vertices [N, 3], faces [Q, 4].
    """
    angles = 2 * math.pi * np.arange(segments) / segments
    rings = [np.stack([r * np.cos(angles), r * np.sin(angles), np.full(segments, z)], 1) for r, z in profile[1:-1]]
    vertices = np.concatenate([*rings, [(0, 0, profile[0][1]), (0, 0, profile[-1][1])]])
    step = np.arange(segments)
    following = (step + 1) % segments
    band = np.stack([step, following, following + segments, step + segments], 1)
    faces = [band + k * segments for k in range(len(rings) - 1)]
    even = np.arange(0, segments, 2)
    last = (len(rings) - 1) * segments
    bottom, top = np.full(len(even), len(vertices) - 2), np.full(len(even), len(vertices) - 1)
    faces.append(np.stack([bottom, (even + 2) % segments, even + 1, even], 1))
    faces.append(np.stack([top, even + last, even + 1 + last, (even + 2) % segments + last], 1))
    return vertices, np.concatenate(faces)


def petal(inner: float, length: float, width: float, rise: float) -> tuple[np.ndarray, np.ndarray]:
    """A closed petal that grows along +x from radius `inner`, bent by `rise` along z; vertices [N, 3], faces [Q, 4]."""
    along, across, thickness = 7, 4, 0.014
    t, s = np.meshgrid(np.linspace(0, 1, along + 1), np.linspace(-1, 1, across + 1), indexing="ij")
    half = width / 2 * (0.30 + 0.70 * np.sin(math.pi * np.minimum(t / 1.15 + 0.13, 1) ** 1.2)) * np.sqrt(1.02 - t**6)
    x, y = inner + length * t - 0.10 * length * t**4 * s**2, half * s
    z = rise * t * (1 - 0.6 * t) + 0.25 * half * s**2 * (1 - t)
    bulge = thickness * np.sqrt(np.maximum(1 - s**2, 0)) * np.sqrt(np.clip(4.5 * t * (1 - t), 0, 1))
    rim = (bulge == 0) | (t == 0) | (t == 1)
    front = np.arange(t.size).reshape(t.shape)
    back = front.copy()
    back[~rim] = t.size + np.arange((~rim).sum())
    upper = np.stack([x, y, z + bulge / 2], -1).reshape(-1, 3)
    lower = np.stack([x, y, z - bulge / 2], -1)[~rim]

    def quads(grid: np.ndarray) -> np.ndarray:
        return np.stack([grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]], -1).reshape(-1, 4)

    return np.concatenate([upper, lower]), np.concatenate([quads(front), quads(back)[:, ::-1]])


def sunflower() -> Model:
    """A smiling sunflower in a pot."""
    limbs = [
        Limb("stem", [(0, 0.03, 0.22, 0.032), (0.012, 0.04, 0.37, 0.029), (0.010, 0.05, 0.52, 0.027),
                      (0, 0.045, 0.66, 0.025), (0, 0.01, 0.79, 0.026), (0, -0.03, 0.86, 0.030)]),
        Limb("right leaf", [(0.115, 0.02, 0.435, 0.034), (0.19, -0.005, 0.48, 0.072), (0.28, -0.04, 0.50, 0.066),
                            (0.37, -0.075, 0.47, 0.012)], ("stem", 1), (1, 1, 0.24), 0.03),
        Limb("left leaf", [(-0.10, 0.03, 0.585, 0.034), (-0.17, 0.005, 0.635, 0.066), (-0.25, -0.02, 0.655, 0.060),
                           (-0.33, -0.05, 0.625, 0.012)], ("stem", 2), (1, 1, 0.24), 0.03),
        Limb("right stalk", [(0.012, 0.04, 0.37, 0.016), (0.16, 0.005, 0.465, 0.014)], blend=0.02),
        Limb("left stalk", [(0.010, 0.05, 0.52, 0.016), (-0.14, 0.015, 0.615, 0.014)], blend=0.02),
    ]
    facing = np.array([0, -0.95, 0.31])
    turn = np.stack([[1, 0, 0], np.cross(facing, [1, 0, 0]), facing], 1)  # columns: the flower's x, y and z
    centre = np.array([0, -0.055, 0.875])

    plant, plant_faces = body(limbs)
    parts = [(plant, plant_faces, creature_islands(limbs, plant, plant_faces))]
    pot, pot_faces = lathe([(0, 0), (0.13, 0), (0.148, 0.008), (0.165, 0.07), (0.182, 0.14), (0.197, 0.205),
                            (0.222, 0.210), (0.230, 0.225), (0.232, 0.270), (0.222, 0.282), (0.205, 0.280),
                            (0.197, 0.250), (0.11, 0.262), (0, 0.266)], 28)
    pot_centres, pot_normals = face_frames(pot, pot_faces)
    wall = np.where(np.hypot(pot_centres[:, 0], pot_centres[:, 1]) < 0.2, 0, 2) + (pot_centres[:, 1] > 0)
    soil = (pot_normals[:, 2] > 0.8) & (pot_centres[:, 2] < 0.278)
    parts.append((pot, pot_faces, 20 + np.where(soil, 5, np.where(pot_normals[:, 2] < -0.95, 4, wall))))
    disc, disc_faces = lathe([(0, -0.055), (0.05, -0.052), (0.10, -0.035), (0.142, -0.010), (0.150, 0.010),
                              (0.140, 0.028), (0.11, 0.048), (0.06, 0.060), (0, 0.064)], 28)
    _, disc_normals = face_frames(disc, disc_faces)
    parts.append((disc @ turn.T + centre, disc_faces, 30 + (disc_normals[:, 2] < 0)))
    for ring, (count, inner, length, width, rise, lift) in enumerate(
        [(14, 0.118, 0.160, 0.088, 0.190, 0.010), (14, 0.110, 0.185, 0.092, -0.010, -0.008)]
    ):
        blade, blade_faces = petal(inner, length, width, rise)
        for k in range(count):
            angle = 2 * math.pi * (k + 0.5 * ring) / count
            spin = np.array([[math.cos(angle), math.sin(angle), 0], [-math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
            back = np.arange(len(blade_faces)) >= len(blade_faces) // 2
            place = (blade @ spin + [0, 0, lift]) @ turn.T + centre
            parts.append((place, blade_faces, 40 + 2 * (14 * ring + k) + back))
    starts = np.cumsum([0] + [len(part[0]) for part in parts[:-1]])
    vertices = np.concatenate([part[0] for part in parts])
    faces = np.concatenate([part[1] + start for part, start in zip(parts, starts)])

    def paint(points: np.ndarray, normals: np.ndarray, islands: np.ndarray) -> np.ndarray:
        local = (points - centre) @ turn
        radius, angle = np.hypot(local[:, 0], local[:, 1]), np.arctan2(local[:, 1], local[:, 0])
        ragged = 0.01 * noise(points, 50) + 0.005 * noise(points, 110, 1)
        canvas = np.tile(color("#5fa03a"), (len(points), 1))  # stem and leaves
        leaf = (islands > 3) & (islands < 20)
        dab(canvas, "#3f7f2c", (0.5 + 0.5 * noise(points, 25, 3)) * 0.6)
        rib = np.minimum(np.abs(points[:, 1] - 0.064 + 0.36 * np.abs(points[:, 0])), 1)
        dab(canvas, "#a9d46a", leaf * ramp(rib, 0.010, 0.004) * 0.8)

        pot_part = (islands >= 20) & (islands < 30)
        height, around = points[:, 2], np.arctan2(points[:, 0], -points[:, 1])
        dab(canvas, "#cf6a3c", pot_part.astype(float))
        dab(canvas, "#b9562c", pot_part * ramp(height, 0.09, 0.0) * 0.6)
        dab(canvas, "#e07f4c", pot_part * ramp(height, 0.206, 0.212))
        zigzag = np.abs((around / (2 * math.pi) * 14) % 1 - 0.5) * 0.07 + 0.095
        dab(canvas, "#fff2d8", pot_part * ramp(np.abs(height - zigzag), 0.013, 0.010) * (islands < 22))
        dab(canvas, "#4a2f22", (islands == 25).astype(float))
        dab(canvas, "#2f1c14", (islands == 25) * ramp(noise(points, 90, 4), 0.1, 0.3) * 0.8)

        front, back = islands == 30, islands == 31
        dab(canvas, "#4d8a30", back.astype(float))
        dab(canvas, "#5a3115", front.astype(float))
        seeds = np.sin(radius * 330) * np.sin(angle * 24 + np.floor(radius * 330 / math.pi) * math.pi / 2)
        dab(canvas, "#8a5222", front * ramp(seeds, 0.2, 0.5))
        dab(canvas, "#c98a3a", front * ramp(radius + 0.3 * ragged, 0.108, 0.102))
        for side in (1, -1):
            cheek = np.hypot(local[:, 0] - side * 0.066, (local[:, 1] + 0.018) * 1.3)
            dab(canvas, "#ef8a5c", front * ramp(cheek, 0.026, 0.012) * 0.8)
        mouth = np.abs(np.hypot(local[:, 0], local[:, 1] - 0.012) - 0.038)
        dab(canvas, "#3a1a10", front * ramp(mouth, 0.0065, 0.0045) * (local[:, 1] < -0.008))
        place = centre + turn @ [0.042, 0.028, 0.058]
        eye(canvas, points, np.where(front[:, None], normals, -facing), tuple(place), tuple(facing), 0.023)

        petals = islands >= 40
        t = ramp(radius, 0.13, 0.29)
        dab(canvas, "#f28c13", petals.astype(float))
        dab(canvas, "#ffd02b", petals * np.sqrt(t))
        slot = (islands - 40) // 2
        middle = 2 * math.pi * (slot % 14 + 0.5 * (slot // 14)) / 14
        offset = radius * np.sin(angle - middle)
        dab(canvas, "#e98a10", petals * ramp(np.cos(offset * 420), 0.6, 1.0) * 0.35 * (1 - t))
        dab(canvas, "#e8a01c", petals * (slot >= 14) * 0.45)
        dab(canvas, "#d99a1e", petals * (islands % 2) * 0.25)
        return canvas

    return Model("Sunflower", vertices, faces, np.concatenate([part[2] for part in parts]), paint, (30,))


MODELS: dict[str, Callable[[], Model]] = {"fox_cub": fox_cub, "songbird": songbird, "sunflower": sunflower}


def make(name: str, folder: Path) -> Path:
    """Writes one model as `folder`/`name`.glb and returns that path."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    build(MODELS[name]())
    path = folder / f"{name}.glb"
    bpy.ops.export_scene.gltf(filepath=str(path), export_format="GLB", export_image_format="JPEG",
                              export_image_quality=90, export_animations=False)
    return path


def picture(folder: Path, path: Path) -> None:
    """Renders the models of `folder` side by side with Cycles, 1000 x 400 pixels, as the PNG file `path`."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    for name, x, turn in (("fox_cub", -1.42, 38), ("songbird", 0, 14), ("sunflower", 1.26, -10)):
        bpy.ops.import_scene.gltf(filepath=str(folder / f"{name}.glb"))
        bpy.context.object.location.x = x
        bpy.context.object.rotation_mode = "XYZ"
        bpy.context.object.rotation_euler.z = math.radians(turn)
    backdrop = bpy.data.meshes.new("backdrop")
    curve = [(-9.0, 0.0), (1.6, 0.0), (2.2, 0.12), (2.6, 0.45), (2.8, 1.0), (2.8, 6.0)]  # y, z
    vertices = [(x, y, z) for y, z in curve for x in (-12, 12)]
    backdrop.from_pydata(vertices, [], [(2 * k, 2 * k + 1, 2 * k + 3, 2 * k + 2) for k in range(len(curve) - 1)])
    backdrop.shade_smooth()
    paper = bpy.data.materials.new("paper")
    paper.diffuse_color = (0.8, 0.8, 0.8, 1)
    backdrop.materials.append(paper)
    scene.collection.objects.link(bpy.data.objects.new("backdrop", backdrop))

    def add(data: bpy.types.ID, place: tuple, look_at: tuple = (0, 0, 0.5)) -> bpy.types.Object:
        thing = bpy.data.objects.new(data.name, data)
        thing.location = place
        thing.rotation_euler = (Vector(look_at) - Vector(place)).to_track_quat("-Z", "Y").to_euler()
        scene.collection.objects.link(thing)
        return thing

    warm, cool, white = (1, 0.95, 0.88), (0.88, 0.94, 1), (1, 1, 1)
    for place, size, energy, tint in (((-3.0, -3.5, 4.5), 2.0, 330, warm), ((4.5, -4, 2.5), 3.0, 150, cool),
                                      ((0, 2.2, 4.5), 2.0, 110, white)):
        lamp = bpy.data.lights.new("lamp", "AREA")
        lamp.size, lamp.energy, lamp.color = size, energy, tint
        add(lamp, place)
    camera = bpy.data.cameras.new("camera")
    camera.lens = 70
    scene.camera = add(camera, (0, -8.3, 1.75), (0, 0, 0.53))
    scene.world = bpy.data.worlds.new("world")
    render = scene.render
    render.engine, scene.cycles.samples = "CYCLES", 48
    scene.cycles.use_denoising = True
    scene.view_settings.view_transform = "Standard"
    render.resolution_x, render.resolution_y, render.resolution_percentage = 1000, 400, 100
    render.image_settings.file_format, render.image_settings.compression = "PNG", 100
    render.image_settings.color_mode = "RGB"
    render.filepath = str(path.resolve())
    bpy.ops.render.render(write_still=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(MODELS), help="make just this model")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the .glb files (default: beside the script)")
    parser.add_argument("--picture", type=Path, metavar="PNG", help="also render the three models side by side")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else MODELS:
        path = make(name, options.out)
        print(f"{path}  {path.stat().st_size / 1024:.0f} kB")
    if options.picture:
        picture(options.out, options.picture)


if __name__ == "__main__":
    main()
