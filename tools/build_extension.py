"""Build the Blender extension: `python tools/build_extension.py` writes dist/track4d-<version>.zip.

The wheels named in blender_manifest.toml are downloaded once into build/wheels, so that later builds need no network;
the one of `track4d_protocol` is built from protocol/. The server's own wheel is built from the whole source and lies in a
folder of the zip that Blender leaves alone, for "Set Up Local Server"; the same file is put into dist/. The package is
staged in a temporary folder, then built and validated by Blender's own tool, which is plain Python inside the `bpy` wheel.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "build" / "wheels"
DIST = ROOT / "dist"
PROTOCOL = "track4d_protocol"
SERVER = "server_wheel"  # folder in the zip, as addon/local_setup.py knows it
SOURCE = ("pyproject.toml", "README.md", "LICENSE", "protocol", "server", "addon")  # what the server's wheel is built from


class Wheel(NamedTuple):
    """The parts of a wheel's file name (PEP 427)."""

    name: str
    version: str
    python: str
    abi: str
    platform: str

    @classmethod
    def parse(cls, filename: str) -> Wheel:
        return cls(*Path(filename).stem.split("-"))

    @property
    def filename(self) -> str:
        return "-".join(self) + ".whl"


def blender_tool() -> Path:
    """Path of Blender's `blender_ext.py`, found inside the installed bpy without importing it."""
    spec = find_spec("bpy")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The package bpy is missing. Install it with: pip install bpy")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*/scripts/addons_core/bl_pkg/cli/blender_ext.py"))
    if not found:
        raise SystemExit("This bpy carries no blender_ext.py; it needs to be 4.2 or later.")
    return found[-1]


def manifest_wheels(manifest: str) -> list[Wheel]:
    """The wheels that a manifest's text lists, in its order."""
    return [Wheel.parse(path) for path in tomllib.loads(manifest)["wheels"]]


def with_python(wheels: list[Wheel], python: str) -> list[Wheel]:
    """The wheels that another CPython ("3.14") needs beside those listed: of packages without a stable ABI."""
    tag = "cp" + python.replace(".", "")
    newest = {(w.name, w.platform): w for w in wheels if w.python == w.abi}
    stable = {w.name for w in wheels if w.abi == "abi3"}
    added = [w._replace(python=tag, abi=tag) for w in newest.values() if w.name not in stable]
    return [w for w in added if w not in wheels]


def download(wheel: Wheel) -> None:
    """Bring one wheel into build/wheels unless it is there."""
    if (WHEELS / wheel.filename).exists():
        return
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
    ]
    command += [
        "--implementation",
        "cp",
        "--python-version",
        re.sub(r"cp(\d)(\d+)", r"\1.\2", wheel.python),
        "--abi",
        wheel.abi,
    ]
    command += [option for tag in wheel.platform.split(".") for option in ("--platform", tag)]
    subprocess.run([*command, "--dest", str(WHEELS), f"{wheel.name}=={wheel.version}"], check=True)
    if not (WHEELS / wheel.filename).exists():
        raise SystemExit(
            f"The package index offers no {wheel.filename}; put it into {WHEELS} or change blender_manifest.toml."
        )


def build_protocol(wheel: Wheel, work: Path, wheels: Path) -> None:
    """Build the wheel of `track4d_protocol`."""
    copy_source("protocol", work / "protocol")
    build_wheel(work / "protocol", wheels)
    built = next(wheels.glob(f"{PROTOCOL}-*.whl")).name
    if built != wheel.filename:
        raise SystemExit(f"protocol/ gives {built}, blender_manifest.toml lists {wheel.filename}: make them agree.")


def build_server(version: str, work: Path, wheels: Path) -> Path:
    """Build the wheel of the whole distribution: server, protocol, and the client for files."""
    for name in SOURCE:
        copy_source(name, work / "source" / name)
    build_wheel(work / "source", wheels)
    built = next(wheels.glob("track4d-*.whl"))
    if Wheel.parse(built.name) != Wheel("track4d", version, "py3", "none", "any"):
        raise SystemExit(f"The source gives {built.name}, blender_manifest.toml has version {version}: make them agree.")
    return built


def copy_source(name: str, target: Path) -> None:
    """Copy a file or folder of the source, so that no build files land beside it."""
    target.parent.mkdir(exist_ok=True)
    if (ROOT / name).is_file():
        shutil.copy(ROOT / name, target)
    else:
        shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*"))


def build_wheel(source: Path, wheels: Path) -> None:
    """Build a wheel without looking at the network."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)], check=True)


def stage(manifest: str, wheels: list[Wheel], work: Path) -> Path:
    """The extension in a folder, laid out as it will be inside the zip."""
    folder = work / "track4d"
    shutil.copytree(ROOT / "addon", folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "wheels").mkdir()
    for wheel in wheels:
        if wheel.name == PROTOCOL:
            build_protocol(wheel, work, folder / "wheels")
        else:
            shutil.copy(WHEELS / wheel.filename, folder / "wheels")
    (folder / SERVER).mkdir()
    server = build_server(tomllib.loads(manifest)["version"], work, folder / SERVER)
    shutil.copy(server, DIST)
    listed = "".join(f'  "./wheels/{wheel.filename}",\n' for wheel in wheels)
    manifest = re.sub(r"(?ms)^wheels = \[.*?^\]", f"wheels = [\n{listed}]", manifest)
    (folder / "blender_manifest.toml").write_text(manifest, "utf-8")
    return folder


def build(manifest: str, wheels: list[Wheel], suffix: str = "") -> Path:
    """
    Args:
        manifest: text of blender_manifest.toml.
        wheels: what the zip carries, whatever the manifest lists.
        suffix: of the zip's name.

    Returns:
        Path of the zip, validated by Blender's tool.
    """
    DIST.mkdir(exist_ok=True)
    name = f"track4d-{tomllib.loads(manifest)['version']}{suffix}.zip"
    with tempfile.TemporaryDirectory(dir=WHEELS.parent) as folder:
        work = Path(folder)
        blender("build", "--source-dir", str(stage(manifest, wheels, work)), "--output-filepath", str(work / name))
        blender("validate", str(work / name))
        return (work / name).replace(DIST / name)


def blender(*command: str) -> None:
    """Run Blender's extension tool."""
    done = subprocess.run([sys.executable, str(blender_tool()), *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"Blender refused to {command[0]} the extension:\n{done.stdout}{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", default=[], metavar="3.14", help="carry wheels for this Python too")
    parser.add_argument("--wheels-only", action="store_true", help="download what a build needs, and build nothing")
    chosen = parser.parse_args()

    manifest = (ROOT / "blender_manifest.toml").read_text("utf-8")
    wheels = manifest_wheels(manifest)
    for python in chosen.python:
        wheels += with_python(wheels, python)
    WHEELS.mkdir(parents=True, exist_ok=True)
    for wheel in wheels:
        if wheel.name != PROTOCOL:
            download(wheel)
    if not chosen.wheels_only:
        archive = build(manifest, wheels, "".join(f"-py{python}" for python in chosen.python))
        print(f"{archive}  {archive.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
