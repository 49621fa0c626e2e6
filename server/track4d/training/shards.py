"""Shards of multi-view clips: what `track4d dataset render` writes and training reads.

A shard is a plain tar. Files that share a name up to the first dot are one clip, as in WebDataset:

    KEY.json           caption, model, rig, clip, licence, credit, ...
    KEY.npz            viewmats, Ks, tracks, visibility, mask as in `Clip`
    KEY.view_V.png     all frames of view V, one below the other, RGBA with straight alpha
    KEY.surface_V.png  likewise the surface, 16 bits: (value + SURFACE_REACH) / (2 SURFACE_REACH), 0 off the object

Why tar: it is written front to back, read in any order through an index of offsets, opened by every tool, and needs no
library. Why PNG: lossless, an eighth of the size of raw pictures (safetensors and npz store those), and decoded by OpenCV
faster than a disk delivers raw ones. A shard appears under its name only when it is complete.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from track4d_protocol.errors import InputError

from .video_data import VALIDATION_SHARE, Clip, ClipShape, fit_clip, shuffled

SURFACE_REACH = 2.0  # canonical units; a first frame lies within 1
_ARRAYS = ("viewmats", "Ks", "tracks", "visibility", "mask")
_FASTEST = [cv2.IMWRITE_PNG_COMPRESSION, 3]

Members = dict[str, tuple[int, int]]  # suffix to offset and length in the tar


@dataclass(frozen=True)
class Entry:
    """One clip of a shard: where its files are, and its KEY.json."""

    shard: Path
    key: str
    members: Members
    info: dict


def write_shard(path: Path, clips: list[tuple[str, dict[str, bytes]]]) -> None:
    """Writes clips from `encode` under their keys; the file is there completely or not at all."""
    temporary = path.with_name(path.name + ".new")
    with tarfile.open(temporary, "w") as tar:
        for key, files in clips:
            for suffix, data in files.items():
                item = tarfile.TarInfo(f"{key}.{suffix}")
                item.size = len(data)
                tar.addfile(item, io.BytesIO(data))
    os.replace(temporary, path)


def encode(clip: Clip) -> dict[str, bytes]:
    """The files of a clip by their suffix."""
    files = {"json": json.dumps({"caption": clip.caption} | clip.info, indent=1).encode()}
    with io.BytesIO() as stream:
        np.savez_compressed(stream, **{name: getattr(clip, name) for name in _ARRAYS})
        files["npz"] = stream.getvalue()
    for v, view in enumerate(clip.video):
        files[f"view_{v}.png"] = _png(view[..., [2, 1, 0, 3]])
    if clip.surface is not None:
        on = (clip.surface != 0).any(-1, keepdims=True)
        values = np.rint((clip.surface.astype(np.float32) + SURFACE_REACH) / (2 * SURFACE_REACH) * 65535).clip(1, 65535) * on
        for v, view in enumerate(values.astype(np.uint16)):
            files[f"surface_{v}.png"] = _png(view)
    return files


def _png(frames: np.ndarray) -> bytes:
    return cv2.imencode(".png", frames.reshape(-1, *frames.shape[2:]), _FASTEST)[1].tobytes()


def read_clip(entry: Entry, surface: bool = False) -> Clip:
    """A clip as it was written.

    Raises:
        InputError: bad_shard.
    """
    with entry.shard.open("rb") as file:

        def read(suffix: str) -> bytes:
            offset, length = entry.members[suffix]
            file.seek(offset)
            return file.read(length)

        try:
            arrays = dict(np.load(io.BytesIO(read("npz"))))
            views, frames = arrays["tracks"].shape[:2]
            video = np.stack([_pictures(read(f"view_{v}.png"), frames) for v in range(views)])[..., [2, 1, 0, 3]]
            places = None
            if surface:
                codes = np.stack([_pictures(read(f"surface_{v}.png"), frames) for v in range(views)])
                values = codes.astype(np.float32) / 65535 * (2 * SURFACE_REACH) - SURFACE_REACH
                places = np.where(codes.any(-1, keepdims=True), values, 0).astype(np.float16)
        except (KeyError, ValueError, OSError, zlib.error, cv2.error) as error:
            raise _bad_shard(entry.shard, f"the clip '{entry.key}' is damaged ({error!r})") from error
    return Clip(np.ascontiguousarray(video), entry.info["caption"], surface=places, info=entry.info,
                **{name: arrays[name] for name in _ARRAYS})


def _pictures(data: bytes, frames: int) -> np.ndarray:
    strip = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if strip is None:
        raise ValueError("no picture")
    return strip.reshape(frames, -1, *strip.shape[1:])


def _bad_shard(path: Path, why: str) -> InputError:
    return InputError("bad_shard", f"The shard '{path.name}' can't be read: {why}.",
                      "Delete it and run track4d dataset render again.")


def read_index(shard: Path) -> list[Entry]:
    """The clips of a shard, without their pictures.

    Raises:
        InputError: bad_shard.
    """
    found: dict[str, Members] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for item in tar:
                key, suffix = item.name.split(".", 1)
                found.setdefault(key, {})[suffix] = (item.offset_data, item.size)
        with shard.open("rb") as file:
            entries = []
            for key, members in found.items():
                offset, length = members["json"]
                file.seek(offset)
                entries.append(Entry(shard, key, members, json.loads(file.read(length))))
    except (tarfile.TarError, ValueError, KeyError, OSError) as error:
        raise _bad_shard(shard, repr(error)) from error
    return entries


@dataclass(frozen=True)
class Shards:
    """The clips of a folder of shards in an endless, shuffled sequence; made by `open_shards`."""

    entries: tuple[Entry, ...]

    def __call__(self, seed: int, position: int, shape: ClipShape) -> Clip:
        entry = self.entries[shuffled(seed, position, len(self.entries))]
        return fit_clip(read_clip(entry, shape.surface), shape, np.random.default_rng([seed, position, 4]))


def open_shards(folder: Path, validation: bool = False, share: float = VALIDATION_SHARE) -> Shards:
    """The clips of a folder of shards that are for training, or for validation.

    They are split by rig: models that share a skeleton share their motions too, and would give the answers away.

    Args:
        share: of the rigs, which go to validation; at least one if there are several. 0 for none.

    Raises:
        InputError: no_shards, bad_shard.
    """
    entries = [entry for shard in sorted(folder.glob("*.tar")) for entry in read_index(shard)]
    held_out = validation_rigs({entry.info["rig"] for entry in entries}, share)
    chosen = tuple(entry for entry in entries if (entry.info["rig"] in held_out) == validation)
    if not chosen:
        raise InputError("no_shards", f"'{folder}' has no clips for {'validation' if validation else 'training'}.",
                         "Make some: track4d dataset render MODELS -o FOLDER.")
    return Shards(chosen)


def validation_rigs(rigs: set[str], share: float) -> set[str]:
    """Which rigs are held out: those first in an order that depends on nothing but their names."""
    count = max(round(share * len(rigs)), 1) if share and len(rigs) > 1 else 0
    return set(sorted(rigs, key=lambda rig: (zlib.crc32(rig.encode()), rig))[:count])
