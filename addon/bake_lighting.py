"""A folder of models as an evaluation set with baked light. `python -m track4d_addon.bake_lighting --help`.

Standard output carries one JSON object a line: {"stage", "step", "total"}, {"warning"}, {"done"} or {"error"}.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from track4d_protocol import __version__
from track4d_protocol.errors import InputError, Track4DError, TransportError
from track4d_protocol.space import FRONTS
from track4d_protocol.splat_files import write_ply

from .files import READABLE, Staging, leave

MANIFEST = "asset.json"
LOG, WORKING = "log.jsonl", ".working.json"
LAMPS = ("key", "fill", "back", "background")
MESH, GAUSSIANS = "mesh.glb", "gaussians.ply"


def bake_folder(
    folder: Path,
    out: Path,
    samples: int = 64,
    strengths: dict[str, float] | None = None,
    front: str = "-Y",
    about: dict[str, dict[str, str]] | None = None,
    retry: bool = False,
    report: Callable[[int, int, str], None] = lambda step, total, name: None,
) -> dict[str, int]:
    """Bakes every model of a folder into `out/NAME/`: the mesh, its Gaussians and a manifest.

    A model whose manifest says that it was baked from the same file with the same settings is left as it is, so a run that was
    stopped goes on. A model that can't be read or baked is skipped, by later runs too, until it or the settings change;
    `out/log.jsonl` has a line for every file of every run.

    Args:
        folder: with .glb, .gltf, .obj, .fbx, .blend and .ply files, or one such file.
        out: made when absent.
        samples: of Cycles, per vertex.
        strengths: of the rig's lamps, by name.
        front: the axis that models face whose entry in `about` has no "front".
        about: per file name, "prompt", "source", "licence", "credit", "front"; from assets.json in the folder by default.
        retry: tries those once more that failed before.
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
    log = Log(out)
    if retry:
        log.forgive()
    for number, path in enumerate(files):
        report(number, len(files), path.name)
        start = time.perf_counter()
        manifest = _plan(path, samples, strengths or {}, front, about.get(path.name, {}))
        line: dict[str, Any] = {"file": path.name, "key": _key(manifest)}
        before = log.failure(path.name, line["key"])
        if _is_done(out / path.stem, manifest):
            line["outcome"] = "kept"
        elif before:
            line |= {"outcome": "failed", "error": before, "skipped": True}
        else:
            with log.working(line):
                line |= _tried(path, out / path.stem, manifest)
        line["seconds"] = round(time.perf_counter() - start, 2)
        counts[line["outcome"]] += 1
        log.add(line)
    report(len(files), len(files), "")
    return counts


class Log:
    """The set's log, a JSON line per file and run; and the note of what is at work, which a crash leaves behind."""

    def __init__(self, out: Path) -> None:
        self.path, self.note = out / LOG, out / WORKING

    def lines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for text in self.path.read_text("utf-8").splitlines() if self.path.exists() else ():
            with suppress(ValueError):  # a line that a power cut tore
                found.append(json.loads(text))
        return found

    def add(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def failure(self, name: str, key: str) -> dict[str, Any] | None:
        """The error with which a file failed when it was last tried, if it was the same file with the same settings."""
        last: dict[str, Any] = next((line for line in reversed(self.lines()) if "retry" in line or line["file"] == name), {})
        return last.get("error") if last.get("key") == key else None

    def forgive(self) -> None:
        """Failures so far don't count any more."""
        if self.path.exists():
            self.add({"retry": True})

    @contextmanager
    def working(self, line: dict[str, Any]) -> Iterator[None]:
        self.note.write_text(json.dumps(line), "utf-8")
        yield
        self.note.unlink()

    def blame(self, code: int, words: str) -> bool:
        """Marks the file as failed that was at work when Blender ended; False where none was."""
        if not self.note.exists():
            return False
        line = json.loads(self.note.read_text("utf-8"))
        error = InputError("blender_ended", f"Blender ended with code {code} on '{line['file']}': {words or 'it said nothing'}.",
                           "Open the file in Blender to see what is wrong with it.")  # fmt: skip
        self.add(line | {"outcome": "failed", "error": error.to_dict()})
        self.note.unlink()
        return True


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


def _plan(path: Path, samples: int, strengths: dict[str, float], front: str, info: dict[str, str]) -> dict[str, Any]:
    """What a model's manifest says before it is baked."""
    from . import lighting

    return {
        "name": path.stem,
        "prompt": str(info.get("prompt", "")),
        "source": str(info.get("source", path.name)),
        "licence": str(info.get("licence", "")),
        "credit": str(info.get("credit", "")),
        "front": str(info.get("front", front)),
        "rig": lighting.rig_to_dict(lighting.rig_with(**strengths)),
        "samples": samples,
        "version": __version__,
        "sha256": {"source": file_hash(path) if os.access(path, os.R_OK) else ""},
    }


def _key(manifest: dict[str, Any]) -> str:
    """Stands for a file and everything that it shall be baked with."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _tried(path: Path, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Bakes one model; the outcome, and the error where it failed."""
    try:
        _bake_file(path, folder, manifest)
    except Track4DError as error:
        return {"outcome": "failed", "error": error.to_dict()}
    except Exception as error:  # noqa: BLE001 - what an odd file sets off in Blender's importers ends this file, not the batch
        place = "".join(traceback.format_exception(error)[-3:])
        problem = InputError("bake_failed", f"'{path.name}' can't be baked: {type(error).__name__}: {error}",
                             "Open the file in Blender to see what is wrong with it.")  # fmt: skip
        return {"outcome": "failed", "error": problem.to_dict(), "trace": place}
    return {"outcome": "baked"}


def _bake_file(path: Path, folder: Path, manifest: dict[str, Any]) -> None:
    from . import lighting, scene_io

    objects, _ = scene_io.load(path)
    lighting.remove_rig()  # of a .blend that was saved with one
    lighting.add_rig(objects, {name: lighting.Lamp(**lamp) for name, lamp in manifest["rig"].items()}, manifest["front"])
    lighting.bake(objects, manifest["samples"])
    baked = lighting.baked_with(objects)
    lighting.remove_rig()
    write_asset(objects, folder, manifest | baked)


def write_asset(objects: Sequence[Any], folder: Path, manifest: dict[str, Any]) -> Path:
    """Writes baked meshes as one asset of an evaluation set: mesh, Gaussians and manifest; returns the folder.

    Args:
        objects: with the light in their vertex colours, see `lighting.bake`.
        folder: of the asset, made when absent.
        manifest: name, prompt, source, licence, credit, front, lights, samples, version; counts and hashes are added.

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
        manifest["sha256"] |= {MESH: file_hash(mesh), GAUSSIANS: file_hash(cloud)}
        about.write_text(json.dumps(manifest, indent=1))
        staging.commit()
    return folder


def _write_mesh(objects: Sequence[Any], path: Path) -> None:
    """The meshes with the light as COLOR_0, in float, and a material that shows it as it is."""
    import bpy

    for obj in bpy.context.view_layer.objects:
        obj.select_set(obj in objects)
    try:
        with _shining(objects):
            bpy.ops.export_scene.gltf(
                filepath=str(path), export_format="GLB", use_selection=True, export_vertex_color="MATERIAL",
                export_animations=False, export_all_vertex_colors=False,
            )  # fmt: skip
    except RuntimeError as error:
        raise InputError(
            "export_failed", f"Blender can't write '{path.name}': {str(error).strip()}", "Try another model."
        ) from error


@contextmanager
def _shining(objects: Sequence[Any]) -> Iterator[None]:
    """For as long as the block runs the objects have one material, of their baked light alone.

    Other materials would be multiplied with the light, which has their colours in it already. A colour that leads straight to the
    surface is what the exporter takes for KHR_materials_unlit; that a material uses it makes it write floats in place of 16 bits.
    """
    import bpy

    from .lighting import COLORS

    material = bpy.data.materials.new(COLORS)
    if bpy.app.version < (5, 0, 0):
        material.use_nodes = True
    tree = material.node_tree
    tree.nodes.clear()
    color, output = tree.nodes.new("ShaderNodeVertexColor"), tree.nodes.new("ShaderNodeOutputMaterial")
    color.layer_name = COLORS
    tree.links.new(color.outputs["Color"], output.inputs["Surface"])
    before = [(slot, slot.material) for obj in objects for slot in obj.material_slots]
    bare = [obj for obj in objects if not obj.material_slots]
    try:
        for slot, _ in before:
            slot.material = material
        for obj in bare:
            obj.data.materials.append(material)
        yield
    finally:
        for slot, old in before:
            slot.material = old
        for obj in bare:
            obj.data.materials.clear()  # `pop` would leave the object a slot
        bpy.data.materials.remove(material)


def _is_done(folder: Path, manifest: dict[str, Any]) -> bool:
    try:
        before = json.loads((folder / MANIFEST).read_text())
        hashes = before.pop("sha256")
        whole = all(file_hash(folder / name) == hashes[name] for name in (MESH, GAUSSIANS))
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    wanted = {name: value for name, value in manifest.items() if name != "sha256"}
    same = all(before.get(name) == value for name, value in wanted.items())
    return whole and same and hashes.get("source") == manifest["sha256"]["source"]


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as the manifest has it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code. Blender is a process of its own, begun again where a file takes it down."""
    parser = argparse.ArgumentParser(prog="track4d_addon.bake_lighting", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--front", default="-Y", choices=list(FRONTS))
    for name in LAMPS:
        parser.add_argument(f"--{name}", type=float, help=f"strength of the {name} light")
    parser.add_argument("--retry", action="store_true", help="try those once more that failed before")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return _work(options)
    given = [word for word in (sys.argv[1:] if arguments is None else arguments) if word != "--retry"]
    log = Log(options.out)
    if options.retry:
        log.forgive()
    return _supervise(["-m", f"{__package__}.bake_lighting", *given, "--worker"], log)


def _supervise(command: Sequence[str], log: Log) -> int:
    """Lets a worker bake, and another one go on where a file has ended it; passes on what they say. The exit code."""
    begun = len(log.lines())
    while True:
        log.note.unlink(missing_ok=True)
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
            line = [sys.executable, *command]
            worker = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=words, text=True, encoding="utf-8")
            try:
                for said in worker.stdout or ():
                    if not said.startswith("{"):  # Blender itself prints, too
                        continue
                    message = json.loads(said)
                    if "done" in message:  # what an earlier worker has baked this one has kept
                        made = message["done"]
                        earlier = sum(entry.get("outcome") == "baked" for entry in log.lines()[begun:]) - made["baked"]
                        made |= {"baked": made["baked"] + earlier, "kept": made["kept"] - earlier}
                    print(json.dumps(message), flush=True)  # noqa: T201 - for who started this
                code = worker.wait()
            except BaseException:
                worker.kill()
                raise
            words.seek(0)
            end = " / ".join(words.read().strip().splitlines()[-3:])
        if code in (0, 2):
            return code
        if not log.blame(code, end):
            error = TransportError("client_failed", f"Blender ended with code {code}: {end}", "Run track4d doctor.")
            print(json.dumps({"error": error.to_dict()}), flush=True)  # noqa: T201
            return 2


def _work(options: argparse.Namespace) -> int:
    """Bakes the folder in this process."""
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
    leave(main())
