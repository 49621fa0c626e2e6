"""What was acknowledged survives the end of the server, however it ends."""

import os
import signal
import sys

import numpy as np
import psutil
import pytest
from track4d.service.store import MAX_RESTARTS, Store, request_path, result_path
from track4d_protocol import codec
from track4d_protocol.errors import InputError, ServerError, TransportError
from track4d_protocol.limits import Limits
from track4d_protocol.messages import JobState


def test_a_killed_server_finishes_its_job_after_the_restart(own_server, service, new_id):
    client = own_server.start().client()
    client.submit(new_id, service.make_request("until killed"))
    waiting = service.new_id()
    client.submit(waiting, service.make_request("quick"))
    service.running(client, new_id, "until")
    worker = own_server.worker()
    own_server.kill()
    own_server.open("killed")
    service.wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
    later = own_server.start().client()
    assert [job.id for job in later.jobs()] == [new_id, waiting]
    assert service.finish(later, new_id).state is JobState.DONE
    assert later.fetch(new_id).arrays["vertices"].shape == (16, 3, 3)
    assert service.finish(later, waiting).state is JobState.DONE
    assert own_server.runs("until killed") == 2 and own_server.runs("quick") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can handle")
def test_a_stopped_server_leaves_nothing_behind_and_goes_on_later(own_server, service, new_id):
    client = own_server.start().client()
    client.submit(new_id, service.make_request("sleep 0.9"))
    service.running(client, new_id, "sleep")
    worker = own_server.worker()
    own_server.process.send_signal(signal.SIGTERM)
    assert own_server.process.wait(60) == 0
    assert not worker.is_running() and not own_server.connection_file.exists()
    later = own_server.start().client()
    assert service.finish(later, new_id).state is JobState.DONE


def test_a_cancel_survives_a_kill(own_server, service, new_id):
    client = own_server.start().client()
    client.submit(new_id, service.make_request("ignore"))
    service.running(client, new_id, "ignore")
    client.cancel(new_id)
    own_server.kill()
    later = own_server.start().client()
    assert later.watch(new_id).state is JobState.CANCELLED


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="a process can't be stopped in the middle on Windows")
def test_a_silent_server_is_noticed(own_server, service, new_id):
    client = own_server.start().client()
    client.submit(new_id, service.make_request("sleep 60"))
    service.running(client, new_id, "sleep")
    os.kill(own_server.process.pid, signal.SIGSTOP)
    with pytest.raises(TransportError) as caught:
        for _ in range(60):
            client.poll(0.5)
    os.kill(own_server.process.pid, signal.SIGCONT)
    assert caught.value.code == "server_lost"


def test_idle_clients_hear_heartbeats(raw):
    raw.send_multipart(codec.encode("heartbeat", {}))
    assert [codec.decode(raw.recv_multipart()).kind for _ in range(3)] == ["heartbeat"] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs prlimit, to make the files of another process too large")
def test_a_disk_that_fills_up_neither_ends_the_server_nor_loses_the_job(own_server, service, new_id):
    import resource

    client = own_server.start().client()
    client.submit(new_id, service.make_request("until full"))
    service.running(client, new_id, "until")
    before = resource.prlimit(own_server.process.pid, resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    own_server.open("full")
    service.wait_for(lambda: "can't be kept yet" in (own_server.home / "server.log").read_text())
    assert client.watch(new_id).state is JobState.RUNNING  # nothing is said to be done that isn't kept
    resource.prlimit(own_server.process.pid, resource.RLIMIT_FSIZE, before)
    assert service.finish(client, new_id).state is JobState.DONE


class TestStore:
    """The store alone, for what a kill would have to hit within a millisecond."""

    def test_a_result_that_was_written_before_the_end_counts(self, tmp_path, service):
        store = Store(tmp_path)
        store.add("one", service.make_request("quick"))
        store.start("one")
        codec.write_file(result_path(tmp_path, "one"), {"report": {}}, {"vertices": np.zeros((2, 3, 3), np.float32)})
        store.close()
        assert Store(tmp_path).get("one").state is JobState.DONE

    def test_a_job_that_ends_the_server_again_and_again_fails(self, tmp_path, service):
        store = Store(tmp_path)
        store.add("one", service.make_request("quick"))
        for _ in range(MAX_RESTARTS):
            assert store.get("one").state is JobState.QUEUED
            store.start("one")
            store.close()
            store = Store(tmp_path)
        job = store.get("one")
        assert job.state is JobState.FAILED and job.error["code"] == "worker_died"

    def test_a_good_end_counts_as_none(self, tmp_path, service):
        store = Store(tmp_path)
        store.add("one", service.make_request("quick"))
        for _ in range(MAX_RESTARTS + 1):
            store.start("one")
            store.interrupted("one")
            store.close()
            store = Store(tmp_path)
        assert store.get("one").state is JobState.QUEUED

    def test_files_of_no_job_are_swept(self, tmp_path, service):
        store = Store(tmp_path)
        store.add("one", service.make_request("quick"))
        orphan = request_path(tmp_path, "never-acknowledged")
        torn = result_path(tmp_path, "one").with_suffix(".result.tmp")
        orphan.write_bytes(b"x")
        torn.write_bytes(b"x")
        store.close()
        Store(tmp_path)
        assert request_path(tmp_path, "one").exists() and not orphan.exists() and not torn.exists()

    def test_little_disk_space_is_refused_before_writing(self, tmp_path, service):
        store = Store(tmp_path, Limits(free_disk_bytes=1 << 60))
        with pytest.raises(ServerError) as caught:
            store.add("one", service.make_request("quick"))
        assert caught.value.code == "disk_full" and store.all() == []

    def test_a_damaged_list_is_said(self, tmp_path):
        (tmp_path / "jobs.sqlite3").write_bytes(b"not a database" * 100)
        with pytest.raises(ServerError) as caught:
            Store(tmp_path)
        assert caught.value.code == "store_damaged"

    def test_names_from_the_wire_never_become_paths(self, tmp_path):
        for name in ("../up", "/etc/passwd", "C:\\x", "CON"):
            assert request_path(tmp_path, name).parent == tmp_path / "jobs"
            assert request_path(tmp_path, name).stem.isalnum()
        store = Store(tmp_path)
        with pytest.raises(InputError):
            store.get("../up")


def test_a_server_that_nobody_needs_ends_but_not_while_a_job_waits(own_server, service, new_id):
    client = own_server.start(idle=2.0).client()
    client.submit(new_id, service.make_request("sleep 2.5"))
    client.close()  # nobody watches: the job alone keeps the server
    own_server.process.wait(60)
    assert not own_server.connection_file.exists()
    assert Store(own_server.home).get(new_id).state is JobState.DONE
