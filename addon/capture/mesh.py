"""The mesh part of a capture: a snapshot of the objects' geometry, colours and transforms, taken from copies.

Capture space is the world with the first object's location and its turn about the vertical taken away, so that "front
-Y" means the object's own -Y wherever it stands. `Snapshot.to_world` goes back.

Which vertices are captured: always those of the object's own data, one for one, because shape keys move these. Their
places are those after the modifiers, up to the first modifier that changes the number of vertices; Subdivision, Mirror,
... stay and work on top of the motion.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.space import canonical_similarity

from .. import actions, marks
from ..slices import finished, in_background
from .colors import BaseColors, Pixels, Surface, corner_vertices, decode, first_corners, read_pixels, read_surface

TIME_DEPENDENT = {
    "BUILD",
    "CLOTH",
    "DYNAMIC_PAINT",
    "EXPLODE",
    "FLUID",
    "MESH_CACHE",
    "MESH_SEQUENCE_CACHE",
    "SOFT_BODY",
    "WAVE",
}
STEP = 1e-3  # of the object's size; by which vertices are moved to see what the modifiers do with a motion


@dataclass(frozen=True)
class ObjectSnapshot:
    """One object as it was captured.

    Attributes:
        name: of the object.
        session_uid: finds the object again after it was renamed.
        count: vertices of its own data.
        topology: hash of its polygons.
        matrix_world: [4, 4] float64, from its own space into the world.
        unbend: [N, 3, 3] float32, from displacements after the modifiers to those before; None where both are the same.
    """

    name: str
    session_uid: int
    count: int
    topology: str
    matrix_world: np.ndarray
    unbend: np.ndarray | None


@dataclass(frozen=True)
class Snapshot:
    """What was captured, and all that is needed to bring a result back onto the objects.

    Attributes:
        objects: in the order of the vertices.
        to_world: [4, 4] float64, from capture space to the world; a turn about Z and a translation.
        vertices: [N, 3] float32 in capture space.
        faces: [T, 3] int32; uvs: [T, 3, 2] float32; materials: [T] int32, index into `textures`.
        textures: uint8 [h, w, 3] sRGB, top row first.
        warnings: {"code", "message", "action"} of what the user should know.
    """

    objects: tuple[ObjectSnapshot, ...]
    to_world: np.ndarray
    vertices: np.ndarray
    faces: np.ndarray
    uvs: np.ndarray
    materials: np.ndarray
    textures: list[np.ndarray]
    warnings: list[dict[str, str]]

    def slices(self) -> Iterator[tuple[ObjectSnapshot, slice]]:
        """Each object with its part of the vertices."""
        start = 0
        for item in self.objects:
            yield item, slice(start, start + item.count)
            start += item.count


def topology_hash(mesh: bpy.types.Mesh) -> str:
    """A hash of the number of vertices and of the polygons' corners; the places of the vertices don't matter."""
    corners, starts = corner_vertices(mesh), first_corners(mesh)
    return hashlib.sha256(f"{len(mesh.vertices)}:".encode() + corners.tobytes() + starts.tobytes()).hexdigest()[:32]


def positions(mesh: bpy.types.Mesh) -> np.ndarray:
    """Vertices of a mesh in its own space; [N, 3] float32."""
    co = np.empty(len(mesh.vertices) * 3, np.float32)
    if len(co):
        mesh.attributes["position"].data.foreach_get("vector", co)  # 100 times as fast as `vertices`
    return co.reshape(-1, 3)


def set_positions(mesh: bpy.types.Mesh, co: np.ndarray) -> None:
    """Moves all vertices of a mesh without shape keys."""
    mesh.vertices.foreach_set("co", np.ascontiguousarray(co, np.float32).ravel())
    mesh.update()


def find_objects(wanted: Sequence[bpy.types.Object] | Snapshot) -> list[bpy.types.Object]:
    """The objects of a snapshot, also when they were renamed since; objects are handed through.

    Raises:
        InputError: object_missing.
    """
    if not isinstance(wanted, Snapshot):
        return list(wanted)
    return find_again([(item.session_uid, item.name) for item in wanted.objects])


def find_again(known: Sequence[tuple[int, str]]) -> list[bpy.types.Object]:
    """Objects by session_uid, else by name: references don't outlive a pause, in which the user may undo or load a file.

    Raises:
        InputError: object_missing.
    """
    by_uid = {obj.session_uid: obj for obj in bpy.data.objects}
    found = []
    for uid, name in known:
        obj = by_uid.get(uid) or bpy.data.objects.get(name)
        if obj is None:
            raise InputError("object_missing", f"The object '{name}' is no longer there.", "Undo its deletion and try again.")
        found.append(obj)
    return found


def known_objects(objects: Sequence[bpy.types.Object]) -> list[tuple[int, str]]:
    """What `find_again` finds the objects by; of those that share a mesh the first one, since the others move like it.

    Raises:
        InputError: no_mesh_selected, wrong_object_type, linked_data, absolute_shape_keys, already_animated.
    """
    _check_objects(objects)
    distinct = list({obj.data: obj for obj in reversed(objects)}.values())[::-1]
    return [(obj.session_uid, obj.name) for obj in distinct]


def snapshot(objects: Sequence[bpy.types.Object]) -> Snapshot:
    """Looks at the objects at the current frame and checks that they can be animated; they stay untouched.

    What moves them already goes on doing so, and the motion comes on top. Of objects that share a mesh the first one counts:
    the others move like it.

    Args:
        objects: mesh objects; the first one's turn about the vertical and its location define capture space.

    Raises:
        InputError: no_mesh_selected, wrong_object_type, linked_data, absolute_shape_keys, already_animated, empty_mesh,
            too_few_vertices, no_faces, not_finite, flat_transform, degenerate_mesh, zero_area.
    """
    return _put_together(*finished(_look(known_objects(objects))))


def snapshot_steps(known: Sequence[tuple[int, str]]) -> Generator[None, None, Snapshot]:
    """`snapshot` in slices; during a pause nothing of it is in `bpy.data`.

    Args:
        known: the objects, as `known_objects` gives them.

    Raises:
        InputError: also object_missing and changed_during_capture, when an object is changed during a pause.
    """
    return (yield from in_background(_put_together, *(yield from _look(known))))


@dataclass
class _Look:
    """What was read of one object: from here on it is arithmetic.

    Attributes:
        obj: name, session_uid and number of users of the mesh.
        topology: hash of its polygons.
        points: [N, 3] float32 after the modifiers, in its own space; polygons: their number.
        nudged: the same with all vertices moved by `STEP` of the size along X, Y, Z; empty where modifiers bend nothing.
        size: of the mesh before the modifiers.
    """

    name: str
    session_uid: int
    users: int
    topology: str
    matrix_world: np.ndarray
    points: np.ndarray
    polygons: int
    surface: Surface
    moved_by: str
    size: float
    nudged: list[np.ndarray] = field(default_factory=list)


def _look(known: Sequence[tuple[int, str]]) -> Generator[None, None, tuple[list[_Look], dict[int, Pixels | None]]]:
    """Reads the objects, and their images by session_uid; pauses after each."""
    looks: list[_Look] = []
    for one in known:
        with plain_copies(find_again([one])) as copies:
            (copy,) = copies.items
            looks.append(
                _Look(
                    copy.obj.name, copy.obj.session_uid, copy.obj.data.users, topology_hash(copy.own), copy.matrix_world,
                    copy.positions, len(copy.mesh.polygons), read_surface(copy.mesh), _animation_of(copy.obj), copy.size,
                )
            )  # fmt: skip
            axes = range(3) if copy.bent else ()
        yield
        for axis in axes:
            with plain_copies(find_again([one]), nudge=axis) as copies:
                looks[-1].nudged.append(copies.items[0].positions)
            yield
    pixels: dict[int, Pixels | None] = {}
    for image in (coat.image for look in looks for coat in look.surface.coats.values()):
        if image is not None and image.session_uid not in pixels:
            count = decode(image)
            yield
            # Memory that has been written to once: the system's giving it takes ten times as long as the copy into it.
            room = yield from in_background(np.full, count, 0, np.float32)
            pixels[image.session_uid] = read_pixels(image, room)
            yield
    return looks, pixels


def _put_together(looks: list[_Look], pixels: dict[int, Pixels | None]) -> Snapshot:
    """The snapshot from what was read; touches no `bpy`."""
    to_world = upright_frame(looks[0].matrix_world)
    from_world = np.linalg.inv(to_world)
    colors, vertices, faces, uvs, materials, items, start = BaseColors(pixels), [], [], [], [], [], 0
    for look in looks:
        matrix = from_world @ look.matrix_world
        points = (look.points.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]).astype(np.float32)
        _check_geometry(look, points)
        surface = look.surface.cut(look.points)
        corners = surface.triangles
        corner_uvs, material = colors.paint(surface, look.name)
        _check_area(look, points, corners)
        if np.linalg.det(matrix[:3, :3]) < 0:  # mirrored: keep the outside outside
            corners, corner_uvs = corners[:, ::-1], corner_uvs[:, ::-1]
        vertices.append(points)
        faces.append(corners + start)
        uvs.append(corner_uvs)
        materials.append(material)
        start += len(points)
        items.append(ObjectSnapshot(look.name, look.session_uid, len(points), look.topology, look.matrix_world, _unbend(look)))
    joined = np.concatenate(vertices)
    canonical_similarity(joined)  # refuses what has no extent
    warnings = list(colors.warnings)
    if len(items) > 1:
        warnings.append(
            {
                "code": "several_objects",
                "message": f"{len(items)} objects are animated together as one.",
                "action": "Animate them one by one if they shall move on their own.",
            }
        )
    for look in looks:
        if look.moved_by:
            warnings.append(
                {
                    "code": "animation_layered",
                    "message": f"'{look.name}' is already animated by {look.moved_by}; the new motion comes on top of it.",
                    "action": "Remove that animation first if the new motion shall stand alone.",
                }
            )
        if look.users > 1:
            warnings.append(
                {
                    "code": "shared_mesh",
                    "message": f"The mesh of '{look.name}' has {look.users} users; all of them will move.",
                    "action": "Use Object > Relations > Make Single User first.",
                }
            )
    return Snapshot(
        tuple(items),
        to_world,
        joined,
        np.ascontiguousarray(np.concatenate(faces), np.int32),
        np.ascontiguousarray(np.concatenate(uvs), np.float32),
        np.concatenate(materials).astype(np.int32),
        colors.textures,
        warnings,
    )


def _unbend(look: _Look) -> np.ndarray | None:
    """The inverse of what the modifiers do with a motion, [N, 3, 3] float32; None where they let it pass.

    Raises:
        InputError: changed_during_capture.
    """
    if not look.nudged:
        return None
    if any(nudged.shape != look.points.shape for nudged in look.nudged):
        raise changed(look.name)
    bent = look.points.astype(np.float64)
    jacobian = np.stack([nudged - bent for nudged in look.nudged], -1) / (STEP * look.size)  # [N, 3, 3]
    return np.linalg.pinv(jacobian, rcond=1e-3).astype(np.float32)


def changed(name: str) -> InputError:
    """The error of an object that isn't any more what it was when its capture began."""
    return InputError("changed_during_capture", f"'{name}' was changed while it was captured.", "Start again.")


# Checks


CONVERTIBLE = {"CURVE", "CURVES", "SURFACE", "META", "FONT"}
INSTEAD = {
    "EMPTY": "Select a mesh; if it shows a collection, use Object > Apply > Make Instances Real first.",
    "VOLUME": "Turn it into a mesh with the modifier 'Volume to Mesh'.",
}


def _check_objects(objects: Sequence[bpy.types.Object]) -> None:
    if not objects:
        raise InputError("no_mesh_selected", "No mesh object is selected.", "Select the object to animate.")
    for obj in objects:
        if obj.type != "MESH":
            kind = obj.bl_rna.properties["type"].enum_items[obj.type].name
            action = "Use Object > Convert > Mesh." if obj.type in CONVERTIBLE else INSTEAD.get(obj.type, "Select a mesh.")
            raise InputError("wrong_object_type", f"'{obj.name}' is of type {kind}, not a mesh.", action)
        if marks.CLOUD in obj:
            raise InputError(
                "wrong_object_type", f"'{obj.name}' is a Gaussian cloud, not a mesh.", "Select the object that it belongs to."
            )
        if obj.library or obj.data.library:
            raise InputError(
                "linked_data",
                f"'{obj.name}' is linked from another file and can't be changed.",
                "Use Object > Relations > Make Local > Selected Objects and Data.",
            )
        keys = obj.data.shape_keys
        if keys and not keys.use_relative:
            raise InputError(
                "absolute_shape_keys",
                f"The shape keys of '{obj.name}' are absolute.",
                "Switch on 'Relative' in the shape key panel.",
            )
        ours = {record["modifier"] for record in marks.caches(obj).values()}
        for modifier in obj.modifiers:
            if modifier.type in TIME_DEPENDENT and modifier.show_viewport and modifier.name not in ours:
                raise InputError(
                    "already_animated",
                    f"'{obj.name}' is already animated by the modifier '{modifier.name}', which leaves no room for a motion.",
                    "Switch that modifier off, or apply it.",
                )


def _animation_of(obj: bpy.types.Object) -> str:
    """What moves the object's vertices or itself by keyframes, in words; empty when nothing does."""
    for owner, what in ((obj, ""), (obj.data, " of its mesh"), (obj.data.shape_keys, " of its shape keys")):
        found = _action_of(owner, marks.own_paths(owner) if isinstance(owner, bpy.types.Key) else set())
        if found:
            return found + what
    for modifier in obj.modifiers:
        if not modifier.show_viewport:
            continue
        for name, prop in modifier.bl_rna.properties.items():
            target = getattr(modifier, name) if prop.type == "POINTER" else None
            if isinstance(target, bpy.types.Object):
                found = _action_of(target) or _action_of(target.data)
                if found:
                    return f"{found} of '{target.name}' through the modifier '{modifier.name}'"
    return ""


def _action_of(owner: bpy.types.ID | None, ours: Collection[str] = frozenset()) -> str:
    data = getattr(owner, "animation_data", None)
    if data is None:
        return ""
    if data.action and any(curve.data_path not in ours for curve in actions.fcurves(owner)):
        return f"the action '{data.action.name}'"
    strips = [strip.name for track in data.nla_tracks if not track.mute for strip in track.strips]
    return f"the NLA strip '{strips[0]}'" if strips else ""


def _check_geometry(look: _Look, points: np.ndarray) -> None:
    name = look.name
    if len(points) == 0:
        raise InputError("empty_mesh", f"'{name}' has no vertices.", "Select an object with a surface.")
    if len(points) < 3:
        raise InputError("too_few_vertices", f"'{name}' has {len(points)} vertices.", "Select an object with a surface.")
    if look.polygons == 0:
        raise InputError(
            "no_faces",
            f"'{name}' has {len(points)} vertices but no faces.",
            "Fill it with faces, or select another object.",
        )
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points).all(1)).sum())
        raise InputError(
            "not_finite",
            f"{bad} vertices of '{name}' have coordinates that are not finite.",
            "Delete them, or undo the modifier that made them.",
        )
    scales = np.linalg.svd(look.matrix_world[:3, :3], compute_uv=False)
    if scales[-1] < 1e-8 * max(scales[0], 1e-30):
        raise InputError("flat_transform", f"The scale of '{name}' is zero along an axis.", "Give it a scale that isn't zero.")
    if np.ptp(points, axis=0).max() <= 1e-9:
        raise InputError("degenerate_mesh", f"All vertices of '{name}' lie in one point.", "Select an object with a surface.")


def _check_area(look: _Look, points: np.ndarray, corners: np.ndarray) -> None:
    a, b, c = (points[corners[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    if area < 1e-9 * np.ptp(points, axis=0).max() ** 2:
        raise InputError(
            "zero_area", f"The faces of '{look.name}' have no area: it is a line.", "Select an object with a surface."
        )


# Capture space


def upright_frame(matrix_world: np.ndarray) -> np.ndarray:
    """Location and turn about world Z of an object's matrix; [4, 4] float64, rigid.

    The turn is the twist part of the rotation. A mirrored matrix is a rotation times the mirroring of one axis: of the
    three ways to write it, the one that tilts the object least is taken.
    """
    left, _, right = np.linalg.svd(matrix_world[:3, :3])
    rotation = left @ right  # the nearest orthogonal matrix
    mirrors = [np.eye(3)] if np.linalg.det(rotation) > 0 else [np.diag(1.0 - 2.0 * np.eye(3)[k]) for k in range(3)]
    # With the quaternion (w, x, y, z) of R: R10 - R01 = 4 w z and R00 + R11 = 2 (w² - z²); the twist is 2 atan2(z, w).
    upright = max((rotation @ mirror for mirror in mirrors), key=lambda r: (round(r[2, 2], 6), round(r[0, 0] + r[1, 1], 6)))
    sine, cosine = upright[1, 0] - upright[0, 1], upright[0, 0] + upright[1, 1]
    yaw = math.atan2(sine, cosine) if math.hypot(sine, cosine) > 1e-6 else 0.0
    frame = np.eye(4)
    frame[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    frame[:3, 3] = matrix_world[:3, 3]
    return frame


# Copies


@dataclass
class PlainCopy:
    """A copy of an object that nothing deforms any more.

    Attributes:
        obj: the original.
        mesh: the evaluated mesh with the original's materials, as many vertices as the original's own data.
        positions: [N, 3] float32, in the object's own space.
        matrix_world: [4, 4] float64 of the original.
        own: the mesh before the modifiers; size: its extent.
        bent: the modifiers move vertices.
    """

    obj: bpy.types.Object
    mesh: bpy.types.Mesh
    positions: np.ndarray
    matrix_world: np.ndarray
    own: bpy.types.Mesh | None = None
    size: float = 0.0
    bent: bool = False


@dataclass
class PlainCopies:
    """A temporary scene and the copies that were made in it.

    Attributes:
        scene: no object of the user is in it.
        items: in the order of the objects.
        temporary: whatever is put here is removed at the end.
    """

    scene: bpy.types.Scene
    items: list[PlainCopy]
    temporary: list[bpy.types.ID]


@contextmanager
def plain_copies(objects: Sequence[bpy.types.Object], nudge: int | None = None) -> Iterator[PlainCopies]:
    """Copies of the objects, evaluated in a temporary scene; at the end all of it is removed, whatever happens.

    Args:
        objects: mesh objects.
        nudge: an axis along which all vertices are moved by `STEP` of the size before the modifiers, to see what these do.
    """
    scene = bpy.data.scenes.new(".Track4D")
    copies = PlainCopies(scene, [], [scene])
    try:
        scene.frame_current, scene.frame_subframe = bpy.context.scene.frame_current, bpy.context.scene.frame_subframe
        for obj in objects:
            copies.items.append(_plain_copy(obj, copies, nudge))
        yield copies
    finally:
        bpy.data.batch_remove(copies.temporary)


def _plain_copy(obj: bpy.types.Object, copies: PlainCopies, nudge: int | None) -> PlainCopy:
    obj.update_from_editmode()  # does nothing outside of edit mode, and doesn't leave it
    copy = obj.copy()
    copies.temporary.append(copy)
    copy.data = obj.data.copy()
    copies.temporary.append(copy.data)
    copies.scene.collection.objects.link(copy)
    copy.hide_viewport = False
    copy.show_only_shape_key = False
    layer = copies.scene.view_layers[0]

    def evaluate() -> bpy.types.Object:
        copy.data.update_tag()
        layer.update()
        return copy.evaluated_get(layer.depsgraph)

    ours = {record["modifier"] for record in marks.caches(obj).values()}
    stack = [modifier.name for modifier in copy.modifiers if modifier.show_viewport and modifier.name not in ours]
    _show(copy, [])
    _flatten_shape_keys(copy, obj, copies, evaluate)
    own = positions(copy.data)
    size = float(np.ptp(own, axis=0).max()) if len(own) else 0.0
    if nudge is not None:
        set_positions(copy.data, own + STEP * size * np.eye(3)[nudge])
    while True:
        _show(copy, stack)
        evaluated = evaluate()
        if not stack or len(evaluated.data.vertices) == len(own):
            break
        stack.pop()  # subdivision, mirror, ... stay on top of the motion
    mesh = bpy.data.meshes.new_from_object(evaluated, preserve_all_data_layers=True, depsgraph=layer.depsgraph)
    copies.temporary.append(mesh)
    for index, slot in enumerate(obj.material_slots):  # also those that are linked to the object instead of its mesh
        if index < len(mesh.materials):
            mesh.materials[index] = slot.material
        else:
            mesh.materials.append(slot.material)
    matrix_world = np.array(evaluated.matrix_world, np.float64)
    places = positions(mesh)
    bent = bool(stack) and np.abs(places - own).max(initial=0.0) > 1e-6 * size
    copies.scene.collection.objects.unlink(copy)
    return PlainCopy(obj, mesh, places, matrix_world, copy.data, size, bent)


def _show(copy: bpy.types.Object, names: list[str]) -> None:
    for modifier in copy.modifiers:
        modifier.show_viewport = modifier.name in names


def _flatten_shape_keys(copy: bpy.types.Object, obj: bpy.types.Object, copies: PlainCopies, evaluate) -> None:
    """The mix of the shape keys becomes the copy's mesh, without the keys of an earlier result."""
    keys = copy.data.shape_keys
    if keys is None:
        return
    copies.temporary.append(keys)  # a copied mesh doesn't take its keys along when it is removed
    keys.animation_data_clear()
    for name in marks.own_keys(obj.data.shape_keys):
        keys.key_blocks[name].mute = True
    mixed = evaluate()
    graph = copies.scene.view_layers[0].depsgraph
    copy.data = bpy.data.meshes.new_from_object(mixed, preserve_all_data_layers=True, depsgraph=graph)
    copies.temporary.append(copy.data)
