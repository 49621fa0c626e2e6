"""Base colours of materials as pictures: image texture, plain colour, or a texel per triangle for colour attributes.

They tell the server what colour a place of the surface has; the user's materials are never replaced by them. A colour
that is computed from anything else (noise, ramps, ...) counts as the plain colour of its socket; the rendered views
correct it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Image:
    """An image of the file, by what is true also after a pause.

    Attributes:
        session_uid: finds it.
        name: for messages.
    """

    session_uid: int
    name: str


@dataclass(frozen=True)
class Coat:
    """The colour of one material slot, read from Blender.

    Attributes:
        material: its full name; None for the colour of what has no material.
        factor: [3] linear, times the image or the colours.
        image: None without one.
        uvs: [L, 2] float32 per corner, None without a UV map; scale and offset of a Mapping node: [2].
        colors: [L, 3] float32 linear colours per corner, in the place of an image.
    """

    material: str | None
    factor: np.ndarray
    image: Image | None
    uvs: np.ndarray | None
    scale: np.ndarray
    offset: np.ndarray
    colors: np.ndarray | None


@dataclass(frozen=True)
class Surface:
    """The faces of a mesh with their colours, read from Blender: what is left to do is arithmetic.

    Attributes:
        corners: [L] int32, vertex of each face corner; starts: [P] int32, first corner of each polygon.
        loops: [T, 3] int32, corners of the triangles; None of a mesh of triangles and quads, before `cut`.
        slots: [T] int32, material slots of the triangles.
        coats: by slot, of those that a triangle has.
        bare: faces are there that have no material.
    """

    corners: np.ndarray
    starts: np.ndarray
    loops: np.ndarray | None
    slots: np.ndarray
    coats: dict[int, Coat]
    bare: bool

    def cut(self, points: np.ndarray) -> Surface:
        """The same with its triangles; `points` are the vertices, [N, 3]. As Blender cuts: a quad from its first corner to its
        third, but from the second to the fourth where the other two lie on one side of that line."""
        if self.loops is not None:
            return self
        sizes = np.diff(self.starts, append=len(self.corners))
        quads = self.starts[sizes == 4]
        a, b, c, d = (points[self.corners[quads + k]].astype(np.float32) for k in range(4))
        flipped = (np.cross(b - a, c - a) * np.cross(d - a, c - a)).sum(1) > 0
        first = np.where(flipped[:, None], (0, 1, 3), (0, 1, 2))
        second = np.where(flipped[:, None], (1, 2, 3), (0, 2, 3))
        ends = np.cumsum(sizes - 2)  # triangles up to each polygon
        loops = np.repeat(self.starts, sizes - 2)[:, None] + np.arange(3)
        loops[ends[sizes == 4] - 2] = quads[:, None] + first
        loops[ends[sizes == 4] - 1] = quads[:, None] + second
        return replace(self, loops=loops.astype(np.int32))

    @property
    def triangles(self) -> np.ndarray:
        """Vertices of the triangles, [T, 3] int32; after `cut`."""
        return self.corners[self.loops]


def corner_vertices(mesh: bpy.types.Mesh) -> np.ndarray:
    """The vertex of each face corner, [L] int32; the attribute is read 500 times as fast as `loops`."""
    corners = np.empty(len(mesh.loops), np.int32)
    if len(corners):
        mesh.attributes[".corner_vert"].data.foreach_get("value", corners)
    return corners


def first_corners(mesh: bpy.types.Mesh) -> np.ndarray:
    """The first corner of each polygon, [P] int32."""
    starts = np.empty(len(mesh.polygons), np.int32)
    mesh.polygons.foreach_get("loop_start", starts)
    return starts


def read_surface(mesh: bpy.types.Mesh) -> Surface:
    """Reads a mesh with materials; it may be an evaluated copy."""
    corners, starts = corner_vertices(mesh), first_corners(mesh)
    sizes, loops = np.diff(starts, append=len(corners)), None
    if len(sizes) and (sizes.min() < 3 or sizes.max() > 4):
        mesh.calc_loop_triangles()
        loops = np.empty((len(mesh.loop_triangles), 3), np.int32)
        mesh.loop_triangles.foreach_get("loops", loops.reshape(-1))
    slots = np.zeros(len(mesh.polygons), np.int32)
    if "material_index" in mesh.attributes:
        mesh.attributes["material_index"].data.foreach_get("value", slots)
    slots = np.repeat(slots, np.maximum(sizes - 2, 0))  # a polygon of n corners has n - 2 triangles, in the polygons' order
    slots = np.clip(slots, 0, max(len(mesh.materials) - 1, 0))  # as Blender does with an index that is too large
    coats = {int(slot): _coat(mesh, mesh.materials[slot] if len(mesh.materials) else None, corners) for slot in np.unique(slots)}
    return Surface(corners, starts, loops, slots, coats, not len(mesh.materials) or None in list(mesh.materials))


def _coat(mesh: bpy.types.Mesh, material: bpy.types.Material | None, corners: np.ndarray) -> Coat:
    base = _base(material)
    colors = None if base.attribute is None else _corner_colors(mesh, base.attribute, corners)
    image = Image(base.image.session_uid, base.image.name) if base.image is not None else None
    uvs = _uv_layer(mesh, base.uv_map) if image else None
    name = material.name_full if material else None
    return Coat(name, base.factor, image, uvs, np.array(base.uv_scale, np.float32), np.array(base.uv_offset, np.float32), colors)


@dataclass(frozen=True)
class Pixels:
    """An image's pixels as Blender has them.

    Attributes:
        values: [h, w, channels] float32, bottom row first.
        encoded: they are sRGB already; else linear.
    """

    values: np.ndarray
    encoded: bool


def decode(image: Image) -> int:
    """Has Blender decode an image, which is most of the work of reading it; how many floats it has, 0 when it can't be read."""
    found = _find(image)
    if found is None:
        return 0
    width, height = found.size  # asking for the size decodes
    return width * height * found.channels


def read_pixels(image: Image, room: np.ndarray | None = None) -> Pixels | None:
    """The pixels of an image; None when it is gone or can't be read.

    Args:
        room: memory for them, float32; used where it has the right size.
    """
    count, found = decode(image), _find(image)
    if found is None or count == 0:
        return None
    flat = room if room is not None and len(room) == count else np.empty(count, np.float32)
    found.pixels.foreach_get(flat)
    width, height = found.size
    return Pixels(flat.reshape(height, width, -1), not found.is_float and found.colorspace_settings.name == "sRGB")


def _find(image: Image) -> bpy.types.Image | None:
    return next((other for other in bpy.data.images if other.session_uid == image.session_uid), None)


class BaseColors:
    """Collects one texture per material over all objects of a capture. It doesn't touch `bpy`.

    Attributes:
        pixels: of the images that the surfaces name, by their session_uid; None for one that can't be read.
        textures: uint8 [h, w, 3] sRGB, top row first.
        warnings: {"code", "message", "action"} about textures and UVs that are missing.
    """

    def __init__(self, pixels: dict[int, Pixels | None]) -> None:
        self.pixels = pixels
        self.textures: list[np.ndarray] = []
        self.warnings: list[dict[str, str]] = []
        self._index: dict[str | None, int] = {}

    def paint(self, surface: Surface, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The colours of a surface's triangles.

        Args:
            surface: of a mesh, after `cut`.
            name: of its object, for warnings.

        Returns:
            uvs of the corners [T, 3, 2] float32, index into `textures` [T] int32.
        """
        assert surface.loops is not None, "it was cut"
        count = len(surface.loops)
        uvs, materials = np.zeros((count, 3, 2), np.float32), np.zeros(count, np.int32)
        without_uvs = False
        for slot, coat in surface.coats.items():
            on = np.nonzero(surface.slots == slot)[0]
            loops = surface.loops[on]
            if coat.colors is not None:
                materials[on], uvs[on] = self._atlas(coat.colors[loops].mean(1) * coat.factor)
                continue
            materials[on] = self._texture(coat)
            without_uvs |= coat.image is not None and coat.uvs is None
            if coat.uvs is not None:
                uvs[on] = coat.uvs[loops] * coat.scale + coat.offset
        if without_uvs:
            self.warnings.append(
                {
                    "code": "no_uvs",
                    "message": f"'{name}' has a texture but no UV map.",
                    "action": "Nothing to do if it looks right in Blender; else unwrap it.",
                }
            )
        if surface.bare:
            self.warnings.append(
                {
                    "code": "no_material",
                    "message": f"'{name}' has faces without a material; they count as grey.",
                    "action": "Give them a material if colours shall help to follow the motion.",
                }
            )
        return uvs, materials

    def _texture(self, coat: Coat) -> int:
        if coat.material not in self._index:
            self._index[coat.material] = len(self.textures)
            pixels = self.pixels.get(coat.image.session_uid) if coat.image else None
            picture = _picture(pixels) if pixels else None
            if coat.image and picture is None:
                self.warnings.append(
                    {
                        "code": "missing_texture",
                        "message": f"The image '{coat.image.name}' of the material '{coat.material}' can't be read.",
                        "action": "Use File > External Data > Find Missing Files.",
                    }
                )
                picture = np.broadcast_to(linear_to_srgb(NEUTRAL), (1, 1, 3))
            if picture is None:
                picture = linear_to_srgb(coat.factor).reshape(1, 1, 3)
            elif not np.allclose(coat.factor, 1.0, atol=2e-3):
                picture = linear_to_srgb(srgb_to_linear(picture) * coat.factor)
            self.textures.append(to_bytes(picture))
        return self._index[coat.material]

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


def _corner_colors(mesh: bpy.types.Mesh, name: str, corners: np.ndarray) -> np.ndarray | None:
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
    return values[corners] if layer.domain == "POINT" else values


def _picture(image: Pixels) -> np.ndarray:
    """An image as sRGB 0..1, [h, w, 3], top row first, at most `LARGEST` pixels wide and high."""
    height, width = image.values.shape[:2]
    pixels = image.values[::-1, :, :3]
    if pixels.shape[2] < 3:
        pixels = np.repeat(pixels[..., :1], 3, 2)
    for axis, size in ((0, height), (1, width)):
        target = max(1, round(size * LARGEST / max(width, height, LARGEST)))
        if target < size:  # the mean over the pixels that fall into each new one
            edges = np.linspace(0, size, target + 1).astype(np.int64)
            widths = np.diff(edges).reshape([-1 if k == axis else 1 for k in range(3)])
            pixels = np.add.reduceat(pixels, edges[:-1], axis=axis) / widths
    return pixels if image.encoded else linear_to_srgb(pixels)
