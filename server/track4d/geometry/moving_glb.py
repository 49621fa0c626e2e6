"""Meshes that move by morph targets, from a binary glTF without Blender: what `track4d animate` writes, with vertex colours."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from track4d_protocol.errors import InputError

_TYPES = {5120: np.int8, 5121: np.uint8, 5122: np.int16, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_TRIANGLES = 4


class MovingMesh(NamedTuple):
    """All meshes of a file as one, in Blender's axes (+Z up).

    Attributes:
        vertices: [F, N, 3] float32 at the keyframes of the file's first clip; one frame where nothing moves.
        faces: [T, 3] int32.
        colors: [N, 3] float32 linear, `COLOR_0`; None where a mesh has none.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray | None


def read_moving_glb(path: Path) -> MovingMesh:
    """Reads a .glb whose meshes move by the weights of their morph targets.

    Nodes stand where the file places them; what moves a node itself, or by bones, is not followed. Between keyframes a clip
    doesn't matter here: its keyframes are the frames.

    Raises:
        InputError: missing_file, unreadable_file; `moved_by_nodes` where the clip moves nodes or bones.
    """
    try:
        tree, binary = _chunks(path.read_bytes())
        parts = [
            _instance(tree, binary, mesh, place, weights)
            for mesh, place, weights in _placed(tree, _weights(tree, binary, path.name))
        ]
    except OSError as error:
        raise InputError("missing_file", f"The file '{path}' isn't there.", "Check its name and folder.") from error
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise InputError("unreadable_file", f"'{path.name}' can't be read: {error}.", "Export it again.") from error
    pieces = [piece for part in parts for piece in part]
    if not any(len(piece.faces) for piece in pieces):
        raise InputError("empty_mesh", f"'{path.name}' has no triangles.", "Choose a file with a surface.")
    frames = max(len(piece.vertices) for piece in pieces)
    if any(len(piece.vertices) not in (1, frames) for piece in pieces):
        raise InputError("unreadable_file", f"'{path.name}' can't be read: its meshes have different numbers of keyframes.",
                         "Export it again.")
    starts = np.cumsum([0, *(piece.vertices.shape[1] for piece in pieces)])
    still = [np.broadcast_to(piece.vertices, (frames, *piece.vertices.shape[1:])) for piece in pieces]
    x, y, z = np.moveaxis(np.concatenate(still, 1), -1, 0)
    faces = np.concatenate([piece.faces + start for piece, start in zip(pieces, starts)])
    known = [piece.colors for piece in pieces if piece.colors is not None]
    colors = np.concatenate(known) if len(known) == len(pieces) else None
    return MovingMesh(np.stack([x, -z, y], -1), faces.astype(np.int32), colors)


def _chunks(data: bytes) -> tuple[dict[str, Any], bytes]:
    magic, version, _ = struct.unpack_from("<4sII", data)
    if magic != b"glTF" or version != 2:
        raise ValueError("it is no binary glTF 2.0")
    length = struct.unpack_from("<I", data, 12)[0]
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def _accessor(tree: dict[str, Any], binary: bytes, index: int) -> np.ndarray:
    """Values [n] or [n, width]; whole numbers that stand for shares are divided."""
    entry = tree["accessors"][index]
    count, width, kind = entry["count"], _WIDTHS[entry["type"]], _TYPES[entry["componentType"]]
    values = np.zeros((count, width), kind)
    if "bufferView" in entry:
        values = _view(tree, binary, entry["bufferView"], entry.get("byteOffset", 0), kind, count, width).copy()
    if sparse := entry.get("sparse"):
        where, what = sparse["indices"], sparse["values"]
        places = _view(tree, binary, where["bufferView"], where.get("byteOffset", 0), _TYPES[where["componentType"]],
                       sparse["count"], 1)
        values[places[:, 0]] = _view(tree, binary, what["bufferView"], what.get("byteOffset", 0), kind, sparse["count"], width)
    if entry.get("normalized") and kind != np.float32:
        values = values.astype(np.float32) / np.iinfo(values.dtype).max
    return values[:, 0] if width == 1 else values


def _view(tree: dict[str, Any], binary: bytes, index: int, offset: int, kind: type, count: int, width: int) -> np.ndarray:
    view, size = tree["bufferViews"][index], np.dtype(kind).itemsize
    if view.get("buffer", 0) or "uri" in tree["buffers"][0]:
        raise ValueError("its arrays lie in other files")
    return np.ndarray((count, width), np.dtype(kind).newbyteorder("<"), binary, view.get("byteOffset", 0) + offset,
                      (view.get("byteStride", width * size), size))


def _weights(tree: dict[str, Any], binary: bytes, name: str) -> dict[int, np.ndarray]:
    """Per node, the weights [F, targets] of the first clip."""
    found: dict[int, np.ndarray] = {}
    clip: dict[str, Any] = next(iter(tree.get("animations", ())), {"channels": ()})
    for channel in clip["channels"]:
        sampler, target = clip["samplers"][channel["sampler"]], channel["target"]
        values = _accessor(tree, binary, sampler["output"])
        if target["path"] == "weights":
            values = values.reshape(len(_accessor(tree, binary, sampler["input"])), -1)
            found[target["node"]] = np.split(values, 3, 1)[1] if sampler.get("interpolation") == "CUBICSPLINE" else values
        elif np.ptp(values, axis=0).max() > 1e-6:
            raise InputError("moved_by_nodes", f"'{name}' moves by nodes or bones, not by morph targets.",
                             "Write it with `track4d animate`, or as .t4d.")
    return found


def _placed(tree: dict[str, Any], weights: dict[int, np.ndarray]) -> list[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Every mesh of the scene, the matrix [4, 4] of its node in the world, and its weights [F, targets]."""
    found, nodes = [], tree.get("nodes", [])
    scene = tree["scenes"][tree.get("scene", 0)]
    rest = [(index, np.eye(4)) for index in scene.get("nodes", ())]
    while rest:
        index, above = rest.pop(0)
        node, place = nodes[index], above @ _matrix(nodes[index])
        rest += [(child, place) for child in node.get("children", ())]
        if "mesh" in node:
            mesh = tree["meshes"][node["mesh"]]
            count = len(mesh["primitives"][0].get("targets", ()))
            still = np.reshape(node.get("weights") or mesh.get("weights") or [0.0] * count, (1, count))
            found.append((mesh, place, weights.get(index, still)))
    return found


def _matrix(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.reshape(node["matrix"], (4, 4)).T
    x, y, z, w = node.get("rotation", (0, 0, 0, 1))
    turn = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
    place = np.eye(4)
    place[:3, :3], place[:3, 3] = turn * node.get("scale", (1, 1, 1)), node.get("translation", (0, 0, 0))
    return place


def _instance(tree: dict[str, Any], binary: bytes, mesh: dict[str, Any], place: np.ndarray,
              weights: np.ndarray) -> list[MovingMesh]:
    """The triangles of one placed mesh, in the file's axes."""
    found = []
    for primitive in mesh["primitives"]:
        if primitive.get("mode", _TRIANGLES) != _TRIANGLES:
            continue
        attributes = primitive["attributes"]
        rest = _accessor(tree, binary, attributes["POSITION"]).astype(np.float64)  # [N, 3]
        targets = [_accessor(tree, binary, target["POSITION"]) for target in primitive.get("targets", ())]
        moved = rest[None] + (np.tensordot(weights, np.stack(targets), 1) if targets else 0.0)  # [F, N, 3]
        world = (moved @ place[:3, :3].T + place[:3, 3]).astype(np.float32)
        indices = _accessor(tree, binary, primitive["indices"]) if "indices" in primitive else np.arange(len(rest))
        colors = _accessor(tree, binary, attributes["COLOR_0"])[:, :3].astype(np.float32) if "COLOR_0" in attributes else None
        found.append(MovingMesh(world, indices.reshape(-1, 3).astype(np.int64), colors))
    return found
