"""Files of Gaussians: 3DGS PLY, glTF with KHR_gaussian_splatting, and the compact 4D archive `.t4d`."""

from __future__ import annotations

import json
import lzma
import math
import struct
from pathlib import Path
from typing import BinaryIO

import msgpack
import numpy as np

from .errors import InputError
from .limits import FILE_LIMITS
from .splats import HIGHEST_DEGREE, Splats

# --- 3DGS PLY ---------------------------------------------------------------------------------------------------------


def write_ply(file: BinaryIO, splats: Splats, frame: int) -> None:
    """One frame in the layout of 3D Gaussian splatting (Kerbl et al. 2023), that its viewers read.

    Scales are logarithms, opacities logits, rotations wxyz, harmonics above degree 0 channel by channel.
    """
    sh = splats.sh_at(frame)  # [G, K, 3]
    count = len(sh)
    rest = sh[:, 1:].transpose(0, 2, 1).reshape(count, -1)
    opacities = np.clip(splats.opacities, 1e-6, 1 - 1e-6)[:, None]
    columns = [
        splats.means[frame], np.zeros((count, 3)), sh[:, 0], rest, np.log(opacities / (1 - opacities)),
        np.log(np.maximum(splats.scales, 1e-12)), splats.quats[frame],
    ]  # fmt: skip
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property float {name}" for name in _ply_names(rest.shape[1])]
    file.write("\n".join([*header, "end_header", ""]).encode())
    file.write(np.concatenate(columns, 1).astype("<f4").tobytes())


def _ply_names(rest: int) -> list[str]:
    return [
        *("x", "y", "z", "nx", "ny", "nz"),
        *(f"f_dc_{k}" for k in range(3)),
        *(f"f_rest_{k}" for k in range(rest)),
        "opacity",
        *(f"scale_{k}" for k in range(3)),
        *(f"rot_{k}" for k in range(4)),
    ]


def read_ply(path: Path) -> Splats:
    """One frame of Gaussians from a binary 3DGS PLY, whatever other properties it has.

    Raises:
        InputError: bad_splat_file.
    """
    data = Path(path).read_bytes()
    head, found, body = data.partition(b"end_header\n")
    lines = head.decode("ascii", "replace").split("\n")
    names = [line.split()[2] for line in lines if line.startswith("property float ")]
    counts = [int(line.split()[2]) for line in lines if line.startswith("element vertex ") and line.split()[2].isdigit()]
    rest = sum(name.startswith("f_rest_") for name in names)
    wanted = [name for name in _ply_names(rest) if name not in ("nx", "ny", "nz")]
    whole = found and "format binary_little_endian 1.0" in lines and len(counts) == 1 and set(wanted) <= set(names)
    if not whole or rest not in (0, 9, 24, 45) or len(body) < counts[0] * len(names) * 4:
        raise _bad(path, "is no binary PLY file of 3D Gaussians")
    values = np.frombuffer(body, "<f4", counts[0] * len(names)).reshape(counts[0], -1)
    column = {name: values[:, k] for k, name in enumerate(names)}

    def together(*wanted: str) -> np.ndarray:
        return np.stack([column[name] for name in wanted], 1)

    quats = together(*(f"rot_{k}" for k in range(4)))
    sh = together(*(f"f_dc_{k}" for k in range(3)))[:, None]
    if rest:
        higher = together(*(f"f_rest_{k}" for k in range(rest))).reshape(counts[0], 3, -1)
        sh = np.concatenate([sh, higher.transpose(0, 2, 1)], 1)
    return Splats(
        means=together("x", "y", "z")[None],
        quats=(quats / np.linalg.norm(quats, axis=1, keepdims=True))[None],
        scales=np.exp(together("scale_0", "scale_1", "scale_2")),
        opacities=1 / (1 + np.exp(-column["opacity"])),
        sh=sh[:, :, None].copy(),
    )


# --- glTF -------------------------------------------------------------------------------------------------------------

_TO_GLTF = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])  # +Z up to +Y up
_HIDDEN = 1e-6  # scale of the frames that aren't shown: the extension asks for finite positive ones
_FLOAT, _ARRAY_BUFFER, _POINTS = 5126, 34962, 0


def write_gltf(file: BinaryIO, splats: Splats) -> None:
    """A binary glTF of point primitives with KHR_gaussian_splatting, one node per frame, shown one after the other.

    glTF can't animate a Gaussian's rotation or colour, so every frame is a primitive of its own, and a stepped animation of the
    nodes' scales shows one at a time. Scales, opacities and constant colours are stored once.
    """
    splats = splats.turned(_TO_GLTF)
    buffer, views, accessors = bytearray(), [], []

    def accessor(values: np.ndarray, target: int | None = _ARRAY_BUFFER, bounds: bool = False) -> int:
        values = np.ascontiguousarray(values, "<f4")
        view = {"buffer": 0, "byteOffset": len(buffer), "byteLength": values.nbytes}
        views.append(view | ({"target": target} if target else {}))
        buffer.extend(values.tobytes())
        kind = "SCALAR" if values.ndim == 1 else f"VEC{values.shape[1]}"
        entry = {"bufferView": len(views) - 1, "componentType": _FLOAT, "count": len(values), "type": kind}
        if bounds:
            low, high = np.atleast_1d(values.min(0)), np.atleast_1d(values.max(0))
            entry |= {"min": low.tolist(), "max": high.tolist()}
        accessors.append(entry)
        return len(accessors) - 1

    def harmonics(frame: int) -> dict[str, int]:
        sh = splats.sh_at(frame)
        places = [(degree, k) for degree in range(splats.degree + 1) for k in range(2 * degree + 1)]
        return {f"{_NAME}:SH_DEGREE_{d}_COEF_{k}": accessor(sh[:, d * d + k]) for d, k in places}

    shared = {f"{_NAME}:SCALE": accessor(splats.scales), f"{_NAME}:OPACITY": accessor(splats.opacities.clip(0, 1))}
    colors = harmonics(0)
    settings = {_NAME: {"kernel": "ellipse", "colorSpace": "srgb_rec709_display"}}
    meshes, nodes = [], []
    for frame in range(splats.frames):
        attributes = {
            "POSITION": accessor(splats.means[frame], bounds=True),
            f"{_NAME}:ROTATION": accessor(splats.quats[frame][:, [1, 2, 3, 0]]),
            **shared,
            **(harmonics(frame) if frame and splats.sh.shape[2] > 1 else colors),
        }
        meshes.append({"primitives": [{"mode": _POINTS, "attributes": attributes, "extensions": settings}]})
        nodes.append({"mesh": frame, "name": f"frame_{frame:04d}"} | ({"scale": [_HIDDEN] * 3} if frame else {}))
    document = {
        "asset": {"version": "2.0", "generator": "Track4D"},
        "extensionsUsed": [_NAME],
        "scene": 0,
        "scenes": [{"nodes": list(range(len(nodes)))}],
        "nodes": nodes,
        "meshes": meshes,
    }
    if splats.frames > 1:
        samplers, channels = [], []
        for frame in range(splats.frames):
            shown = [k for k in (frame, frame + 1) if k < splats.frames]
            moments = sorted({0, *shown})
            times = accessor(np.array(moments, np.float32) / splats.fps, None, bounds=True)
            sizes = accessor(np.array([[1.0 if k == frame else _HIDDEN] * 3 for k in moments]), None)
            samplers.append({"input": times, "output": sizes, "interpolation": "STEP"})
            channels.append({"sampler": frame, "target": {"node": frame, "path": "scale"}})
        document["animations"] = [{"name": "frames", "samplers": samplers, "channels": channels}]
    document |= {"bufferViews": views, "accessors": accessors, "buffers": [{"byteLength": len(buffer)}]}
    text = json.dumps(document, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = bytes(buffer) + b"\0" * (-len(buffer) % 4)
    file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + len(binary)))
    file.write(struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary)


_NAME = "KHR_gaussian_splatting"

# --- .t4d -------------------------------------------------------------------------------------------------------------

_MAGIC = b"T4D\x01"
# Quantisation steps. Places: share of the diagonal of the box of all frames.
_STEPS = {"means": 1.5e-4, "quats": 0.01, "scales": 0.03, "opacities": 1 / 255, "sh": 0.012}
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 3}]


def write_t4d(file: BinaryIO, splats: Splats) -> None:
    """The compact archive: canonical Gaussians, motion as cosine coefficients, 4D SH coefficients; quantised and packed.

    Neighbours in space lie side by side in the file, places and rotations are transformed over time (DCT-II), and each
    quantised stream is stored as differences in planes of bytes, which LZMA packs well.
    """
    order = _morton_order(splats.means[0])
    means, quats = splats.means[:, order].astype(np.float64), splats.quats[:, order].astype(np.float64)
    quats[0] *= np.where(quats[0, :, :1] < 0, -1, 1)
    for f in range(1, splats.frames):  # q and -q are the same rotation; a smooth path is cheap
        quats[f] *= np.where((quats[f] * quats[f - 1]).sum(-1, keepdims=True) < 0, -1, 1)
    transform = _dct(splats.frames)
    diagonal = float(np.linalg.norm(np.ptp(means.reshape(-1, 3), axis=0))) or 1.0
    streams = {
        "means": np.tensordot(transform, means, 1) / (diagonal * _STEPS["means"]),
        "quats": np.tensordot(transform, quats, 1) / _STEPS["quats"],
        "scales": np.log(np.maximum(splats.scales[order], 1e-12)).T / _STEPS["scales"],
        "opacities": splats.opacities[order][None] / _STEPS["opacities"],
        "sh": splats.sh[order].transpose(1, 2, 3, 0) / _STEPS["sh"],
    }
    packed = {name: _pack(np.round(values), 1 if name in ("means", "quats") else -1) for name, values in streams.items()}
    header = {
        "frames": splats.frames, "count": len(order), "degree": splats.degree, "terms": splats.sh.shape[2],
        "fps": float(splats.fps), "diagonal": diagonal,
        "streams": {name: [width, len(data)] for name, (width, data) in packed.items()},
    }  # fmt: skip
    encoded = msgpack.packb(header)
    file.write(_MAGIC + struct.pack("<I", len(encoded)) + encoded)
    for _, data in packed.values():
        file.write(data)


def read_t4d(path: Path) -> Splats:
    """The inverse of `write_t4d`, up to quantisation and the order of the Gaussians.

    Raises:
        InputError: bad_splat_file.
    """
    data = Path(path).read_bytes()
    try:
        if data[:4] != _MAGIC:
            raise ValueError
        length = struct.unpack("<I", data[4:8])[0]
        header = msgpack.unpackb(data[8 : 8 + length])
        frames, count, degree, terms = (int(header[name]) for name in ("frames", "count", "degree", "terms"))
        known = 0 < frames <= FILE_LIMITS.frames and count > 0 and 0 <= degree <= HIGHEST_DEGREE and 0 < terms <= 64
        if not known or max(frames, terms) * count > FILE_LIMITS.frame_bytes // 64:
            raise ValueError
        shapes = {
            "means": (frames, count, 3), "quats": (frames, count, 4), "scales": (3, count), "opacities": (1, count),
            "sh": ((degree + 1) ** 2, terms, 3, count),
        }  # fmt: skip
        place, streams = 8 + length, {}
        for name, shape in shapes.items():
            width, size = header["streams"][name]
            streams[name] = _unpack(data[place : place + size], shape, int(width), 1 if name in ("means", "quats") else -1)
            place += size
        fps, diagonal = float(header["fps"]), float(header["diagonal"])
    except (ValueError, KeyError, TypeError, struct.error, lzma.LZMAError, msgpack.UnpackException) as error:
        raise _bad(path, "is no whole Track4D archive") from error
    back = _dct(frames).T
    quats = np.tensordot(back, streams["quats"] * _STEPS["quats"], 1)
    return Splats(
        means=np.tensordot(back, streams["means"] * (diagonal * _STEPS["means"]), 1).astype(np.float32),
        quats=(quats / np.maximum(np.linalg.norm(quats, axis=-1, keepdims=True), 1e-9)).astype(np.float32),
        scales=np.exp(streams["scales"].T * _STEPS["scales"]).astype(np.float32),
        opacities=(streams["opacities"][0] * _STEPS["opacities"]).clip(0, 1).astype(np.float32),
        sh=np.ascontiguousarray(streams["sh"].transpose(3, 0, 1, 2) * _STEPS["sh"], np.float32),
        fps=fps,
    )


def _bad(path: Path, what: str) -> InputError:
    return InputError("bad_splat_file", f"'{Path(path).name}' {what}.", "Export the Gaussians again.")


def _dct(frames: int) -> np.ndarray:
    """The orthonormal DCT-II, [F, F]; its transpose is the inverse."""
    k, f = np.arange(frames)[:, None], np.arange(frames)[None]
    rows = np.cos(math.pi * (f + 0.5) * k / frames) * math.sqrt(2 / frames)
    rows[0] /= math.sqrt(2)
    return rows


def _morton_order(points: np.ndarray) -> np.ndarray:
    """The order of points [G, 3] along a curve that visits neighbours one after the other."""
    low, extent = points.min(0), np.maximum(np.ptp(points, axis=0), 1e-9)
    cells = ((points - low) / extent * 1023).astype(np.uint64)
    code = np.zeros(len(points), np.uint64)
    for bit in range(10):
        for axis in range(3):
            code |= ((cells[:, axis] >> np.uint64(bit)) & np.uint64(1)) << np.uint64(3 * bit + axis)
    return np.argsort(code, kind="stable")


def _pack(values: np.ndarray, axis: int) -> tuple[int, bytes]:
    """Whole numbers as packed bytes: differences along the Gaussians' `axis`, low bytes first; width and data."""
    steps = np.diff(values.astype(np.int64), axis=axis, prepend=0)
    folded = np.where(steps < 0, -2 * steps - 1, 2 * steps)  # small numbers of either sign become small
    width = max(1, (int(folded.max(initial=0)).bit_length() + 7) // 8)
    planes = folded.astype("<u8").reshape(-1, 1).view(np.uint8)[:, :width].T
    return width, lzma.compress(np.ascontiguousarray(planes).tobytes(), lzma.FORMAT_RAW, filters=_FILTERS)


def _unpack(data: bytes, shape: tuple[int, ...], width: int, axis: int) -> np.ndarray:
    count = math.prod(shape)
    if not 1 <= width <= 8:
        raise ValueError(width)
    unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS)
    flat = np.frombuffer(unpacker.decompress(data, count * width), np.uint8)
    if len(flat) != count * width:
        raise ValueError(len(flat))
    planes = np.zeros((count, 8), np.uint8)
    planes[:, :width] = flat.reshape(width, count).T
    folded = planes.view("<u8").reshape(shape)
    steps = np.where(folded & 1, -((folded + 1) >> np.uint64(1)).astype(np.int64), (folded >> np.uint64(1)).astype(np.int64))
    return np.cumsum(steps, axis=axis).astype(np.float64)
