"""Errors that few ever see: each has its code, says what happened and what to do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from track4d_protocol import local
from track4d_protocol.errors import InputError, ServerError, Track4DError, TransportError
from track4d_protocol.filelock import FileLock
from track4d_protocol.space import intrinsics, orbit_viewmats


def refusal(code: str, of: type[Track4DError], call, *arguments, **options) -> Track4DError:
    with pytest.raises(of) as caught:
        call(*arguments, **options)
    assert caught.value.code == code and caught.value.message and caught.value.action
    return caught.value


def test_a_client_name_that_is_no_file_name(tmp_path: Path) -> None:
    from track4d.service import grant

    for name in ("", "../me", "a b", "n\u00e4me", "x" * 65):
        refusal("bad_client_name", InputError, grant, tmp_path, name, "tcp://10.0.0.5:7457")
    assert not list(tmp_path.iterdir())  # no key was made


def test_triangles_of_vertices_that_are_not_there() -> None:
    from track4d.geometry.mesh import check_mesh

    for faces in ([[0, 1, 3]], [[0, 1, -1]]):
        assert "3" in refusal("bad_indices", InputError, check_mesh, np.eye(3), np.array(faces)).message


def test_times_outside_of_the_motion() -> None:
    from track4d.motion.field import MotionField

    field = MotionField(np.zeros((4, 3, 3), np.float32), np.zeros((4, 3), np.float32))
    for time in (1.5, -1.01, np.nan):
        refusal("bad_times", InputError, field.sample, np.array([0.0, time]))


def test_geometry_of_another_video() -> None:
    from track4d.tracking import MovingMesh, track

    vertices = np.repeat(np.eye(3, dtype=np.float32)[None], 5, 0)
    geometry = MovingMesh(vertices, np.array([[0, 1, 2]]), orbit_viewmats(), intrinsics(16, 4))
    video = np.zeros((4, 6, 16, 16, 3), np.uint8)
    refusal("bad_geometry", InputError, track, video, np.full((4, 1, 3), 1.0), geometry)


def test_weights_converted_by_another_version(tmp_path: Path) -> None:
    from track4d.video.checkpoints import FORMAT, load_published

    (tmp_path / "unet.safetensors").touch()
    (tmp_path / "model.json").write_text(json.dumps({"format": FORMAT + 1}))
    refusal("checkpoint_format", InputError, load_published, tmp_path)


def test_training_of_the_published_size_without_clips(tmp_path: Path) -> None:
    from track4d.commands.train_video import train_video

    refusal("no_training_clips", InputError, train_video, tmp_path / "runs", published=tmp_path, data=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_tensors_without_a_gpu() -> None:
    from track4d.gaussians.rasterise import gsplat_backend

    refusal("no_cuda", ServerError, gsplat_backend.rasterise_gsplat, *[torch.zeros(1)] * 7, 8, torch.zeros(3))


def test_a_gpu_without_gsplat(monkeypatch) -> None:
    from track4d.gaussians.rasterise import gsplat_backend

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "gsplat", None)  # as if it were not installed
    refusal("gsplat_missing", ServerError, gsplat_backend.rasterise_gsplat, *[torch.zeros(1)] * 7, 8, torch.zeros(3))


def test_no_blender_module(monkeypatch) -> None:
    from track4d import cli

    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    refusal("no_bpy", TransportError, cli.require_bpy)


def test_a_blender_that_crashes(tmp_path: Path) -> None:
    """A Blender module that ends the process at once, as a crash does; the command says so and writes nothing."""
    (tmp_path / "bpy").mkdir()
    crash = "import os, sys\nsys.stderr.write('Segfault at noon')\nsys.stderr.flush()\nos._exit(11)\n"
    (tmp_path / "bpy" / "__init__.py").write_text(crash)
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    out = tmp_path / "b.glb"
    command = [sys.executable, "-m", "track4d", "animate", str(tmp_path / "a.obj"), "--prompt=it runs", f"--out={out}"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRACK4D_HOME": str(tmp_path / "home"), "COLUMNS": "300"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert ended.returncode == 2 and "[client_failed]" in ended.stderr and "Segfault at noon" in ended.stderr
    assert not out.exists()


def test_a_server_that_does_not_end(tmp_path: Path, monkeypatch) -> None:
    """Somebody holds the server's lock, answers no request and survives every signal."""
    lock = FileLock(tmp_path / local.SERVER_LOCK)
    assert lock.acquire()
    signals = []
    monkeypatch.setattr(local, "_end", lambda process, signal: signals.append(signal))
    try:
        refusal("server_not_stopped", TransportError, local.stop_server, tmp_path, timeout=0.3)
    finally:
        lock.release()
    assert len(set(signals)) == 2  # asked first, then killed
