"""The command line as a user types it, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from track4d_protocol.client import Client
from track4d_protocol.keys import read_connection
from track4d_protocol.local import ensure_server, stop_server
from track4d_protocol.messages import JobState


def track4d(*words: str, home: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "track4d", *words], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TRACK4D_HOME": str(home), "COLUMNS": "200"})


def test_a_missing_file_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out.glb"
    ended = track4d("animate", str(tmp_path / "none.glb"), "--prompt", "it runs", "-o", str(out), home=tmp_path / "home")
    assert ended.returncode == 2
    assert "none.glb" in ended.stderr and "[missing_file]" in ended.stderr and "Check its name" in ended.stderr
    assert "Traceback" not in ended.stderr and not out.exists()


def test_an_empty_prompt_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "a.obj").write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    ended = track4d("animate", str(tmp_path / "a.obj"), "--prompt", " ", "-o", str(tmp_path / "b.glb"), home=tmp_path / "home")
    assert ended.returncode == 2 and "[empty_prompt]" in ended.stderr


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.stl").write_text("solid")
    out = tmp_path / "b.glb"
    ended = track4d("animate", str(tmp_path / "a.stl"), "--prompt", "it runs", "-o", str(out), home=tmp_path / "home")
    assert ended.returncode == 2 and "[unsupported_format]" in ended.stderr and ".glb" in ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="Windows has no signal for one process alone")
def test_control_c_takes_the_job_back(tmp_path: Path) -> None:
    home, out = tmp_path / "home", tmp_path / "out.glb"
    model = Path(__file__).resolve().parents[2] / "examples" / "sunflower.glb"
    command = [sys.executable, "-m", "track4d", "animate", str(model), "--prompt=it sways", f"--out={out}", f"--home={home}"]
    # A shell's background jobs ignore Ctrl-C, and so would their children: here it is as in a terminal.
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        deadline = time.monotonic() + 90
        while not list(home.glob("jobs/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=60)[1]
        assert running.returncode == 2 and "[cancelled]" in said and "Traceback" not in said
        assert not out.exists()
        with Client(ensure_server(home)) as client:  # the worker may take a moment to stop
            while any(not job.state.final for job in client.jobs()) and time.monotonic() < deadline:
                time.sleep(0.1)
            assert [job.state for job in client.jobs()] in ([], [JobState.CANCELLED])
    finally:
        running.kill()
        stop_server(home)


def test_the_published_model_without_its_weights_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way: Blender's pictures, the socket, the worker, and its refusal back in the terminal."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    model = Path(__file__).resolve().parents[2] / "examples" / "sunflower.glb"
    home, out = tmp_path / "home", tmp_path / "out.glb"
    try:
        ended = track4d("animate", str(model), "--prompt", "it sways", "--model", "published", "-o", str(out), home=home)
    finally:
        stop_server(home)
    assert ended.returncode == 2 and "[checkpoint_missing]" in ended.stderr and "Traceback" not in ended.stderr
    assert "hf download yanqinJiang/animate3d" in ended.stderr and not out.exists()


def test_doctor_names_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    ended = track4d("doctor", "--no-self-test", home=tmp_path / "home")
    assert ended.returncode == 0, ended.stdout
    assert "--model published" in ended.stdout
    converted = tmp_path / "home" / "models" / "published"
    converted.mkdir(parents=True)
    for name in ("model.json", "unet.safetensors"):
        (converted / name).touch()
    assert str(converted) in track4d("doctor", "--no-self-test", home=tmp_path / "home").stdout.replace("\n", "")
    for subject in ("Python", "device", "rasteriser", "CURVE", "bpy", "motion.safetensors", str(tmp_path / "home")):
        assert subject in ended.stdout


def test_grant_writes_a_private_connection_file(tmp_path: Path) -> None:
    file = tmp_path / "laptop.json"
    ended = track4d("grant", "laptop", "-o", str(file), "--address", "tcp://10.0.0.5:7457", home=tmp_path / "home")
    assert ended.returncode == 0, ended.stderr
    assert read_connection(file).address == "tcp://10.0.0.5:7457"
    if os.name == "posix":
        assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("command", ["animate", "fit", "serve", "doctor", "grant", "train"])
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    ended = track4d(command, "--help", home=tmp_path)
    assert ended.returncode == 0 and "Usage" in ended.stdout
