"""Which files can be read and written, and how several new ones appear all at once or not at all. No Blender here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from track4d_protocol.errors import InputError

READABLE = (".glb", ".gltf", ".obj", ".fbx", ".blend", ".ply")
WRITABLE = (".glb", ".gltf", ".blend", ".fbx", ".usdc", ".usd", ".abc")


def check_readable(path: Path | str) -> Path:
    """The absolute path of a 3D file.

    Raises:
        InputError: unsupported_format, missing_file.
    """
    path = Path(path).absolute()
    if path.suffix.lower() not in READABLE:
        raise InputError(
            "unsupported_format", f"Track4D can't read '{path.name}'.", f"Use one of {', '.join(READABLE)}."
        )
    if not path.is_file():
        raise InputError("missing_file", f"The file '{path}' isn't there.", "Check its name and folder.")
    return path


def check_writable(path: Path | str, suffixes: Iterable[str] = WRITABLE) -> Path:
    """The absolute path of a file to be written.

    Raises:
        InputError: unsupported_format, missing_folder.
    """
    path = Path(path).absolute()
    if path.suffix.lower() not in suffixes:
        raise InputError(
            "unsupported_format", f"Track4D can't write '{path.name}'.", f"Use one of {', '.join(suffixes)}."
        )
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError(
            "missing_folder", f"The folder '{path.parent}' isn't there or can't be written to.", "Make it first."
        )
    return path


class Staging:
    """Files on their way, each in a folder of its own beside its place: all of them appear at `commit`, or none.

    A format may write further files beside its own (textures, buffers); they move along.
    """

    def __init__(self) -> None:
        self._folders: list[tuple[tempfile.TemporaryDirectory[str], Path]] = []

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for folder, _ in self._folders:
            folder.cleanup()

    def place(self, path: Path) -> Path:
        """Where to write what will be `path`, which `check_writable` has seen."""
        folder = tempfile.TemporaryDirectory(prefix=".track4d-", dir=path.parent)
        self._folders.append((folder, path))
        return Path(folder.name) / path.name

    def commit(self) -> list[Path]:
        """Moves everything to its place, the named files last, and returns the named ones."""
        moves = []
        for folder, path in self._folders:
            root = Path(folder.name)
            moves += [(file, path.parent / file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
        named = {path for _, path in self._folders}
        for file, target in sorted(moves, key=lambda move: move[1] in named):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        return [path for _, path in self._folders]
