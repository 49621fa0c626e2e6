"""4D Gaussians as arrays and as files."""

import io
import json
import struct

import numpy as np
import pytest
from scipy.spatial import cKDTree
from track4d_protocol.errors import InputError
from track4d_protocol.splat_files import read_ply, read_t4d, write_gltf, write_ply, write_t4d
from track4d_protocol.splats import Splats, multiply_quats, quat_from_matrix, sh_rotation, sh_rows


def make(count=300, frames=6, degree=2, terms=2, seed=0) -> Splats:
    """A surface-like cloud that turns and drifts, with smoothly varying looks."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    angles = np.linspace(0, 1.5, frames)
    turns = [rotation_z(angle) for angle in angles]
    means = np.stack([points @ turn.T + [0.1 * k, 0, 0] for k, turn in enumerate(turns)])
    rest = rng.normal(size=(count, 4))
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    quats = np.stack([multiply_quats(quat_from_matrix(turn), rest) for turn in turns])
    sh = np.stack([np.sin(points @ rng.normal(size=3) + k) for k in range((degree + 1) ** 2 * terms * 3)], 1)
    sh = sh.reshape(count, -1, terms, 3) * 0.5
    scales = np.exp(rng.normal(-3.5, 0.3, (count, 3)))
    arrays = (means, quats, scales, rng.uniform(0.2, 1, count), sh)
    return Splats(*(array.astype(np.float32) for array in arrays), fps=30.0)


def rotation_z(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def test_harmonics_are_orthonormal():
    z, azimuth = np.polynomial.legendre.leggauss(8)[0], np.arange(16) * np.pi / 8
    weights = np.repeat(np.polynomial.legendre.leggauss(8)[1], 16) * np.pi / 8
    ring = np.sqrt(1 - z**2)[:, None]
    x, y = (ring * np.cos(azimuth)).ravel(), (ring * np.sin(azimuth)).ravel()
    basis = np.stack(np.broadcast_arrays(*sh_rows(x, y, np.repeat(z, 16), 3)))
    assert np.allclose((basis * weights) @ basis.T, np.eye(16), atol=1e-9)


def test_turning_takes_the_colours_along():
    splats, turn = make(degree=3), rotation_z(0.7) @ np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
    viewer = np.array([3.0, 1.0, 0.5])
    turned = splats.turned(turn)
    assert np.allclose(turned.colors(2, turn @ viewer), splats.colors(2, viewer), atol=1e-5)
    assert not np.allclose(turned.colors(2, viewer), splats.colors(2, viewer), atol=0.02)
    assert np.allclose(sh_rotation(np.eye(3), 3), np.eye(16), atol=1e-9)


def test_colours_vary_with_time_and_direction():
    splats = make(degree=1, terms=2)
    assert np.abs(splats.colors(0, direction=[0, 0, 1]) - splats.colors(5, direction=[0, 0, 1])).max() > 0.05
    assert np.abs(splats.colors(0, direction=[0, 0, 1]) - splats.colors(0, direction=[1, 0, 0])).max() > 0.05


@pytest.mark.parametrize("degree", [0, 1, 3])
def test_ply_round_trip(tmp_path, degree):
    splats = make(degree=degree)
    path = tmp_path / "frame.ply"
    with path.open("wb") as file:
        write_ply(file, splats, 3)
    back = read_ply(path)
    assert np.allclose(back.means[0], splats.means[3]) and np.allclose(back.quats[0], splats.quats[3], atol=1e-6)
    assert np.allclose(back.scales, splats.scales, rtol=1e-5) and np.allclose(back.opacities, splats.opacities, atol=1e-5)
    assert np.allclose(back.sh[:, :, 0], splats.sh_at(3), atol=1e-6)
    names = [line.split()[-1] for line in path.read_bytes().split(b"end_header")[0].decode().split("\n") if "float" in line]
    assert len(names) == 17 + 3 * ((degree + 1) ** 2 - 1) and names[:9] == "x y z nx ny nz f_dc_0 f_dc_1 f_dc_2".split()


def read_glb(data: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<I", data[12:16])[0]
    assert struct.unpack("<4sII", data[:12]) == (b"glTF", 2, len(data)) and data[16:20] == b"JSON"
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def test_gltf_holds_every_frame():
    splats = make(degree=1)
    file = io.BytesIO()
    write_gltf(file, splats)
    document, binary = read_glb(file.getvalue())

    def values(index: int) -> np.ndarray:
        accessor = document["accessors"][index]
        view = document["bufferViews"][accessor["bufferView"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        return np.frombuffer(binary, "<f4", accessor["count"] * width, view["byteOffset"]).reshape(accessor["count"], width)

    assert document["extensionsUsed"] == ["KHR_gaussian_splatting"] and len(document["meshes"]) == splats.frames
    for frame, mesh in enumerate(document["meshes"]):
        (primitive,) = mesh["primitives"]
        assert primitive["mode"] == 0
        assert primitive["extensions"]["KHR_gaussian_splatting"] == {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}
        attributes = primitive["attributes"]
        x, y, z = splats.means[frame].T
        assert np.allclose(values(attributes["POSITION"]), np.stack([x, z, -y], 1), atol=1e-6)
        assert np.allclose(np.linalg.norm(values(attributes["KHR_gaussian_splatting:ROTATION"]), axis=1), 1, atol=1e-5)
        assert np.allclose(values(attributes["KHR_gaussian_splatting:SCALE"]), splats.scales)
        assert np.allclose(values(attributes["KHR_gaussian_splatting:SH_DEGREE_0_COEF_0"]), splats.sh_at(frame)[:, 0], atol=1e-5)
        assert {f"KHR_gaussian_splatting:SH_DEGREE_1_COEF_{k}" for k in range(3)} <= attributes.keys()
    # at every frame's moment exactly its node has its size
    (animation,) = document["animations"]
    for frame in range(splats.frames):
        shown = []
        for channel in animation["channels"]:
            sampler = animation["samplers"][channel["sampler"]]
            times, sizes = values(sampler["input"])[:, 0], values(sampler["output"])
            assert (np.diff(times) > 0).all() and channel["target"]["path"] == "scale" and sampler["interpolation"] == "STEP"
            if sizes[np.searchsorted(times, (frame + 0.5) / splats.fps) - 1, 0] == 1:
                shown.append(channel["target"]["node"])
        assert shown == [frame]


def test_the_archive_is_small_and_close(tmp_path):
    splats = make(count=4000, frames=16, degree=1, terms=3)
    path = tmp_path / "motion.t4d"
    with path.open("wb") as file:
        write_t4d(file, splats)
    sequence = io.BytesIO()
    for frame in range(splats.frames):
        write_ply(sequence, splats, frame)
    assert path.stat().st_size <= sequence.tell() / 5
    back = read_t4d(path)
    traits = [np.concatenate([one.means[0], np.log(one.scales), one.sh[:, 0, 0]], 1) for one in (back, splats)]
    order = cKDTree(traits[1]).query(traits[0])[1]
    assert len(set(order)) == 4000 and back.fps == 30
    diagonal = np.linalg.norm(np.ptp(splats.means.reshape(-1, 3), axis=0))
    assert np.abs(back.means - splats.means[:, order]).max() < 5e-4 * diagonal
    assert (np.abs((back.quats * splats.quats[:, order]).sum(-1)) > np.cos(np.radians(1.5))).all()
    assert np.abs(np.log(back.scales / splats.scales[order])).max() < 0.02
    assert np.abs(back.sh - splats.sh[order]).max() < 0.01 and np.abs(back.opacities - splats.opacities[order]).max() < 0.01


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "other"])
def test_damaged_files_are_refused(tmp_path, damage):
    file = io.BytesIO()
    write_t4d(file, make())
    data = bytearray(file.getvalue())
    data = {"cut": data[:-40], "header": data[:4] + b"\xff\xff\xff\xff" + data[8:], "empty": b"", "other": b"GIF89a" * 20}[damage]
    for name, read in (("a.t4d", read_t4d), ("a.ply", read_ply)):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError) as caught:
            read(tmp_path / name)
        assert caught.value.code == "bad_splat_file" and caught.value.action
