"""A server on this machine is found, started once, and stopped, by the real command line."""

import json
import os
import signal
import stat
import subprocess
import sys

import pytest
import zmq
from track4d.service import serve
from track4d_protocol.client import Client
from track4d_protocol.errors import InputError, ServerError, TransportError
from track4d_protocol.filelock import holder
from track4d_protocol.keys import read_connection
from track4d_protocol.local import ensure_server, stop_server


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_two_that_ask_at_once_get_one_server(tmp_path):
    home = tmp_path / "home"
    code = ("import sys; from pathlib import Path; from track4d_protocol.local import ensure_server;"
            f"sys.stdout.write(ensure_server(Path({str(home)!r}), timeout=100).address)")
    askers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        addresses = {asker.communicate(timeout=120)[0] for asker in askers}
        assert len(addresses) == 1 and addresses.pop().startswith("tcp://127.0.0.1:")
        assert (home / "server.log").read_text().count("listens at") == 1
        process_id = holder(home / "server.lock")
        assert process_id
        assert ensure_server(home) == read_connection(home / "connection.json")
        assert holder(home / "server.lock") == process_id
        with pytest.raises(ServerError) as caught:
            serve(home)
        assert caught.value.code == "already_running"
        with Client(read_connection(home / "connection.json"), timeout=60) as client:
            client.shutdown()
        ensure_server(home, timeout=100)  # while the first one may still be ending
        assert holder(home / "server.lock") not in (None, process_id)
    finally:
        stop_server(home, timeout=60)
    assert holder(home / "server.lock") is None
    assert not (home / "connection.json").exists()
    stop_server(home)  # once more changes nothing


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process can't be stopped in the middle on Windows")
def test_a_server_that_hangs_is_ended_all_the_same(own_server):
    own_server.start()
    worker = own_server.worker()
    os.kill(own_server.process.pid, signal.SIGSTOP)
    stop_server(own_server.home, timeout=2)
    own_server.process.wait(20)
    assert own_server.process.returncode == -signal.SIGKILL and holder(own_server.home / "server.lock") is None
    assert not worker.is_running() or worker.wait(20) is None


def test_other_machines_are_served_only_when_asked(own_server):
    own_server.start(address="tcp://0.0.0.0:*")
    assert read_connection(own_server.connection_file).address.startswith("tcp://127.0.0.1:")
    assert own_server.client().hello()
    assert "other machines can reach this server" in (own_server.home / "server.log").read_text()


@pytest.mark.skipif(os.name != "posix", reason="Windows keeps user folders private by their access lists")
def test_keys_are_for_their_owner_only(server):
    for name in ("connection.json", "server-keys.json", "client-keys/local.key", "jobs.sqlite3", "jobs.sqlite3-wal"):
        assert mode(server.home / name) == 0o600
    assert mode(server.home) == mode(server.home / "client-keys") == mode(server.home / "jobs") == 0o700


def test_the_connection_file_holds_an_address_and_keys(server):
    data = json.loads(server.connection_file.read_text())
    assert set(data) == {"address", "server_key", "public_key", "secret_key"}
    assert data["address"].startswith("tcp://127.0.0.1:")
    assert data["secret_key"] not in repr(read_connection(server.connection_file))


def test_connection_files_of_other_machines_survive_a_restart(own_server):
    first = read_connection(own_server.start().connection_file)
    own_server.kill()
    second = read_connection(own_server.start().connection_file)
    assert first.server_key == second.server_key and first.secret_key != second.secret_key


def test_a_stale_connection_file_is_replaced_by_a_fast_refusal(own_server):
    connection = read_connection(own_server.start().connection_file)
    own_server.kill()
    with Client(connection, timeout=0.5) as client, pytest.raises(TransportError) as caught:
        client.hello()
    assert caught.value.code == "server_unreachable"


def test_an_interpreter_without_the_server_is_named(tmp_path):
    with pytest.raises(TransportError) as caught:
        ensure_server(tmp_path, python=str(tmp_path / "no-python"))
    assert caught.value.code == "server_not_started" and "no-python" in caught.value.message


@pytest.mark.skipif(os.name != "posix", reason="writes a shell script")
def test_a_server_that_ends_at_once_shows_its_last_words(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho No module named track4d >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(TransportError) as caught:
        ensure_server(tmp_path / "home", python=str(broken))
    assert caught.value.code == "server_not_started" and "No module named track4d" in caught.value.message


def test_a_home_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TransportError) as caught:
        ensure_server(tmp_path / "file" / "home")
    assert caught.value.code == "home_unwritable"
    with pytest.raises(ServerError) as refused:
        serve(tmp_path / "file" / "home")
    assert refused.value.code == "home_unwritable"


@pytest.mark.skipif(os.name != "posix", reason="Windows has no permission bits")
def test_a_home_that_everybody_can_write_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ServerError) as caught:
        serve(tmp_path)
    assert caught.value.code == "home_not_private" and mode(tmp_path) == 0o777


def test_no_server_without_encryption(tmp_path, monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda what: False)
    with pytest.raises(ServerError) as caught:
        serve(tmp_path)
    assert caught.value.code == "curve_missing" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["ipc:///tmp/x", "tcp://nowhere.invalid:1", "tcp://127.0.0.1:99999"])
def test_odd_addresses_are_refused(tmp_path, address):
    with pytest.raises(InputError) as caught:
        serve(tmp_path / "home", address)
    assert caught.value.code == "bad_address"


def test_a_used_port_is_said(server, tmp_path):
    with pytest.raises(ServerError) as caught:
        serve(tmp_path / "home", read_connection(server.connection_file).address)
    assert caught.value.code == "address_in_use"
