"""Animated models as shards of multi-view clips: read in a process with Blender, drawn by the z-buffer, resumable."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from track4d_protocol import space
from track4d_protocol.errors import InputError

from ..geometry.mesh import Mesh
from ..progress import Report, silent
from ..video.text import VERBS
from .objects import light
from .shards import encode, write_shard
from .video_data import Clip, ClipShape, draw_cameras, draw_clip, orbit_cameras, reach

ANIMATED = (".glb", ".gltf", ".fbx", ".blend")
SHARD_BYTES = 256 << 20
FILES_PER_CLIENT = 64  # Blender keeps some memory of every file it has read
LOG = "dataset.jsonl"
SETTINGS = "dataset.json"
DRIFT = 0.3  # canonical units along the ground, beyond which a clip is made to stay on the spot


@dataclass(frozen=True)
class RenderSettings:
    """What a data set is rendered with; a folder that was begun with others is refused.

    Attributes:
        renders: of every clip, each with cameras, light and, for loops, a start of its own.
        cameras: "random" or "orbit", as in a capture.
        front: the axis that models face whose captions don't say it.
        surface: also write which place on the object each pixel shows; two thirds of the data set are that then.
    """

    views: int = 4
    frames: int = 16
    size: int = 128
    renders: int = 4
    cameras: str = "random"
    front: str = "-Y"
    seed: int = 0
    surface: bool = False


def render_folder(
    folder: Path, out: Path, settings: RenderSettings = RenderSettings(), report: Report = silent
) -> dict[str, int]:
    """Renders all clips of all models in a folder, those of its subfolders too, as shards.

    Captions come from captions.json beside a model: {file: {"noun", "front", "licence", "credit", "clips": {name: {"prompt",
    "verb", "loops"}}}}, where all is optional; else from the names of file and clip. Licence, author, source and front axis are
    also read from a CREDITS.md beside it (tables whose first column names the file, and "- author: ..." below "## file").

    What was rendered is kept: files whose clips are in a finished shard are not read again unless they have changed. A file
    that can't be read is reported and skipped. `out/dataset.jsonl` has a line for every file.

    Args:
        report: stage "render", a step per file.

    Returns:
        numbers of "files", "clips", "samples" now in the data set, and of "failed" files.

    Raises:
        InputError: missing_folder, no_models, dataset_differs.
        Cancelled: from `report`; what is complete stays.
    """
    if not folder.is_dir():
        raise InputError("missing_folder", f"The folder '{folder}' isn't there.", "Check its name.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ANIMATED and path.is_file())
    if not files:
        raise InputError("no_models", f"'{folder}' has no animated models.", f"Put files there: {', '.join(ANIMATED)}.")
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, settings)
    log = _Log(out)
    about = {path: _read_captions(path) for path in files}
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    wanted = [path for path in files if not log.has(path.relative_to(folder).as_posix(), digests[path])]
    pending: list[tuple[str, dict[str, bytes]]] = []
    lines: list[dict[str, Any]] = []

    def flush() -> None:
        if pending:
            name = f"shard-{log.shards():05d}.tar"
            write_shard(out / name, pending)
            for line in lines:
                log.add(line | {"shard": name})
            pending.clear()
            lines.clear()

    try:
        for done, (path, found) in enumerate(read_models(wanted, about, settings.frames)):
            report("render", len(files) - len(wanted) + done, len(files))
            name = path.relative_to(folder).as_posix()
            if "error" in found:
                log.add({"file": name, "error": found["error"]})
                continue
            info = {"file": name, "sha256": digests[path]} | about[path]
            try:
                made = [(key, encode(clip)) for key, clip in _renders(found, info, settings)]
            except InputError as error:
                log.add({"file": name, "error": error.to_dict()})
                continue
            pending += made
            lines.append({"file": name, "sha256": digests[path], "clips": len(found["clips"]),
                          "samples": len(found["clips"]) * settings.renders, "warnings": found["warnings"]})
            if sum(len(data) for _, encoded in pending for data in encoded.values()) >= SHARD_BYTES:
                flush()
    finally:
        flush()
    report("render", len(files), len(files))
    return log.totals()


def _check_settings(out: Path, settings: RenderSettings) -> None:
    path = out / SETTINGS
    if path.exists() and (before := json.loads(path.read_text())) != asdict(settings):
        changed = [f"{name} {before.get(name)} instead of {value}" for name, value in asdict(settings).items()
                   if before.get(name) != value]
        raise InputError("dataset_differs", f"The data set in '{out}' was rendered with {', '.join(changed)}.",
                         "Use the same settings, or another folder.")
    path.write_text(json.dumps(asdict(settings), indent=1))


class _Log:
    """The data set's one log: a JSON line per file; the last line about a file counts."""

    def __init__(self, out: Path) -> None:
        self.path, self.out = out / LOG, out
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.lines = {line["file"]: line for line in map(json.loads, lines)}

    def add(self, line: dict[str, Any]) -> None:
        self.lines[line["file"]] = line
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def has(self, name: str, digest: str) -> bool:
        line = self.lines.get(name, {})
        return line.get("sha256") == digest and (self.out / line["shard"]).exists()

    def shards(self) -> int:
        """The number of the next shard."""
        return 1 + max((int(path.stem.rsplit("-", 1)[1]) for path in self.out.glob("shard-*.tar")), default=-1)

    def totals(self) -> dict[str, int]:
        good = [line for line in self.lines.values() if "error" not in line]
        return {"files": len(good), "clips": sum(line["clips"] for line in good),
                "samples": sum(line["samples"] for line in good), "failed": len(self.lines) - len(good)}


# Reading, in a process with Blender


def read_models(files: list[Path], about: dict[Path, dict], frames: int) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The clips of files: each with what `track4d_addon.trajectories` says about it, and its arrays under "arrays".

    The process is started again where a file has taken it down; that file is an "error" then.
    """
    rest = list(files)
    with tempfile.TemporaryDirectory() as folder:
        known = Path(folder) / "loops.json"
        known.write_text(json.dumps({str(path): {name: clip["loops"] for name, clip in entry["clips"].items() if "loops" in clip}
                                     for path, entry in about.items()}))
        while rest:
            command = [sys.executable, "-m", "track4d_addon.trajectories", *map(str, rest[:FILES_PER_CLIENT]), "--out", folder,
                       "--frames", str(frames), "--loops", str(known)]
            client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            before = len(rest)
            try:
                for line in client.stdout or ():
                    found = json.loads(line)
                    path = rest.pop(0)
                    if "error" not in found:
                        arrays = Path(found["arrays"])
                        with np.load(arrays) as data:
                            found["arrays"] = dict(data)
                        arrays.unlink()
                    yield path, found
            finally:
                client.kill()
                code = client.wait()
            if rest and before - len(rest) < FILES_PER_CLIENT:
                error = InputError("unreadable_file", f"'{rest[0].name}' can't be read: Blender ended with code {code}.",
                                   "Open it in Blender to see what is wrong with it.")
                yield rest.pop(0), {"error": error.to_dict()}


# Captions and credits


def _read_captions(path: Path) -> dict[str, Any]:
    """What is known of a model besides its file: noun, front, licence, credit, clips."""
    captions, credits = path.parent / "captions.json", path.parent / "CREDITS.md"
    found = read_credits(credits.read_text(), path.name) if credits.exists() else {}
    if captions.exists():
        found |= json.loads(captions.read_text()).get(path.name, {})
    known = {key: found[key] for key in ("noun", "front", "licence", "evidence", "credit", "author", "source") if key in found}
    if known.get("front") not in space.FRONTS:  # such as "none" for a column
        known.pop("front", None)
    return {"noun": _words(path.stem)} | known | {"clips": found.get("clips", {})}


def read_credits(text: str, name: str) -> dict[str, str]:
    """What a page of credits says about a file: cells of table rows that begin with its name, items below a heading with it."""
    found: dict[str, str] = {}
    header: list[str] = []
    inside = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            header = []
        elif not header:
            header = [cell.lower() for cell in cells]
        elif cells[0].strip("`* ") == name:
            found |= dict(zip(header[1:], cells[1:]))
        if line.startswith("#"):
            inside = line.strip("#` ") == name
        item = re.match(r"- (\w+): (.+)", line)
        if inside and item:
            found.setdefault(item[1], item[2])
    return found


def _words(name: str) -> str:
    """"Running_Jump2" and "RunningJump" as "running jump"."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[^a-zA-Z]+", " ", parted).lower().split())


def caption_from_names(noun: str, clip: str) -> str:
    """A sentence for a clip without caption: a verb known from the name's first word, else the name as it stands."""
    words = _words(clip)
    for verb in VERBS:
        if words and words.split()[0] in {phrase.removeprefix("is ").split()[0] for phrase in verb.phrases}:
            return f"the {noun} {verb.phrases[1] if len(verb.phrases) > 1 else verb.phrases[0]}"
    return f"the {noun}: {words}" if words else f"the {noun}"


# Drawing


def _renders(found: dict[str, Any], info: dict[str, Any], settings: RenderSettings) -> Iterator[tuple[str, Clip]]:
    """All samples of a model, each with its key."""
    arrays, model = found["arrays"], _slug(info["file"])
    textures = [arrays[f"texture_{k}"] / np.float32(255) for k in range(sum(name.startswith("texture_") for name in arrays))]
    captions = info["clips"]
    shape = ClipShape(settings.views, settings.frames, settings.size, settings.surface)
    bones = ",".join(found["bones"])
    common = {key: value for key, value in info.items() if key != "clips"}
    common |= {"model": info["file"], "rig": f"{zlib.crc32(bones.encode()):08x}" if len(found["bones"]) > 1 else model}
    for index, clip in enumerate(found["clips"]):
        known = captions.get(clip["name"], {})
        caption = known.get("prompt") or caption_from_names(info["noun"], clip["name"])
        trajectory = canonical(arrays[f"vertices_{index}"], info.get("front", settings.front))
        trajectory = on_the_spot(trajectory) if clip["loops"] else trajectory
        for render in range(settings.renders):
            key = f"{model}-{_slug(clip['name'])}-{render:02d}"
            rng = np.random.default_rng([settings.seed, zlib.crc32(key.encode())])
            vertices = trajectory
            if clip["loops"] and render:
                vertices = canonical(np.roll(trajectory, -int(rng.integers(settings.frames)), 0))
            mesh = Mesh(vertices[0], arrays["faces"], arrays["uvs"], arrays["materials"], textures)
            radius = reach(vertices)
            cameras = orbit_cameras(shape, radius) if settings.cameras == "orbit" else draw_cameras(rng, shape, radius)
            made = common | {"clip": clip["name"], "verb": known.get("verb", ""), "loops": clip["loops"]}
            yield key, draw_clip(mesh, vertices, *cameras, shape, caption, made, light(vertices[0], mesh.faces, rng))


def _slug(name: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]+", "_", name).strip("_")


def canonical(vertices: np.ndarray, front: str = "+X") -> np.ndarray:
    """A trajectory [F, N, 3] in the canonical space of its first frame."""
    return space.canonical_similarity(vertices[0], front).apply(vertices)


def on_the_spot(vertices: np.ndarray) -> np.ndarray:
    """A canonical loop [F, N, 3] that, if it leaves its place, loses its mean speed along the ground."""
    way = (vertices[-1] - vertices[0]).mean(0) * np.array([1, 1, 0], np.float32)
    if np.linalg.norm(way) <= DRIFT:
        return vertices
    return vertices - np.linspace(0, 1, len(vertices), dtype=np.float32)[:, None, None] * way
