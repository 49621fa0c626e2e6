"""Messages to frames and back, and the same for files. See docs/protocol.md.

A message is [magic, version, kind] [header] [array] [array] ...: the header is a small MessagePack map, the arrays are
raw bytes that the header declares by name, dtype, shape and size. Everything is checked before an array is made;
nothing that comes from the wire is code, a path or a pickle.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from . import PROTOCOL_VERSION
from .errors import Track4DError, TransportError
from .limits import FILE_LIMITS, LIMITS, Limits

MAGIC = b"T4D"
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "int32", "int64", "float32", "float64", "bool")}
_FILE_HEAD = struct.Struct("<3sBI")  # magic, version, bytes of the header
_ALIGNMENT = 64  # of arrays in files, so that a mapped file gives aligned arrays
_SLICE = 16 << 20  # bytes written between two calls of `tick`


@dataclass
class Message:
    """One decoded message.

    Attributes:
        kind: "hello", "submit", "progress", ...
        body: the header without the declaration of arrays.
        arrays: views of the received bytes, read-only where those are.
    """

    kind: str
    body: dict[str, Any]
    arrays: dict[str, np.ndarray]


def encode(kind: str, body: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None,
           limits: Limits = LIMITS) -> list[Any]:
    """Frames of a message, for `send_multipart`.

    Args:
        body: plain values (text, numbers, lists, maps; numpy scalars are converted).
        arrays: by name; dtypes of `DTYPES`.

    Raises:
        TransportError: a value or an array can't travel, or is larger than the limits.
    """
    header, raw = _pack(body, arrays or {}, limits)
    return [MAGIC + bytes([PROTOCOL_VERSION]) + kind.encode("ascii"), header, *[_bytes_of(array) for array in raw]]


def decode(frames: Sequence[Any], limits: Limits = LIMITS) -> Message:
    """The inverse of `encode`, for frames that nobody has checked.

    Args:
        frames: bytes-like, without the routing frame.

    Raises:
        TransportError: `protocol_mismatch`, `bad_message` or `too_large`.
    """
    kind = read_kind(frames)
    if len(frames) < 2:
        raise _bad("it has no header")
    body, declared = _unpack(frames[1], limits)
    if len(frames) - 2 != len(declared):
        raise _bad(f"it declares {len(declared)} arrays and brings {len(frames) - 2}")
    arrays = {}
    for (name, dtype, shape, size), frame in zip(declared, frames[2:]):
        view = memoryview(frame)
        if view.nbytes != size:
            raise _bad(f"the array '{name}' has {view.nbytes} bytes, not {size}")
        arrays[name] = np.frombuffer(view, dtype).reshape(shape)
    return Message(kind, body, arrays)


def read_kind(frames: Sequence[Any]) -> str:
    """The kind of a message, from its first frame.

    Raises:
        TransportError: `bad_message`, or `protocol_mismatch` which names both versions.
    """
    head = bytes(memoryview(frames[0])[:64]) if frames else b""
    if len(head) < 5 or head[:3] != MAGIC:
        raise _bad("it doesn't begin like a message of Track4D")
    if head[3] != PROTOCOL_VERSION:
        raise mismatch(theirs=head[3])
    kind = head[4:].decode("ascii", "replace")
    if not kind.replace("_", "").isalpha() or len(head) > 40:
        raise _bad("its kind is malformed")
    return kind


def mismatch(theirs: int) -> TransportError:
    """The error for a peer that speaks another version of the protocol."""
    older = "server" if theirs < PROTOCOL_VERSION else "add-on"
    message = f"The other side speaks version {theirs} of the protocol, this side version {PROTOCOL_VERSION}."
    return TransportError("protocol_mismatch", message,
                          f"Update the {older} so that both are of one release, and restart both.")


def write_file(path: Path, body: Mapping[str, Any], arrays: Mapping[str, np.ndarray], limits: Limits = FILE_LIMITS,
               tick: Callable[[], object] = lambda: None) -> int:
    """Writes a message without kind to a file that appears whole or not at all, and is on the disk when this returns.

    Args:
        tick: called now and then during a long write.

    Returns:
        Bytes of the file.

    Raises:
        TransportError: as `encode`.
        OSError: the disk is full or the folder can't be written.
    """
    header, raw = _pack(body, arrays, limits)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_FILE_HEAD.pack(MAGIC, PROTOCOL_VERSION, len(header)) + header)
            for array in raw:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                view = _bytes_of(array)
                for start in range(0, view.nbytes, _SLICE):
                    file.write(view[start:start + _SLICE])
                    if view.nbytes > _SLICE:
                        _to_disk(file)
                    tick()
            size = file.tell()
            _to_disk(file)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _folder_to_disk(path.parent)
    return size


def read_file(data: bytearray | bytes | memoryview, limits: Limits = FILE_LIMITS) -> Message:
    """The inverse of `write_file`, from the file's bytes; arrays are views of them.

    Raises:
        TransportError: as `decode`.
    """
    view = memoryview(data)
    if view.nbytes < _FILE_HEAD.size:
        raise _bad("the file is cut off")
    magic, version, length = _FILE_HEAD.unpack_from(view)
    if magic != MAGIC:
        raise _bad("the file isn't one of Track4D")
    if version != PROTOCOL_VERSION:
        raise mismatch(version)
    end = _FILE_HEAD.size + length
    if end > view.nbytes:
        raise _bad("the file is cut off")
    body, declared = _unpack(view[_FILE_HEAD.size:end], limits)
    arrays = {}
    for name, dtype, shape, size in declared:
        start = end + -end % _ALIGNMENT
        end = start + size
        if end > view.nbytes:
            raise _bad(f"the file ends within the array '{name}'")
        arrays[name] = np.frombuffer(view[start:end], dtype).reshape(shape)
    return Message("file", body, arrays)


def _pack(body: Mapping[str, Any], arrays: Mapping[str, np.ndarray], limits: Limits) -> tuple[bytes, list[np.ndarray]]:
    raw = []
    declared = []
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.name not in DTYPES:
            raise TransportError("bad_message", f"The array '{name}' has the dtype {array.dtype}, which can't travel.",
                                 f"Use one of {', '.join(DTYPES)}.")
        raw.append(np.ascontiguousarray(array, DTYPES[array.dtype.name]))
        declared.append([name, array.dtype.name, list(array.shape), array.nbytes])
    try:
        header = msgpack.packb({"body": body, "arrays": declared}, default=_plain)
    except (TypeError, ValueError, OverflowError) as error:
        raise TransportError("bad_message", f"A value of the message can't travel: {error}.",
                             "Use text, numbers, lists and maps only.") from error
    if len(header) > limits.header_bytes:
        raise _large(f"the header has {len(header)} bytes, the limit is {limits.header_bytes}")
    _check_declared(declared, limits)
    return header, raw


def _unpack(header: Any, limits: Limits) -> tuple[dict[str, Any], list[tuple[str, np.dtype, tuple[int, ...], int]]]:
    view = memoryview(header)
    if view.nbytes > limits.header_bytes:
        raise _large(f"the header has {view.nbytes} bytes, the limit is {limits.header_bytes}")
    try:
        content = msgpack.unpackb(view, ext_hook=_no_extension)
        body, declared = content["body"], content["arrays"]
        if len(content) != 2 or not isinstance(body, dict) or not isinstance(declared, list):
            raise ValueError("its parts have the wrong types")
    except Track4DError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise _bad(f"its header can't be read ({type(error).__name__}: {error})") from error
    _check_declared(declared, limits)
    return body, [(name, DTYPES[dtype], tuple(shape), size) for name, dtype, shape, size in declared]


def _check_declared(declared: list[Any], limits: Limits) -> None:
    """Every array's declaration: names, dtypes, shapes and byte counts agree and are within the limits."""
    if len(declared) > limits.arrays:
        raise _large(f"it has {len(declared)} arrays, the limit is {limits.arrays}")
    total = 0
    names = set()
    for entry in declared:
        if not isinstance(entry, list) or len(entry) != 4:
            raise _bad("the declaration of an array is malformed")
        name, dtype, shape, size = entry
        if not isinstance(name, str) or not 0 < len(name) <= 64 or name in names:
            raise _bad("the name of an array is malformed or not unique")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise _bad(f"the array '{name}' has a dtype that isn't one of {', '.join(DTYPES)}")
        if not isinstance(shape, list) or len(shape) > limits.dimensions or not all(
                type(extent) is int and 0 <= extent < 2**40 for extent in shape):
            raise _bad(f"the shape of the array '{name}' is malformed")
        if type(size) is not int or math.prod(shape) * DTYPES[dtype].itemsize != size:
            raise _bad(f"the array '{name}' of {dtype} {shape} can't have {size!r} bytes")
        if size > limits.frame_bytes:
            raise _large(f"the array '{name}' has {size} bytes, the limit is {limits.frame_bytes}")
        names.add(name)
        total += size
    if total > limits.message_bytes:
        raise _large(f"its arrays have {total} bytes, the limit is {limits.message_bytes}")


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8).data) if array.size else memoryview(b"")


def _plain(value: Any) -> Any:
    """Numpy's scalars and small arrays, and paths, as plain values."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def _no_extension(code: int, data: bytes) -> Any:
    raise _bad(f"its header uses the extension type {code}")


def _bad(reason: str) -> TransportError:
    return TransportError("bad_message", f"A message can't be read: {reason}.", "Update the add-on and the server.")


def _large(reason: str) -> TransportError:
    return TransportError("too_large", f"A message is too large: {reason}.",
                          "Simplify the object, or use smaller pictures.")


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    if os.name != "posix":  # Windows can't open a folder; its rename is journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
