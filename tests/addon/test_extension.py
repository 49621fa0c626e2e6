"""The extension as users get it: the zip built, installed into a Blender of its own, and used against a real server."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import bpy
import pytest
import tomllib
from track4d_protocol import __version__
from track4d_protocol.keys import read_connection
from track4d_protocol.local import stop_server

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = tomllib.loads((ROOT / "blender_manifest.toml").read_text("utf-8"))


def test_blender_accepts_the_wheels_on_both_of_its_pythons(tool):
    assert tool.python_versions_from_wheels(MANIFEST["wheels"]) == {(3, 11), (3, 13)}


@pytest.mark.parametrize("platform", MANIFEST["platforms"])
def test_every_platform_has_one_wheel_of_each_package_for_each_python(builder, tool, platform):
    wheels = [builder.Wheel.parse(w) for w in tool.paths_filter_wheels_by_platform(MANIFEST["wheels"], platform)]
    found = sorted((w.name, w.python) for w in wheels)
    assert found == [
        ("msgpack", "cp311"),
        ("msgpack", "cp313"),
        ("pyzmq", "cp311"),
        ("pyzmq", "cp312"),
        ("track4d_protocol", "py3"),
    ]


def test_versions_agree(builder):
    protocol = next(
        w for w in builder.manifest_wheels((ROOT / "blender_manifest.toml").read_text("utf-8")) if w.name == "track4d_protocol"
    )
    assert MANIFEST["version"] == protocol.version == __version__
    assert (protocol.python, protocol.abi, protocol.platform) == ("py3", "none", "any")


def test_another_python_needs_only_wheels_without_stable_abi(builder):
    wheels = builder.manifest_wheels((ROOT / "blender_manifest.toml").read_text("utf-8"))
    added = builder.with_python(wheels, "3.14")
    assert {(w.name, w.python, w.abi) for w in added} == {("msgpack", "cp314", "cp314")}
    assert len(added) == len(MANIFEST["platforms"])
    assert builder.with_python(wheels, "3.13") == []


def test_zip_holds_the_extension_and_nothing_else(archive, builder):
    with zipfile.ZipFile(archive) as content:
        names = set(content.namelist())
        protocol = zipfile.ZipFile(content.open(f"wheels/track4d_protocol-{__version__}-py3-none-any.whl")).namelist()
    assert {"blender_manifest.toml", "__init__.py", "LICENSE", "operators/animation.py", "capture/__init__.py"} <= names
    assert {Path(w).name for w in MANIFEST["wheels"]} == {Path(n).name for n in names if n.startswith("wheels/")}
    server = f"server_wheel/track4d-{__version__}-py3-none-any.whl"  # for "Set Up Local Server"; Blender leaves it alone
    with zipfile.ZipFile(archive) as content, zipfile.ZipFile(content.open(server)) as wheel:
        held = wheel.namelist()
    assert {"track4d/cli.py", "track4d/video/weights/motion.safetensors", "track4d_protocol/client.py"} <= set(held)
    assert not [name for name in held if not name.startswith(("track4d/", "track4d_protocol/", "track4d_addon/", "track4d-"))]
    allowed = {p.relative_to(ROOT / "addon").as_posix() for p in (ROOT / "addon").rglob("*.py")} | {
        "blender_manifest.toml",
        "LICENSE",
    }
    assert {n for n in names if not n.startswith("wheels/")} <= allowed | {server}
    assert "track4d_protocol/client.py" in protocol


def test_building_again_needs_no_network(archive):
    before = archive.read_bytes()
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "build_extension.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(archive.read_bytes()) == pytest.approx(len(before), rel=0.01)


def test_animate_moves_the_mesh_and_leaves_nothing_else(blender, server, tmp_path):
    answer = blender("animate", connection=server.connection, gates=server.home, blend=tmp_path / "while_running.blend")
    assert answer["finished"] and not answer["problem"]
    assert answer["keys"] == 17 and answer["farthest"] > 0.05
    assert "fit" in answer["stages"] and answer["pictures"] > 0 and answer["pictures_left"] == 0
    assert answer["recent"] == [["the monkey begins with one and waits for two"]] * 2
    assert answer["unchanged_while_running"] and not answer["saved_job"]
    assert answer["new"] == {"shape_keys": 1, "actions": 1}
    assert answer["warnings"][-1] == "tiny_work"


def test_animate_starts_the_server_and_the_real_pipeline_moves_the_mesh(blender, server_python, tmp_path):
    home = tmp_path / "own home"
    try:
        answer = blender("local", prompt="the monkey is nodding", home=home, python=server_python)
    finally:
        stop_server(home)
    assert answer["finished"] and not answer["problem"], answer
    assert "connected" in answer["seen"]
    assert answer["keys"] == 9 and answer["farthest"] > 0.005


@pytest.mark.parametrize("when", ["capture", "work"])
def test_cancel_is_immediate_and_leaves_the_file_as_it_was(blender, server, when):
    answer = blender("cancel", when=when, connection=server.connection)
    assert answer["idle"] and answer["seconds"] < 1 and answer["same"] and not answer["problem"]
    if when == "work":
        end = time.monotonic() + 60
        while server.job(answer["job"]).state.value != "cancelled":
            assert time.monotonic() < end
            time.sleep(0.2)


def test_a_server_that_dies_and_returns_is_found_again(blender, server, tmp_path):
    signal_file = tmp_path / "signal"
    line, environment = blender.command("lost", connection=server.connection, wait_file=signal_file)
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for word, act in (("running", server.kill), ("lost", server.start)):
        end = time.monotonic() + 150
        while not signal_file.exists() or signal_file.read_text() != word:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        act()
    (server.home / "more").touch()
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    answer = json.loads(output.strip().splitlines()[-1])
    assert answer["noticed"] and answer["code"] in ("server_lost", "server_unreachable")
    assert answer["finished"] and not answer["problem"] and answer["keys"] == 17


def test_a_result_waits_for_a_blender_that_was_closed(blender, server, tmp_path):
    job = blender("leave", connection=server.connection, blend=tmp_path / "monkey.blend")["job"]
    (server.home / "more").touch()
    answer = blender("come_back", connection=server.connection, blend=tmp_path / "monkey.blend")
    assert answer["offered"] == [job] and answer["again"] == []
    assert answer["keys"] == 17 and answer["farthest"] > 0.05 and not answer["problem"]
    assert answer["keys_after_removal"] == 0


def test_a_result_is_never_forced_onto_a_scene_that_is_not_ready(blender, server):
    answer = blender("interrupted", connection=server.connection, gates=server.home)
    assert answer["refused"] == [["CANCELLED"], "in_edit_mode"] and answer["keys"] == 17
    assert answer["missing"] == "object_missing"
    assert answer["offered_again"] and answer["left"] == 1, "what the other file doesn't carry is offered in it"


def test_two_objects_at_once(blender, server):
    assert blender("two", connection=server.connection) == {"queued": True, "finished": True, "keys": [0, 17]}


def test_a_failed_job_leaves_a_sentence_and_a_working_panel(blender, server):
    answer = blender("failing", connection=server.connection)
    assert answer["code"] and answer["code"] in answer["report"] and f"Blender {bpy.app.version_string}" in answer["report"]
    assert answer["ready"] and answer["dismissed"]
    assert read_connection(server.connection).secret_key.decode() not in answer["report"]


def test_without_a_server_the_panel_offers_to_set_one_up_or_to_start_it(blender):
    assert blender("no_server") == {"code": "server_python_missing", "fix": True}
    assert blender("no_server", python=sys.executable) == {"code": "server_not_running", "fix": True}


def test_a_server_that_cannot_work_says_why(blender, server_of):
    connection = server_of("no_such_module:run").connection
    assert blender("no_server", connection=connection)["code"] == "worker_unusable"


def test_switching_off_leaves_nothing(blender):
    answer = blender("register_twice")
    assert answer == {"types": [], "scene": False, "threads": 0, "timer": False, "operators": []}


TWO_THREADS = """
import importlib, sys, threading
from importlib.machinery import PathFinder, SourceFileLoader
import bpy

between = threading.Event()

class Waiting(SourceFileLoader):
    # The first thread waits inside `apply`, before it needs `capture`, until the second has begun to load that.
    def create_module(self, spec):
        who = threading.current_thread().name
        if spec.name == "track4d_addon.capture" and who == "second":
            between.set()
            threading.Event().wait(0.5)
        if spec.name == "track4d_addon.marks" and who == "first":
            second.start()
            between.wait(10)
        return None

class Meet:
    def find_spec(self, name, path=None, target=None):
        if name not in ("track4d_addon.capture", "track4d_addon.marks"):
            return None
        spec = PathFinder.find_spec(name, path)
        spec.loader = Waiting(name, spec.loader.path)
        return spec

def load(name):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed.append(repr(error))

sys.meta_path.insert(0, Meet())
import track4d_addon
failed = []
first = threading.Thread(target=load, args=("track4d_addon.apply",), name="first")
second = threading.Thread(target=load, args=("track4d_addon.capture",), name="second")
first.start()
first.join(30)
second.join(30)
print("failed:", failed, between.is_set(), first.is_alive(), second.is_alive())
"""


def test_the_client_thread_and_a_click_load_the_extension_at_once():
    """Threads that load a package and a module of it at once get an error from Python."""
    done = subprocess.run([sys.executable, "-c", TWO_THREADS], capture_output=True, text=True, timeout=120)
    assert "failed: [] True False False" in done.stdout, done.stdout + done.stderr
