"""What works on this machine, what doesn't, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

GIGABYTE = 1e9


class Finding(NamedTuple):
    """One line of the examination; `level` is "ok", "note" (works, but could be better) or "broken"."""

    level: str
    subject: str
    text: str
    action: str = ""


def examine(self_test: bool, console: Console) -> bool:
    """Prints the findings; True when nothing is broken."""
    checks: list[Callable[[], Finding]] = [python, torch_device, kernels, rasteriser, transport, blender, weights, published,
                                           memory, disk]
    table = Table(show_header=False, box=None, pad_edge=False)
    healthy = True
    for check in checks + ([tiny_job] if self_test else []):
        finding = check()
        healthy &= finding.level != "broken"
        mark = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "broken": "[red]broken[/]"}[finding.level]
        table.add_row(mark, finding.subject, finding.text + (f" {finding.action}" if finding.action else ""))
    console.print(table)
    return healthy


def python() -> Finding:
    return Finding("ok", "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def torch_device() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        memory = f"{free / GIGABYTE:.1f} of {total / GIGABYTE:.1f} GB free"
        return Finding("ok", "device", f"{torch.cuda.get_device_name()}, {memory}, "
                       f"for training and benchmarks; jobs run on the CPU's {os.cpu_count()} cores")
    return Finding("ok", "device", f"CPU with {os.cpu_count()} cores (torch {torch.__version__}); no NVIDIA GPU is needed")


def kernels() -> Finding:
    import numba

    return Finding("ok", "kernels", f"Numba {numba.__version__}, {numba.config.NUMBA_NUM_THREADS} threads")  # type: ignore[attr-defined]


def rasteriser() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("ok", "rasteriser", "Numba on the CPU")
    if find_spec("gsplat") is None:
        return Finding("note", "rasteriser", "Numba on the CPU, though there is a GPU.",
                       f'{sys.executable} -m pip install "gsplat>=1.5.3"')
    return Finding("ok", "rasteriser", f"Numba on the CPU, gsplat {importlib.metadata.version('gsplat')} for tensors on the GPU")


def transport() -> Finding:
    import zmq

    if not zmq.has("curve"):
        return Finding("broken", "transport", f"pyzmq {zmq.pyzmq_version()} was built without CURVE.",
                       f"{sys.executable} -m pip install --force-reinstall pyzmq")
    return Finding("ok", "transport", f"ZeroMQ {zmq.zmq_version()} with CURVE")


def blender() -> Finding:
    if find_spec("bpy") is None:
        wanted = "bpy==5.0.1" if sys.version_info[:2] == (3, 11) else "bpy"
        return Finding("note", "Blender", "bpy is not installed: the server works, `track4d animate FILE` does not.",
                       f"{sys.executable} -m pip install {wanted}")
    return Finding("ok", "Blender", f"bpy {importlib.metadata.version('bpy')}")


def weights() -> Finding:
    from .video.generator import NATURAL_WEIGHTS, WEIGHTS

    files = (WEIGHTS, NATURAL_WEIGHTS)
    if missing := [file.name for file in files if not file.exists()]:
        return Finding("broken", "model", f"Shipped weights are missing: {', '.join(missing)}.", "Install the package again.")
    return Finding("ok", "model", ", ".join(f"{file.name}, {file.stat().st_size / 1e6:.1f} MB" for file in files))


def published() -> Finding:
    from track4d_protocol.errors import InputError
    from track4d_protocol.keys import default_home

    from .video.checkpoints import ANIMATE3D, find_published, is_converted

    place = default_home() / "models" / "published"
    try:
        where = place if is_converted(place) else find_published()[ANIMATE3D]
    except InputError:
        return Finding("ok", "published", "Animate3D's weights are not here; only --model published needs them "
                       "(docs/multiview_video.md).")
    return Finding("ok", "published", f"Animate3D's weights are in {where}")


def memory() -> Finding:
    free = psutil.virtual_memory().available / GIGABYTE
    if free < 3:
        return Finding("note", "memory", f"{free:.1f} GB free; a job takes up to 3 GB.",
                       "Close other programs, or use --preset fast.")
    return Finding("ok", "memory", f"{free:.1f} GB free")


def disk() -> Finding:
    from track4d_protocol.keys import default_home

    home = default_home()
    place = next(p for p in [home, *home.parents] if p.exists())
    free = shutil.disk_usage(place).free / GIGABYTE
    if not os.access(place, os.W_OK):
        return Finding("broken", "jobs", f"{home} can't be written.", "Set TRACK4D_HOME to a folder of your own.")
    if free < 1:
        return Finding("note", "jobs", f"{home}: {free:.1f} GB free.", "Results take about 50 MB each.")
    return Finding("ok", "jobs", f"{home}, {free:.0f} GB free")


def tiny_job() -> Finding:
    """The whole pipeline on a small ball: proves that it works here, and compiles every kernel into the cache."""
    import numpy as np
    import trimesh
    from track4d_protocol.errors import Track4DError
    from track4d_protocol.messages import Request, Settings
    from track4d_protocol.space import canonical_similarity, intrinsics, orbit_viewmats

    from .geometry.mesh import Mesh
    from .geometry.zbuffer import render, straight
    from .pipeline import run
    from .progress import silent

    start = time.perf_counter()
    ball = trimesh.creation.capsule(height=1.0, radius=0.5, count=[12, 12])
    similarity = canonical_similarity(ball.vertices)
    mesh = Mesh(similarity.apply(ball.vertices), ball.faces)
    viewmats, Ks = orbit_viewmats(), intrinsics(128, 4)
    shading = 0.6 + 0.4 * np.sin(6 * mesh.vertices)
    stills = render(mesh, mesh.vertices[None], viewmats, Ks, 128, shading=shading)[0]
    request = Request(Settings(prompt="it sways", frames=4, preset="fast"), ["ball"], {
        "vertices": ball.vertices.astype(np.float32), "faces": ball.faces.astype(np.int32),
        "views": (straight(stills) * 255).astype(np.uint8), "viewmats": similarity.viewmats_to_world(viewmats), "Ks": Ks})
    try:
        result = run(request, silent)
    except Track4DError as error:
        return Finding("broken", "self-test", error.message, error.action)
    if not np.isfinite(result.arrays["vertices"]).all():
        return Finding("broken", "self-test", "The result has coordinates that are not finite.",
                       "Please report this with the lines above.")
    return Finding("ok", "self-test", f"a ball was animated in {time.perf_counter() - start:.1f} s")
