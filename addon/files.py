"""Which files can be read and written, and how several new ones appear all at once or not at all. No Blender here."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from track4d_protocol.errors import InputError

READABLE = (".glb", ".gltf", ".obj", ".fbx", ".blend", ".ply")
WRITABLE = {  # suffix: what it holds
    ".glb": "glTF with morph targets",
    ".gltf": "glTF with morph targets, in several files",
    ".blend": "the whole scene",
    ".fbx": "FBX with blend shapes",
    ".usdc": "USD with a mesh per frame",
    ".usd": "USD with a mesh per frame",
    ".abc": "Alembic",
    ".mdd": "point cache",
    ".pc2": "point cache",
    ".obj": "OBJ, one file per frame",
    ".splats.glb": "Gaussians as glTF with KHR_gaussian_splatting",
    ".ply": "Gaussians as 3DGS PLY, one file per frame",
    ".t4d": "Gaussians as a compact archive",
}
SPLATS = (".splats.glb", ".ply", ".t4d")  # hold Gaussians, no mesh


def suffix(path: Path) -> str:
    """What says the format: the last suffix, and `.splats.glb` as a whole."""
    return ".splats.glb" if path.name.lower().endswith(".splats.glb") else path.suffix.lower()


def numbered(path: Path, frame: int) -> Path:
    """The file of one frame of a sequence: fox.obj becomes fox_0001.obj."""
    return path.with_name(f"{path.stem}_{frame:04d}{path.suffix}")


def check_readable(path: Path | str) -> Path:
    """The absolute path of a 3D file.

    Raises:
        InputError: unsupported_format, missing_file.
    """
    path = Path(path).absolute()
    if path.suffix.lower() not in READABLE:
        raise InputError("unsupported_format", f"Track4D can't read '{path.name}'.", f"Use one of {', '.join(READABLE)}.")
    if not path.is_file():
        raise InputError("missing_file", f"The file '{path}' isn't there.", "Check its name and folder.")
    return path


def unreadable(path: Path, error: Exception) -> InputError:
    """What a user is told of a file that Blender's importers give up on."""
    reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
    return InputError(
        "unreadable_file", f"'{path.name}' can't be read: {reason[0]}", "Open it in Blender to see what is wrong with it."
    )


def check_writable(path: Path | str, suffixes: Iterable[str] = WRITABLE) -> Path:
    """The absolute path of a file to be written.

    Raises:
        InputError: unsupported_format, missing_folder.
    """
    path = Path(path).absolute()
    if suffix(path) not in suffixes:
        raise InputError("unsupported_format", f"Track4D can't write '{path.name}'.", f"Use one of {', '.join(suffixes)}.")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise InputError("missing_folder", f"The folder '{path.parent}' isn't there or can't be written to.", "Make it first.")
    return path


class Staging:
    """Files on their way, each in a folder of its own beside its place: all of them appear at `commit`, or none.

    A format may write further files beside its own (textures, buffers), or several in place of it (a sequence).
    """

    def __init__(self) -> None:
        self._folders: list[tuple[tempfile.TemporaryDirectory[str], Path]] = []

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *error: object) -> None:
        for folder, _ in self._folders:
            folder.cleanup()

    def place(self, path: Path) -> Path:
        """Where to write what will be `path`, which `check_writable` has seen."""
        folder = tempfile.TemporaryDirectory(prefix=".track4d-", dir=path.parent)
        self._folders.append((folder, path))
        return Path(folder.name) / path.name

    def commit(self) -> list[Path]:
        """Moves everything to its place, the named files last, and returns them: of a sequence, each file with its suffix."""
        moves, named = [], []
        for folder, path in self._folders:
            root = Path(folder.name)
            moves += [(file, path.parent / file.relative_to(root)) for file in root.rglob("*") if file.is_file()]
            several = sorted(path.parent / file.name for file in root.glob(f"*{path.suffix}"))
            named += [path] if (root / path.name).exists() else several
        for file, target in sorted(moves, key=lambda move: move[1] in named):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
        return named


def leave(code: int) -> NoReturn:
    """Ends the process at once, with everything written.

    Taking down Blender 4.2 crashes after glTF was written or not read, and taking down 4.5 waits for ever at times.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "bpy" in sys.modules:  # whose own end would remove this folder
        folder = Path(sys.modules["bpy"].app.tempdir)
        if folder.name.startswith("blender_"):
            shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)
