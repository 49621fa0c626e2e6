"""Connection files, and the lock that says who serves a home."""

import os
import stat
import subprocess
import sys

import pytest
from track4d_protocol.errors import TransportError
from track4d_protocol.filelock import FileLock, holder
from track4d_protocol.keys import Connection, default_home, read_connection, write_connection

CONNECTION = Connection("tcp://127.0.0.1:5000", b"a" * 40, b"b" * 40, b"c" * 40)


def test_a_connection_comes_back_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "connection.json"
    path.write_text("old")
    write_connection(path, CONNECTION)
    assert read_connection(path) == CONNECTION
    assert [file.name for file in tmp_path.iterdir()] == ["connection.json"]
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_do_not_appear_in_logs():
    assert "ccc" not in repr(CONNECTION) and "ccc" not in f"{CONNECTION}"


@pytest.mark.parametrize("content", [
    "", "{}", "[]", "\u00fc", '{"address": "http://x", "server_key": "", "public_key": "", "secret_key": ""}',
    '{"address": "tcp://x:1", "server_key": 1, "public_key": 2, "secret_key": 3}'])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file").write_text(content, encoding="utf-8")
    with pytest.raises(TransportError) as caught:
        read_connection(tmp_path / "file")
    assert caught.value.code == "bad_connection_file"


def test_an_absent_file_is_said(tmp_path):
    with pytest.raises(TransportError) as caught:
        read_connection(tmp_path / "absent")
    assert caught.value.code == "no_connection_file"


def test_the_home_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("TRACK4D_HOME", str(tmp_path / "elsewhere"))
    assert default_home() == tmp_path / "elsewhere"
    monkeypatch.delenv("TRACK4D_HOME")
    assert default_home().name == "track4d" and default_home().is_absolute()


def test_a_lock_excludes_and_ends_with_its_holder(tmp_path):
    path = tmp_path / "lock"
    code = ("import sys, time; from pathlib import Path; from track4d_protocol.filelock import FileLock;"
            f"lock = FileLock(Path({str(path)!r})); lock.acquire(); lock.note('4711');"
            "sys.stdout.write('held'); sys.stdout.flush(); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        assert holder(path) == 4711
        assert not FileLock(path).acquire(timeout=0.05)
        other.kill()
    assert holder(path) is None
    lock = FileLock(path)
    assert lock.acquire()
    assert not FileLock(path).acquire()
    lock.release()
    assert FileLock(path).acquire()
