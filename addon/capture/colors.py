"""Base colours of materials as pictures: image texture, plain colour, or a texel per triangle for colour attributes.

They tell the server what colour a place of the surface has; the user's materials are never replaced by them. A colour
that is computed from anything else (noise, ramps, ...) counts as the plain colour of its socket; the rendered views
correct it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import bpy
import numpy as np

LARGEST = 1024  # pixels of a texture's longer side
NEUTRAL = np.full(3, 0.8)  # linear; Blender's colour of a surface without material


def linear_to_srgb(color: np.ndarray) -> np.ndarray:
    """Scene-linear to sRGB, both 0..1; anything outside is clipped."""
    color = np.clip(color, 0.0, 1.0)
    return np.where(color <= 0.0031308, 12.92 * color, 1.055 * np.maximum(color, 1e-9) ** (1 / 2.4) - 0.055)


def srgb_to_linear(color: np.ndarray) -> np.ndarray:
    """The inverse of `linear_to_srgb`."""
    return np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)


def to_bytes(color: np.ndarray) -> np.ndarray:
    """0..1 to uint8, rounded."""
    return (np.clip(color, 0.0, 1.0) * 255 + 0.5).astype(np.uint8)


@dataclass
class _Base:
    """What a material's base colour is made of: factor times image or colour attribute."""

    factor: np.ndarray
    image: bpy.types.Image | None = None
    uv_map: str = ""
    uv_scale: tuple[float, float] = (1.0, 1.0)
    uv_offset: tuple[float, float] = (0.0, 0.0)
    attribute: str | None = None


class BaseColors:
    """Collects one texture per material over all objects of a capture.

    Attributes:
        textures: uint8 [h, w, 3] sRGB, top row first.
        warnings: {"code", "message", "action"} about textures and UVs that are missing.
    """

    def __init__(self) -> None:
        self.textures: list[np.ndarray] = []
        self.warnings: list[dict[str, str]] = []
        self._index: dict[str | None, int] = {}

    def triangles(self, obj: bpy.types.Object, mesh: bpy.types.Mesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Triangles of a mesh with their colours.

        Args:
            obj: the user's object, for names in warnings.
            mesh: with materials; may be an evaluated copy.

        Returns:
            vertices of the corners [T, 3] int32, uvs of the corners [T, 3, 2] float32, index into `textures` [T] int32.
        """
        mesh.calc_loop_triangles()
        count = len(mesh.loop_triangles)
        corners, loops = np.empty(count * 3, np.int32), np.empty(count * 3, np.int32)
        slots, materials = np.empty(count, np.int32), np.zeros(count, np.int32)
        mesh.loop_triangles.foreach_get("vertices", corners)
        mesh.loop_triangles.foreach_get("loops", loops)
        mesh.loop_triangles.foreach_get("material_index", slots)
        corners, loops = corners.reshape(-1, 3), loops.reshape(-1, 3)
        uvs = np.zeros((count, 3, 2), np.float32)
        slots = np.clip(slots, 0, max(len(mesh.materials) - 1, 0))  # as Blender does with an index that is too large
        without_uvs = False
        for slot in np.unique(slots):
            on = np.nonzero(slots == slot)[0]
            material = mesh.materials[slot] if len(mesh.materials) else None
            base = _base(material)
            if base.attribute is not None and (colors := _corner_colors(mesh, base.attribute)) is not None:
                materials[on], uvs[on] = self._atlas(colors[loops[on]].mean(1) * base.factor)
                continue
            materials[on] = self._texture(material, base)
            if base.image is not None:
                layer = _uv_layer(mesh, base.uv_map)
                without_uvs |= layer is None
                if layer is not None:
                    uvs[on] = layer[loops[on]] * np.float32(base.uv_scale) + np.float32(base.uv_offset)
        if without_uvs:
            self.warnings.append(
                {
                    "code": "no_uvs",
                    "message": f"'{obj.name}' has a texture but no UV map.",
                    "action": "Nothing to do if it looks right in Blender; else unwrap it.",
                }
            )
        if not len(mesh.materials) or None in list(mesh.materials):
            self.warnings.append(
                {
                    "code": "no_material",
                    "message": f"'{obj.name}' has faces without a material; they count as grey.",
                    "action": "Give them a material if colours shall help to follow the motion.",
                }
            )
        return corners, uvs, materials

    def _texture(self, material: bpy.types.Material | None, base: _Base) -> int:
        key = material.name_full if material else None
        if key not in self._index:
            self._index[key] = len(self.textures)
            picture = _pixels(base.image) if base.image is not None else None
            if base.image is not None and picture is None:
                self.warnings.append(
                    {
                        "code": "missing_texture",
                        "message": f"The image '{base.image.name}' of the material '{key}' can't be read.",
                        "action": "Use File > External Data > Find Missing Files.",
                    }
                )
                picture = np.broadcast_to(linear_to_srgb(NEUTRAL), (1, 1, 3))
            if picture is None:
                picture = linear_to_srgb(base.factor).reshape(1, 1, 3)
            elif not np.allclose(base.factor, 1.0, atol=2e-3):
                picture = linear_to_srgb(srgb_to_linear(picture) * base.factor)
            self.textures.append(to_bytes(picture))
        return self._index[key]

    def _atlas(self, colors: np.ndarray) -> tuple[int, np.ndarray]:
        """One texel per triangle from linear colours [T, 3]; its index and the corners' uvs [T, 3, 2]."""
        side = min(math.ceil(math.sqrt(len(colors))), LARGEST)
        texel = np.arange(len(colors)) * side**2 // max(len(colors), side**2)  # beyond 1024² triangles some share one
        row, column = texel // side, texel % side
        picture = np.zeros((side, side, 3))
        picture[row, column] = linear_to_srgb(colors)
        self.textures.append(to_bytes(picture))
        uv = np.stack([(column + 0.5) / side, 1 - (row + 0.5) / side], -1).astype(np.float32)
        return len(self.textures) - 1, np.repeat(uv[:, None], 3, 1)


def _base(material: bpy.types.Material | None) -> _Base:
    """Follows a material's nodes from the surface's colour upstream."""
    if material is None:
        return _Base(NEUTRAL)
    tree = material.node_tree
    if tree is None or (bpy.app.version < (5, 0, 0) and not material.use_nodes):
        return _Base(np.array(material.diffuse_color[:3]))
    socket = _color_socket(tree)
    if socket is None:
        return _Base(np.array(material.diffuse_color[:3]))
    if not socket.is_linked:
        return _Base(np.array(socket.default_value[:3]))
    base = _Base(np.ones(3))
    queue, seen, recognised = [socket.links[0].from_node], set(), False
    while queue:
        node = queue.pop(0)
        if node.as_pointer() in seen:
            continue
        seen.add(node.as_pointer())
        if node.type == "TEX_IMAGE" and node.image:
            base.image = node.image
            _read_mapping(node, base)
            return base
        if node.type in ("VERTEX_COLOR", "ATTRIBUTE"):
            base.attribute = node.layer_name if node.type == "VERTEX_COLOR" else node.attribute_name
            return base
        if node.type == "RGB":
            base.factor = base.factor * np.array(node.outputs[0].default_value[:3])
            recognised = True
        if node.type in ("MIX", "MIX_RGB") and node.blend_type == "MULTIPLY":
            base.factor = base.factor * _multiplier(node)
        if node.type == "GROUP" and node.node_tree:
            queue += [inner for inner in node.node_tree.nodes if inner.type in ("TEX_IMAGE", "VERTEX_COLOR")]
        queue += [link.from_node for entry in node.inputs for link in entry.links]
    if not recognised:
        base.factor = base.factor * np.array(socket.default_value[:3])
    return base


def _color_socket(tree: bpy.types.NodeTree) -> bpy.types.NodeSocket | None:
    """The colour input of the first shader that leads to the surface."""
    output = tree.get_output_node("ALL") or tree.get_output_node("CYCLES")
    queue = [link.from_node for link in output.inputs["Surface"].links] if output else []
    seen: set[int] = set()
    while queue:
        node = queue.pop(0)
        if node.as_pointer() in seen:
            continue
        seen.add(node.as_pointer())
        for name in ("Base Color", "Color"):
            if name in node.inputs and any(socket.type == "SHADER" for socket in node.outputs):
                return node.inputs[name]
        if node.type == "GROUP" and node.node_tree:
            inner = next((n for n in node.node_tree.nodes if n.type == "BSDF_PRINCIPLED"), None)
            if inner:
                return inner.inputs["Base Color"]
        queue += [link.from_node for entry in node.inputs for link in entry.links]
    return None


def _multiplier(node: bpy.types.Node) -> np.ndarray:
    """The constant by which a Multiply node scales its other input."""
    factor = next((s.default_value for s in node.inputs if s.enabled and s.type == "VALUE" and not s.is_linked), 1.0)
    constants = [s for s in node.inputs if s.enabled and s.type == "RGBA" and not s.is_linked]
    color = np.prod([np.array(s.default_value[:3]) for s in constants], axis=0) if constants else np.ones(3)
    return 1.0 + factor * (color - 1.0)


def _read_mapping(node: bpy.types.Node, base: _Base) -> None:
    """UV map and scale of an image node; only what a plain chain UV Map > Mapping > Image says."""
    link = next(iter(node.inputs["Vector"].links), None)
    while link:
        source = link.from_node
        if source.type == "UVMAP":
            base.uv_map = source.uv_map
        if source.type == "MAPPING" and source.vector_type == "POINT" and not any(source.inputs["Rotation"].default_value):
            base.uv_scale = tuple(source.inputs["Scale"].default_value[:2])
            base.uv_offset = tuple(source.inputs["Location"].default_value[:2])
        vector = source.inputs.get("Vector")
        link = next(iter(vector.links), None) if vector else None


def _uv_layer(mesh: bpy.types.Mesh, name: str) -> np.ndarray | None:
    """A UV map by name, else the one that is active for rendering; [L, 2] float32."""
    layer = mesh.uv_layers.get(name) or next((layer for layer in mesh.uv_layers if layer.active_render), None)
    if layer is None:
        return None
    uv = np.empty(len(mesh.loops) * 2, np.float32)
    layer.uv.foreach_get("vector", uv)
    return uv.reshape(-1, 2)


def _corner_colors(mesh: bpy.types.Mesh, name: str) -> np.ndarray | None:
    """A colour attribute per corner, linear; [L, 3] float32. The one that is active for rendering has the name ""."""
    layers = mesh.color_attributes
    layer = (
        layers.get(name) if name else (layers[layers.render_color_index] if layers and layers.render_color_index >= 0 else None)
    )
    if layer is None or layer.domain not in ("POINT", "CORNER"):
        return None
    values = np.empty(len(layer.data) * 4, np.float32)
    layer.data.foreach_get("color", values)
    values = values.reshape(-1, 4)[:, :3]
    if layer.domain == "POINT":
        corners = np.empty(len(mesh.loops), np.int32)
        mesh.loops.foreach_get("vertex_index", corners)
        values = values[corners]
    return values


def _pixels(image: bpy.types.Image) -> np.ndarray | None:
    """An image as sRGB 0..1, top row first, at most `LARGEST` pixels wide and high; None when it can't be read."""
    width, height = image.size
    if not width or not height or image.channels == 0:
        return None
    flat = np.empty(width * height * image.channels, np.float32)
    image.pixels.foreach_get(flat)
    pixels = flat.reshape(height, width, image.channels)[::-1, :, :3]
    if pixels.shape[2] < 3:
        pixels = np.repeat(pixels[..., :1], 3, 2)
    for axis, size in ((0, height), (1, width)):
        target = max(1, round(size * LARGEST / max(width, height, LARGEST)))
        if target < size:  # the mean over the pixels that fall into each new one
            edges = np.linspace(0, size, target + 1).astype(np.int64)
            widths = np.diff(edges).reshape([-1 if k == axis else 1 for k in range(3)])
            pixels = np.add.reduceat(pixels, edges[:-1], axis=axis) / widths
    encoded = not image.is_float and image.colorspace_settings.name == "sRGB"
    return pixels if encoded else linear_to_srgb(pixels)
