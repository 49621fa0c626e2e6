"""The shipped example models: what a user imports is what the script makes, one clean textured mesh each."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

bpy = pytest.importorskip("bpy", reason="needs Blender as a module (bpy)")
import bmesh  # noqa: E402

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = {"fox_cub": "Fox cub", "songbird": "Songbird", "sunflower": "Sunflower"}


def imported(path: Path):
    """The only mesh object of a .glb file, in an empty scene."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    bpy.ops.import_scene.gltf(filepath=str(path))
    meshes = [thing for thing in bpy.data.objects if thing.type == "MESH"]
    assert len(meshes) == 1 and len(bpy.data.objects) == 1
    return meshes[0]


def world_vertices(thing) -> np.ndarray:
    """[N, 3] float64."""
    return np.array([thing.matrix_world @ vertex.co for vertex in thing.data.vertices])


def texture(thing) -> np.ndarray:
    """The picture on the base colour, top row first; [h, w, 3] sRGB 0..1."""
    shader = thing.active_material.node_tree.nodes["Principled BSDF"]
    image = shader.inputs["Base Color"].links[0].from_node.image
    pixels = np.empty(image.size[0] * image.size[1] * 4, np.float32)
    image.pixels.foreach_get(pixels)
    return pixels.reshape(image.size[1], image.size[0], 4)[::-1, :, :3]


def color_at(thing, place: tuple[float, float, float]) -> np.ndarray:
    """The texture's colour where the surface is nearest to `place`; [3] sRGB 0..1."""
    mesh = thing.data
    centres = np.array([thing.matrix_world @ polygon.center for polygon in mesh.polygons])
    polygon = mesh.polygons[int(np.argmin(np.linalg.norm(centres - place, axis=1)))]
    u, v = np.mean([mesh.uv_layers.active.data[loop].uv for loop in polygon.loop_indices], axis=0)
    picture = texture(thing)
    height, width = picture.shape[:2]
    return picture[int((1 - v) * height), int(u * width)]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_is_one_clean_textured_mesh(name):
    path = EXAMPLES / f"{name}.glb"
    assert path.stat().st_size < 1_000_000
    thing = imported(path)
    assert thing.name == NAMES[name]

    welded = bmesh.new()
    welded.from_mesh(thing.data)
    bmesh.ops.remove_doubles(welded, verts=welded.verts, dist=1e-6)  # the format splits vertices along UV seams
    assert 1500 <= len(welded.verts) <= 5000
    assert all(vertex.link_faces for vertex in welded.verts)
    assert all(edge.is_manifold for edge in welded.edges)
    assert min(face.calc_area() for face in welded.faces) > 1e-7
    assert welded.calc_volume(signed=True) > 0  # normals point outwards
    welded.free()

    uvs = np.array([corner.uv for corner in thing.data.uv_layers.active.data])
    assert uvs.min() >= 0 and uvs.max() <= 1
    picture = texture(thing)
    assert picture.shape == (1024, 1024, 3)
    assert picture.reshape(-1, 3).std(0).max() > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_shipped_model_stands_on_the_ground(name):
    vertices = world_vertices(imported(EXAMPLES / f"{name}.glb"))
    assert abs(vertices[:, 2].min()) < 1e-4
    assert 0.5 < np.ptp(vertices, axis=0).max() < 2


@pytest.mark.parametrize("name", ["fox_cub", "songbird"])
def test_animals_are_symmetric(name):
    vertices = world_vertices(imported(EXAMPLES / f"{name}.glb"))
    assert abs(vertices[:, 0].min() + vertices[:, 0].max()) < 1e-3
    assert abs(vertices[:, 0].mean()) < 5e-3


def test_fox_faces_minus_y():
    thing = imported(EXAMPLES / "fox_cub.glb")
    vertices = world_vertices(thing)
    size = np.ptp(vertices, axis=0)
    assert size[1] > 2 * size[0]
    nose = vertices[np.argmin(vertices[:, 1])]
    assert color_at(thing, tuple(nose)).max() < 0.3  # black nose in front
    tail = vertices[vertices[:, 1] > 0.5]
    assert color_at(thing, tuple(tail[np.argmax(tail[:, 2])])).min() > 0.7  # white tip behind


def test_songbird_spreads_its_wings():
    vertices = world_vertices(imported(EXAMPLES / "songbird.glb"))
    size = np.ptp(vertices, axis=0)
    assert size[0] > size[1] > size[2]


def test_sunflower_turns_its_face_to_minus_y():
    thing = imported(EXAMPLES / "sunflower.glb")
    red, green, blue = color_at(thing, (0.0, -0.12, 0.85))
    assert red > green > blue  # the golden face in front
    red, green, blue = color_at(thing, (0.0, 0.01, 0.92))
    assert green > red  # the green cup behind


def test_script_makes_the_shipped_model_again(tmp_path):
    """Another process, the same geometry: exact topology, vertices within a hundredth of a millimetre."""
    command = [sys.executable, str(EXAMPLES / "make_models.py"), "--only", "songbird", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    surfaces = []
    for folder in (EXAMPLES, tmp_path):
        thing = imported(folder / "songbird.glb")
        places = np.unique(np.round(world_vertices(thing), 5), axis=0)
        surfaces.append((len(thing.data.polygons), places))
    assert surfaces[0][0] == surfaces[1][0]
    assert len(surfaces[0][1]) == len(surfaces[1][1])
    assert np.abs(surfaces[0][1] - surfaces[1][1]).max() < 2e-5
