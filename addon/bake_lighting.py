"""A folder of models as an evaluation set with baked light. `python -m track4d_addon.bake_lighting --help`.

Standard output carries one JSON object a line: {"stage", "step", "total"}, {"warning"}, {"done"} or {"error"}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from track4d_protocol import __version__
from track4d_protocol.errors import InputError, Track4DError
from track4d_protocol.space import FRONTS
from track4d_protocol.splat_files import write_ply

from .files import READABLE, Staging

MANIFEST = "asset.json"
LOG = "log.jsonl"
LAMPS = ("key", "fill", "back", "background")
MESH, GAUSSIANS = "mesh.glb", "gaussians.ply"


def bake_folder(
    folder: Path,
    out: Path,
    samples: int = 64,
    strengths: dict[str, float] | None = None,
    front: str = "-Y",
    about: dict[str, dict[str, str]] | None = None,
    report: Callable[[int, int, str], None] = lambda step, total, name: None,
) -> dict[str, int]:
    """Bakes every model of a folder into `out/NAME/`: the mesh, its Gaussians and a manifest.

    A model whose manifest says that it was baked from the same file with the same settings is left as it is, so a run that was
    stopped goes on. A model that can't be read is skipped; `out/log.jsonl` has a line for every file of every run.

    Args:
        folder: with .glb, .gltf, .obj, .fbx, .blend and .ply files, or one such file.
        out: made when absent.
        samples: of Cycles, per vertex.
        strengths: of the rig's lamps, by name.
        front: the axis that models face whose entry in `about` has no "front".
        about: per file name, "prompt", "source", "licence", "credit", "front"; from assets.json in the folder by default.
        report: called before each file with (number, of how many, its name), and once at the end.

    Returns:
        numbers of files "baked", "kept" and "failed".

    Raises:
        InputError: missing_folder, no_models, bad_manifest.
    """
    if not folder.exists():
        raise InputError("missing_folder", f"The folder '{folder}' isn't there.", "Check its name.")
    files = [folder] if folder.is_file() else sorted(path for path in folder.iterdir() if path.suffix.lower() in READABLE)
    if not files:
        raise InputError("no_models", f"'{folder}' holds no models.", f"Put files there: {', '.join(READABLE)}.")
    about = _read_about(folder) if about is None else about
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("missing_folder", f"The folder '{out}' can't be made: {error.strerror}.", "Choose another.") from error
    counts = {"baked": 0, "kept": 0, "failed": 0}
    for number, path in enumerate(files):
        report(number, len(files), path.name)
        start = time.perf_counter()
        line: dict[str, Any] = {"file": path.name}
        try:
            outcome = _bake_file(path, out / path.stem, samples, strengths or {}, front, about.get(path.name, {}))
            line |= {"outcome": outcome, "seconds": round(time.perf_counter() - start, 2)}
        except Track4DError as error:
            outcome = "failed"
            line |= {"outcome": outcome, "error": error.to_dict()}
        counts[outcome] += 1
        with (out / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")
    report(len(files), len(files), "")
    return counts


def _read_about(folder: Path) -> dict[str, dict[str, str]]:
    path = (folder.parent if folder.is_file() else folder) / "assets.json"
    if not path.is_file():
        return {}
    try:
        about = json.loads(path.read_text())
        if not all(isinstance(entry, dict) for entry in about.values()):
            raise ValueError("an entry is not an object")
    except (ValueError, AttributeError) as error:
        raise InputError(
            "bad_manifest", f"'{path.name}' can't be read: {error}.", 'Write {"file.glb": {"prompt": ...}, ...}.'
        ) from error
    return about


def _bake_file(path: Path, folder: Path, samples: int, strengths: dict[str, float], front: str, info: dict[str, str]) -> str:
    """Bakes one model; "baked", or "kept" where that was done before."""
    from . import lighting, scene_io

    rig, facing = lighting.rig_with(**strengths), str(info.get("front", front))
    manifest: dict[str, Any] = {
        "name": path.stem,
        "prompt": str(info.get("prompt", "")),
        "source": str(info.get("source", path.name)),
        "licence": str(info.get("licence", "")),
        "credit": str(info.get("credit", "")),
        "front": facing,
        "rig": lighting.rig_to_dict(rig),
        "samples": samples,
        "version": __version__,
        "sha256": {"source": _hash(path)},
    }
    if _is_done(folder, manifest):
        return "kept"
    objects, _ = scene_io.load(path)
    lighting.add_rig(objects, rig, facing)
    lighting.bake(objects, samples)
    lighting.remove_rig()
    write_asset(objects, folder, manifest)
    return "baked"


def write_asset(objects: Sequence[Any], folder: Path, manifest: dict[str, Any]) -> Path:
    """Writes baked meshes as one asset of an evaluation set: mesh, Gaussians and manifest; returns the folder.

    Args:
        objects: with the light in their vertex colours, see `lighting.bake`.
        folder: of the asset, made when absent.
        manifest: name, prompt, source, licence, credit, front, rig, samples, version; counts and hashes are added.

    Raises:
        InputError: missing_folder, export_failed.
    """
    from . import lighting

    splats = lighting.to_splats(objects)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        problem = f"The folder '{folder}' can't be made: {error.strerror}."
        raise InputError("missing_folder", problem, "Choose another.") from error
    manifest = manifest | {"sha256": dict(manifest.get("sha256", {}))}
    with Staging() as staging:
        mesh, cloud, about = (staging.place(folder / name) for name in (MESH, GAUSSIANS, MANIFEST))
        _write_mesh(objects, mesh)
        with cloud.open("wb") as file:
            write_ply(file, splats, 0)
        manifest["vertices"] = sum(len(obj.data.vertices) for obj in objects)
        manifest["gaussians"] = len(splats.opacities)
        manifest["sha256"] |= {MESH: _hash(mesh), GAUSSIANS: _hash(cloud)}
        about.write_text(json.dumps(manifest, indent=1))
        staging.commit()
    return folder


def _write_mesh(objects: Sequence[Any], path: Path) -> None:
    """The meshes with the light as COLOR_0."""
    import bpy

    for obj in bpy.context.view_layer.objects:
        obj.select_set(obj in objects)
    try:
        bpy.ops.export_scene.gltf(
            filepath=str(path), export_format="GLB", use_selection=True, export_vertex_color="ACTIVE", export_animations=False,
            export_all_vertex_colors=False, export_active_vertex_color_when_no_material=True,
        )  # fmt: skip
    except RuntimeError as error:
        raise InputError(
            "export_failed", f"Blender can't write '{path.name}': {str(error).strip()}", "Try another model."
        ) from error


def _is_done(folder: Path, manifest: dict[str, Any]) -> bool:
    try:
        before = json.loads((folder / MANIFEST).read_text())
        hashes = before.pop("sha256")
        whole = all(_hash(folder / name) == hashes[name] for name in (MESH, GAUSSIANS))
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    wanted = {name: value for name, value in manifest.items() if name != "sha256"}
    same = all(before.get(name) == value for name, value in wanted.items())
    return whole and same and hashes.get("source") == manifest["sha256"]["source"]


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="track4d_addon.bake_lighting", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--front", default="-Y", choices=list(FRONTS))
    for name in LAMPS:
        parser.add_argument(f"--{name}", type=float, help=f"strength of the {name} light")
    options = parser.parse_args(arguments)
    strengths = {name: getattr(options, name) for name in LAMPS if getattr(options, name) is not None}
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # Blender prints to file descriptor 1

        def say(**message: Any) -> None:
            out.write(json.dumps(message) + "\n")
            out.flush()

        try:
            made = bake_folder(options.folder, options.out, options.samples, strengths, options.front,
                               report=lambda step, total, name: say(stage="bake", step=step, total=total, file=name))  # fmt: skip
            say(done=made)
        except Track4DError as error:
            say(error=error.to_dict())
            return 2
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # everything is written; the shutdown of Blender 4.2 crashes after an import that failed
