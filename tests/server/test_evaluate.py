"""Evaluation sets: what is whole is measured, what is broken is named, and the figures are what they say."""

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from track4d.cli import app
from track4d.evaluation import Motion, find_result, look, measure, read_asset
from track4d.geometry.moving_glb import read_moving_glb
from track4d_protocol.errors import InputError
from track4d_protocol.splat_files import write_ply, write_t4d
from track4d_protocol.splats import C0, GREY, Splats
from typer.testing import CliRunner

FACES = np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]])
CORNERS = np.float32([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])


def write_glb(path, vertices, faces, colors=None, targets=(), weights=None, node=None, sparse=False):
    """A glTF of one mesh in the file's own axes; weights [F, targets] over whole seconds."""
    blob, views, accessors = bytearray(), [], []

    def view(values):
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": values.nbytes})
        blob.extend(values.tobytes() + b"\0" * (-values.nbytes % 4))
        return len(views) - 1

    def accessor(values, **more):
        kind = {np.dtype(np.float32): 5126, np.dtype(np.uint32): 5125, np.dtype(np.uint8): 5121}[values.dtype]
        name = "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}"
        accessors.append({"bufferView": view(values), "componentType": kind, "type": name, "count": len(values)} | more)
        return len(accessors) - 1

    def moved(values):
        if not sparse:
            return accessor(values)
        rows = np.flatnonzero(np.abs(values).max(1)).astype(np.uint8)
        where, what = {"bufferView": view(rows), "componentType": 5121}, {"bufferView": view(values[rows])}
        accessors.append({"componentType": 5126, "type": "VEC3", "count": len(values),
                          "sparse": {"count": len(rows), "indices": where, "values": what}})
        return len(accessors) - 1

    primitive = {"attributes": {"POSITION": accessor(np.float32(vertices))}, "indices": accessor(np.uint32(faces).ravel())}
    if colors is not None:
        primitive["attributes"]["COLOR_0"] = accessor(colors, normalized=colors.dtype == np.uint8)
    if len(targets):
        primitive["targets"] = [{"POSITION": moved(np.float32(target))} for target in targets]
    tree = {"asset": {"version": "2.0"}, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0} | (node or {})],
            "meshes": [{"primitives": [primitive]}]}
    if weights is not None:
        times, values = accessor(np.arange(len(weights), dtype=np.float32)), accessor(np.float32(weights).ravel())
        tree["animations"] = [{"samplers": [{"input": times, "output": values}],
                               "channels": [{"sampler": 0, "target": {"node": 0, "path": "weights"}}]}]
    tree |= {"bufferViews": views, "accessors": accessors, "buffers": [{"byteLength": len(blob)}]}
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 28 + len(text) + len(blob)) + struct.pack("<I4s", len(text), b"JSON") + text
                     + struct.pack("<I4s", len(blob), b"BIN\0") + bytes(blob))


def cover(vertices, faces, colors, frames=1):
    """Small round Gaussians all over a surface, in sRGB."""
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    means, triangles = trimesh.sample.sample_surface(mesh, 6000, seed=0)
    looks = np.repeat(np.mean(colors, 0)[None], len(means), 0)
    return Splats(np.float32(means)[None].repeat(frames, 0), np.float32([[[1, 0, 0, 0]]]).repeat(len(means), 1).repeat(frames, 0),
                  np.full((len(means), 3), 0.015, np.float32), np.full(len(means), 0.95, np.float32),
                  np.float32((looks - GREY) / C0)[:, None, None])


@pytest.fixture
def a_set(tmp_path):
    """A set of two balls, the second one's Gaussians too small and of another colour."""
    ball = trimesh.creation.icosphere(3)
    for name, factor, color in (("ball", 1.0, 0.5), ("shrunk", 0.8, 0.75)):
        folder = tmp_path / "set" / name
        folder.mkdir(parents=True)
        turned = np.stack([ball.vertices[:, 0], ball.vertices[:, 2], -ball.vertices[:, 1]], 1)  # +Y up, as in glTF
        write_glb(folder / "mesh.glb", turned, ball.faces, np.full((len(turned), 4), 0.21404, np.float32))  # sRGB 0.5
        with (folder / "gaussians.ply").open("wb") as file:
            write_ply(file, cover(factor * ball.vertices, ball.faces, [[color] * 3]), 0)
        hashes = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in ("mesh.glb", "gaussians.ply")}
        about = {"name": name, "prompt": f"the {name} is bouncing", "front": "-Y", "samples": 4, "vertices": len(ball.vertices),
                 "gaussians": 6000, "sha256": hashes}
        (folder / "asset.json").write_text(json.dumps(about))
    return tmp_path / "set"


def test_the_look_is_compared_from_all_sides(a_set):
    good, bad = (read_asset(a_set / name) for name in ("ball", "shrunk"))
    near, far = look(good, good.splats, 128), look(bad, bad.splats, 128)
    assert near.iou > 0.88 and near.psnr > 35, "each Gaussian reaches a little over the edge"
    assert 0.8**2 < far.iou < 0.8**2 / near.iou + 0.02
    assert far.psnr == pytest.approx(-10 * np.log10(far.iou * 0.25**2), abs=0.5), "wrong inside, the background's grey beside it"
    itself = look(good, good.mesh, 128)
    assert itself.iou == 1 and itself.psnr == 100
    assert look(good, good.mesh._replace(colors=None), 128).psnr is None


def test_the_figures_of_a_motion_are_those_of_its_definition(tmp_path):
    """A tetrahedron that is pulled along one axis, and a rigid one that goes to and fro."""
    pull = np.float32([[0, 0, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]])
    write_glb(tmp_path / "pulled.glb", CORNERS, FACES, targets=[pull], weights=[[0], [0.5], [1]], sparse=True)
    pulled = find_result(tmp_path, "pulled")
    np.testing.assert_allclose(pulled.vertices[2], [[0, 0, 0], [2, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-6)
    found, diagonal = measure(pulled), np.sqrt(3)
    assert (found.frames, found.roughness) == (3, pytest.approx(0))
    assert found.size == pytest.approx((0.5 + 1) / 2 / 4 / diagonal)
    assert found.stretch == pytest.approx(2, rel=0.03)
    step = np.ones((4, 3), np.float32)
    write_glb(tmp_path / "flicker.glb", CORNERS, FACES, targets=[step], weights=[[0], [1], [0], [1], [0]])
    assert measure(find_result(tmp_path, "flicker")) == Motion(5, pytest.approx(0.5), pytest.approx(2), pytest.approx(1))
    write_glb(tmp_path / "still.glb", CORNERS, FACES, targets=[step], weights=[[0], [0], [0]])
    assert measure(find_result(tmp_path, "still")) == Motion(3, 0, None, 1)


def test_gaussians_have_the_figures_of_their_centres(tmp_path):
    splats = cover(CORNERS, FACES, [[0.5] * 3], frames=8)
    grow = 1 + 0.5 * np.arange(8)[:, None, None] / 7
    splats = replace(splats, means=(splats.means * grow).astype(np.float32))
    with (tmp_path / "a.t4d").open("wb") as file:
        write_t4d(file, splats)
    for frame in range(8):
        with (tmp_path / f"b_{frame + 1:04d}.ply").open("wb") as file:
            write_ply(file, splats, frame)
    exact, archived, sequence = measure(splats), measure(find_result(tmp_path, "a")), measure(find_result(tmp_path, "b"))
    assert exact.stretch == pytest.approx(1.5, rel=1e-4) and exact.roughness == pytest.approx(0, abs=1e-3)
    assert archived.stretch == pytest.approx(1.5, rel=0.1) and archived.size == pytest.approx(exact.size, rel=1e-3)
    assert sequence == exact
    assert find_result(tmp_path, "c") is None
    with (tmp_path / "b_0009.ply").open("wb") as file:
        write_ply(file, replace(splats, **{n: getattr(splats, n)[:9] for n in ("scales", "opacities", "sh")},
                                means=splats.means[:, :9], quats=splats.quats[:, :9]), 0)
    with pytest.raises(InputError) as caught:
        find_result(tmp_path, "b")
    assert caught.value.code == "uneven_sequence"


def test_placed_nodes_and_stored_colours(tmp_path):
    half = np.sqrt(0.5)
    node = {"translation": [1, 2, 3], "rotation": [0, half, 0, half], "scale": [2, 2, 2]}
    write_glb(tmp_path / "a.glb", CORNERS, FACES, np.uint8([[255, 0, 51, 255]] * 4), node=node)
    found = read_moving_glb(tmp_path / "a.glb")
    np.testing.assert_allclose(found.colors, [[1, 0, 0.2]] * 4)
    np.testing.assert_allclose(found.vertices[0], [[1, -3, 2], [1, -1, 2], [1, -3, 4], [3, -3, 2]], atol=1e-6)
    with pytest.raises(InputError) as caught:
        measure(found)
    assert caught.value.code == "still_result"


@pytest.mark.parametrize("write, code", [
    (lambda path: None, "missing_file"),
    (lambda path: path.write_bytes(b"glTF"), "unreadable_file"),
    (lambda path: path.write_bytes(b"something else, longer than a header"), "unreadable_file"),
    (lambda path: write_glb(path, CORNERS, np.zeros((0, 3), int)), "empty_mesh"),
])
def test_a_file_that_is_no_mesh_is_named(tmp_path, write, code):
    write(tmp_path / "a.glb")
    with pytest.raises(InputError) as caught:
        read_moving_glb(tmp_path / "a.glb")
    assert caught.value.code == code and "a.glb" in caught.value.message


def change(folder, **values):
    path = folder / "asset.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if v is not None}))


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "asset.json").write_text("{"), "can't be read"),
    (lambda folder: (folder / "asset.json").write_text("[]"), "no object"),
    (lambda folder: change(folder, prompt=None), "no prompt"),
    (lambda folder: change(folder, front="up"), "front 'up'"),
    (lambda folder: change(folder, gaussians=7), "6000 Gaussians"),
    (lambda folder: change(folder, vertices=9999), "9999"),
    (lambda folder: (folder / "mesh.glb").unlink(), "mesh.glb can't be read"),
    (lambda folder: (folder / "gaussians.ply").write_bytes(b"ply"), "hash differs"),
])
def test_an_asset_that_is_not_whole_is_named(a_set, spoil, words):
    spoil(a_set / "ball")
    with pytest.raises(InputError) as caught:
        read_asset(a_set / "ball")
    assert caught.value.code == "bad_asset" and "'ball'" in caught.value.message and words in caught.value.message


def test_the_command_measures_what_it_can_and_names_the_rest(a_set, tmp_path):
    run = CliRunner().invoke(app, ["evaluate", str(a_set), "--size", "64"])
    assert run.exit_code == 0 and "the ball is bouncing" in run.output
    results = tmp_path / "results"
    results.mkdir()
    write_glb(results / "ball.glb", CORNERS, FACES, targets=[np.ones((4, 3))], weights=[[0], [1], [2]])
    (a_set / "shrunk" / "gaussians.ply").write_bytes(b"")
    run = CliRunner().invoke(app, ["evaluate", str(a_set), "--results", str(results), "--size", "64",
                                   "--report", str(tmp_path / "report.json")])
    assert run.exit_code == 1 and "shrunk: 'shrunk' is no whole asset" in run.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ball"]["motion"]["frames"] == 3 and report["ball"]["result_look"]["psnr"] is None
    assert report["shrunk"]["error"]["code"] == "bad_asset"
    (results / "ball.glb").unlink()
    run = CliRunner().invoke(app, ["evaluate", str(a_set), "--results", str(results), "--size", "64"])
    assert run.exit_code == 1 and "no result of 'ball'" in run.output


@pytest.mark.parametrize("arguments, code", [(["absent"], "missing_folder"), (["."], "no_assets"),
                                             ([".", "--results", "absent"], "missing_folder")])
def test_folders_that_are_of_no_use(tmp_path, monkeypatch, arguments, code):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["evaluate", *arguments])
    assert isinstance(run.exception, InputError) and run.exception.code == code
