"""Jobs in the tab: what it says is true, a cancel leaves nothing, closing Blender loses nothing, and the first run."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import tomllib

SCRIPT = "session_jobs.py"
MANIFEST = tomllib.loads((Path(__file__).resolve().parents[2] / "blender_manifest.toml").read_text("utf-8"))


def test_cancel_leaves_every_data_block_as_it_was_at_every_moment(blender, server, tmp_path):
    answer = blender("cancel_at_many_moments", script=SCRIPT, connection=server.connection, blend=tmp_path / "while.blend")
    for moment in ("click", "view", "sent", "running", "moving", "applying"):
        reached, idle, seconds, changed = answer[moment]
        assert reached and idle and seconds < 1 and changed == [], (moment, answer[moment])
    assert answer["film"] == [6, 64, 64, 4] and answer["moves"] > 0.05, "film and motion were shown before the cancel"
    assert answer["file"], "a file that is saved meanwhile holds no temporary key"
    assert answer["pictures"] == 0


def test_the_shown_motion_never_stays(blender, server, tmp_path):
    answer = blender("motion_among_the_users_own", script=SCRIPT, connection=server.connection, blend=tmp_path / "auto.blend")
    assert answer["shown"] and answer["moves"] and answer["edited"]
    assert answer["automatic"], "the file that is opened again was saved with the key"
    assert answer["duplicate"] == ["Basis", "smile"] and answer["same"] == [] and answer["opened"] == ["Basis", "smile"]


def test_several_jobs_outlive_blender(blender, server, tmp_path):
    blend = tmp_path / "monkeys.blend"
    left = blender("leave_several", script=SCRIPT, connection=server.connection, blend=blend)
    assert left["listed"] == [["Suzanne"], ["Suzanne.001"], ["Suzanne.002"]] and left["sent"]
    assert left["lines"][:2] == ["Server on tiny device", "tiny model (CC0 1.0)"]
    (server.home / "one").touch()
    end = time.monotonic() + 100
    while [server.job(job).state.value for job in left["jobs"][:2]] != ["done", "done"]:
        assert time.monotonic() < end, [server.job(job) for job in left["jobs"]]
        time.sleep(0.1)
    answer = blender(
        "come_back_to_several", script=SCRIPT, connection=server.connection, blend=blend, gate=server.home / "two"
    )
    assert answer["away"] == ["Suzanne", "Suzanne.001"], "two finished while you were away"
    assert answer["again"] == [["Suzanne.002"]], "one runs and is shown again"
    assert answer["orders"] == [True] * 3 and answer["elsewhere"]
    assert answer["keys"] == [17, 17, 17] and answer["kept"] == [] and not answer["problem"]


def test_a_request_that_no_server_has_taken_outlives_blender(blender, server, tmp_path):
    server.kill()
    left = blender("leave_unsent", script=SCRIPT, connection=server.connection, blend=tmp_path / "monkey.blend")
    assert left["sending"]
    server.start()
    answer = blender("come_back", connection=server.connection, blend=tmp_path / "monkey.blend")
    assert answer["offered"] == [left["job"]] and answer["keys"] == 17


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process can't be stopped in the middle on Windows")
def test_the_first_line_is_true(blender, server, tmp_path):
    word = tmp_path / "word"
    line, environment = blender.command(
        "truth", script=SCRIPT, connection=server.connection, pid=server.process.pid, wait_file=word
    )
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not word.exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    server.process.wait()
    server.start()
    word.write_text("back")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    answer = json.loads(output.strip().splitlines()[-1])
    assert answer["lines"] == ["Server on tiny device", "tiny model (CC0 1.0)"]
    # 2 s and 5 s on a machine that is free; this one may not be
    assert answer["frozen"] < 6 and answer["killed"] < 6 and answer["thawed"] < 10 and answer["back"] < 10, answer


def test_coarse_motion_reaches_every_vertex():
    from track4d_addon.client_thread import spread

    rng = np.random.default_rng(0)
    vertices = rng.uniform(-1, 1, (5000, 3)).astype(np.float32)
    points = np.sort(rng.choice(5000, 800, replace=False)).astype(np.int32)
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    moved = np.stack([vertices, vertices @ turn.T + 0.3])  # [2, N, 3]
    moves = spread(moved[:, points], points, vertices)
    assert np.abs(moves[0]).max() < 1e-6
    errors = np.linalg.norm(vertices + moves[1] - moved[1], axis=-1)
    assert np.median(errors) < 0.1 and errors[points].max() < 1e-2
    assert spread(moved[:, points], points + 5000, vertices) is None
    assert spread(moved[:, points[:3]], points, vertices) is None


def test_spread_points_lie_all_over_the_object():
    pytest.importorskip("psutil", reason="the worker needs it")
    from track4d.service.worker import spread_points

    vertices = np.random.default_rng(0).uniform(-1, 1, (50_000, 3)).astype(np.float32)
    points = spread_points(vertices)
    assert 300 < len(points) <= 2000 and len(set(points.tolist())) == len(points)
    nearest = np.linalg.norm(vertices[::100, None] - vertices[points], axis=-1).min(1)
    assert nearest.max() < 0.45
    assert spread_points(vertices[:1000]).tolist() == list(range(1000))


@pytest.mark.parametrize("platform, tag", [("win-amd64", "windows-x64"), ("macosx-11.00-arm64", "macos-arm64"),
                                           ("linux-x86_64", "linux-x64")])  # fmt: skip
@pytest.mark.parametrize("python", [(3, 11), (3, 13)])
def test_the_wheels_that_blender_takes(tool, platform, tag, python, monkeypatch):
    """By Blender's own filters: of the zip by platform, and of the installed wheels by system and Python."""
    from bl_pkg.bl_extension_ops import _extensions_wheel_filter_for_this_system as accepted

    monkeypatch.setattr(sysconfig, "get_platform", lambda: platform)
    monkeypatch.setattr(sys, "version_info", (*python, 0))
    taken = {Path(wheel).name for wheel in accepted(tool.paths_filter_wheels_by_platform(MANIFEST["wheels"], tag))}
    monkeypatch.undo()
    system = {"windows-x64": ("win_amd64", "win_amd64"), "macos-arm64": ("macosx_10_15_universal2", "macosx_11_0_arm64"),
              "linux-x64": ("manylinux_2_26_x86_64.manylinux_2_28_x86_64",
                            "manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64")}[tag]  # fmt: skip
    pyzmq, msgpack = {(3, 11): ("cp311-cp311", "cp311-cp311"), (3, 13): ("cp312-abi3", "cp313-cp313")}[python]
    version = MANIFEST["version"]
    assert taken == {f"track4d_protocol-{version}-py3-none-any.whl", f"pyzmq-27.3.0-{pyzmq}-{system[0]}.whl",
                     f"msgpack-1.2.4-{msgpack}-{system[1]}.whl"}  # fmt: skip


# First run


@pytest.fixture
def setup_python(server_python, tmp_path) -> Path:
    """A Python whose new environments find what the server needs, but not the server: what a package index would give."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([server_python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    folder, program = tmp_path / "packages", tmp_path / "python"
    folder.mkdir()
    for entry in packages.iterdir():
        if not entry.name.startswith(("track4d", "__editable__")):
            (folder / entry.name).symlink_to(entry)
    program.write_text(
        f"#!{server_python}\nimport pathlib, subprocess, sys\n"
        f"code = subprocess.call([{str(server_python)!r}, *sys.argv[1:]])\n"
        "for place in pathlib.Path(sys.argv[-1]).glob('lib/python*/site-packages'):\n"
        f"    (place / 'packages.pth').write_text({f'import sys; sys.path.insert(0, {str(folder)!r})'!r})\n"
        "sys.exit(code)\n"
    )
    program.chmod(0o755)
    return program


@pytest.mark.timeout(900)  # seconds of CPU time, but of a machine that may be busy
def test_the_server_of_the_zip_is_set_up_used_and_removed_by_clicks(blender, setup_python, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    home = tmp_path / "server home"
    answer = blender("set_up", script=SCRIPT, seconds=800, home=home, setup_python=setup_python)
    assert answer["first"] == ["server_python_missing", False], "nothing is made without a click"
    assert answer["offline"] == [["CANCELLED"], "offline"]
    assert answer["busy"][0].startswith("Making the environment") and answer["twice"] == [["CANCELLED"], "setup_running"]
    assert answer["killed"] == "interrupted"
    assert answer["ready"][:2] == ["ready", MANIFEST["version"]], answer["ready"]
    assert answer["python"] and answer["log"]
    assert answer["origin"].startswith(str(home / "environment")) and "bake-lighting" in answer["help"]
    assert answer["started"], "the server of the environment runs"
    assert answer["removed"] == ["absent", ["client-keys", "jobs"]] and not answer["runs"] and answer["existing"] == "FILE"


def test_a_source_without_wheel_needs_a_package(tmp_path):
    from track4d_addon import local_setup
    from track4d_protocol.errors import TransportError

    with pytest.raises(TransportError) as caught:
        local_setup.start(tmp_path / "home", "install")
    assert caught.value.code == "no_server_wheel" and not (tmp_path / "home").exists()


def test_a_set_up_that_fails_says_why(tmp_path, monkeypatch):
    from track4d_addon import local_setup

    monkeypatch.setenv("PIP_NO_INDEX", "1")
    local_setup.start(tmp_path / "home", "install", python=str(tmp_path / "no python"), package="track4d.whl")
    end = time.monotonic() + 60
    while local_setup.read_status(tmp_path / "home").busy:
        assert time.monotonic() < end
        time.sleep(0.05)
    status = local_setup.read_status(tmp_path / "home")
    assert status.state == "failed" and "no python" in status.text
    assert "no python" in (tmp_path / "home" / local_setup.LOG).read_text()


def test_what_pip_says_is_progress():
    from track4d_addon.local_setup import what_pip_does

    assert what_pip_does("Progress 512 of 1024") == ("", 0.5)
    assert what_pip_does("  Downloading torch-2.9.0-cp311-none-any.whl (108 MB)") == ("Downloading torch (108 MB)", None)
    assert what_pip_does("Installing collected packages: numpy, torch") == ("Unpacking 2 packages", None)
    assert what_pip_does("Requirement already satisfied: pip") == ("", None)


def test_proxies_reach_pip_and_blenders_own_python_settings_do_not(monkeypatch):
    from track4d_addon.local_setup import _clean_environment

    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    monkeypatch.setenv("PYTHONHOME", os.sep)
    clean = _clean_environment()
    assert clean["HTTPS_PROXY"] == "http://proxy:3128" and "PYTHONHOME" not in clean
