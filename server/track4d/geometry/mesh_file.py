"""A mesh from a file, without Blender: enough to generate a video of it, not to change it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from track4d_protocol.errors import InputError

from .mesh import Mesh, check_mesh

Y_UP = (".glb", ".gltf", ".obj")  # formats whose models stand along Y; Blender turns them as is done here
READABLE = (*Y_UP, ".ply", ".stl")


def read_mesh(path: Path) -> Mesh:
    """Everything in a file as one mesh with its colours, in the pose that is stored; Z up.

    Args:
        path: .glb, .gltf, .obj, .ply or .stl.

    Raises:
        InputError: missing_file, unsupported_format, unreadable_file, or what `check_mesh` refuses.
    """
    import trimesh

    if path.suffix.lower() not in READABLE:
        raise InputError("unsupported_format", f"Track4D can't read '{path.name}' without Blender.",
                         f"Use one of {', '.join(READABLE)}.")
    if not path.is_file():
        raise InputError("missing_file", f"The file '{path}' isn't there.", "Check its name and folder.")
    try:
        scene: Any = trimesh.load(path, force="scene", process=False)
        parts = [part for part in scene.dump() if isinstance(part, trimesh.Trimesh)]
    except Exception as error:  # noqa: BLE001  # trimesh's readers raise whatever their formats lead to
        raise InputError("unreadable_file", f"'{path.name}' can't be read: {error}.", "Export it again.") from error
    if not parts:
        raise InputError("empty_mesh", f"'{path.name}' has no triangles.", "Choose a file with a surface.")
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    vertices = np.concatenate([part.vertices for part in parts])
    if path.suffix.lower() in Y_UP:
        vertices = np.stack([vertices[:, 0], -vertices[:, 2], vertices[:, 1]], -1)
    faces = np.concatenate([part.faces + start for part, start in zip(parts, starts)])
    uvs, textures = zip(*(_appearance(part) for part in parts))
    materials = np.concatenate([np.full(len(part.faces), k) for k, part in enumerate(parts)])
    check_mesh(vertices, faces)
    return Mesh(vertices, faces, np.concatenate(uvs), materials, list(textures))


def _appearance(part: Any) -> tuple[np.ndarray, np.ndarray]:
    """Texture coordinates [T, 3, 2] and texture [h, w, 3] of one of the file's meshes."""
    visual = part.visual
    uv = getattr(visual, "uv", None)
    material = getattr(visual, "material", None)
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    if uv is not None and image is not None:
        return np.asarray(uv)[part.faces], np.asarray(image.convert("RGB"), np.float32) / 255
    color = getattr(material, "main_color", None) if material is not None else getattr(visual, "main_color", None)
    plain = np.full(3, 204) if color is None else np.asarray(color)[:3]
    return np.zeros((len(part.faces), 3, 2)), plain.astype(np.float32).reshape(1, 1, 3) / 255
