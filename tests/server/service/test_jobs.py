"""Jobs from submit to result, with a real server, a real worker process and real sockets."""

import hashlib
import os
import sys

import numpy as np
import pytest
import torch
from track4d.service.store import result_path
from track4d.service.worker import error_of
from track4d_protocol import codec
from track4d_protocol.errors import InputError, ServerError, error_from_dict
from track4d_protocol.messages import JobState


def submit(service, client, prompt, **settings) -> str:
    job_id = service.new_id()
    client.submit(job_id, service.make_request(prompt, **settings))
    return job_id


def test_hello_names_versions_limits_and_device(client, service):
    service.wait_for(lambda: client.hello()["worker"] == "ready")
    hello = client.hello()
    assert hello["protocol"] == 1 and hello["server_version"]
    assert hello["device"] == "test device" and hello["model"] == "test model"
    assert hello["limits"]["vertices"] == 1_000_000


def test_a_job_brings_progress_a_preview_and_its_result(client, server, service):
    job_id, seen = submit(service, client, "until watched", frames=5), []
    client.watch(job_id)

    def steps() -> list[int]:
        return [update.step for update in seen if update.stage == "until"]

    service.wait_for(lambda: seen.extend(client.poll(0.5)) or len(steps()) >= 3)
    server.open("watched")
    job = service.finish(client, job_id, seen)
    assert job.state is JobState.DONE and job.objects == ["triangle"] and job.prompt == "until watched"
    assert steps() == sorted(steps())
    assert any(update.preview is not None and (update.preview == 7).all() for update in seen)
    result = client.fetch(job_id)
    expected = np.eye(3, dtype=np.float32)[None] + np.arange(5, dtype=np.float32)[:, None, None]
    np.testing.assert_array_equal(result.arrays["vertices"], expected)
    assert result.arrays["vertices"].flags.writeable
    assert result.report["prompt"] == "until watched"
    assert result.report["peak_memory_bytes"] > 10e6 and result.report["run_seconds"] > 0.1
    assert result.report["queued_seconds"] >= 0


def test_a_result_of_many_chunks_arrives_whole(client, service):
    job_id = submit(service, client, "quick 60000")
    assert service.finish(client, job_id).state is JobState.DONE
    assert client.fetch(job_id).arrays["vertices"].shape == (16, 60000, 3)


def test_the_same_id_is_the_same_job_and_runs_once(client, server, service, new_id):
    first = client.submit(new_id, service.make_request("sleep 0.31"))
    again = client.submit(new_id, service.make_request("sleep 0.31"))
    assert first.id == again.id == new_id and first.created == again.created
    service.finish(client, new_id)
    after = client.submit(new_id, service.make_request("something else"))
    assert after.state is JobState.DONE and after.prompt == "sleep 0.31"
    assert server.runs("sleep 0.31") == 1


def test_jobs_wait_in_order_and_a_waiting_one_is_cancelled_at_once(client, server, service):
    first, second, third = (submit(service, client, prompt) for prompt in ("until cancelled", "sleep 0.111", "sleep 0.122"))
    assert client.watch(second).queue_position in (1, 2)
    assert client.cancel(second).state is JobState.CANCELLED
    server.open("cancelled")
    assert service.finish(client, third).state is JobState.DONE
    states = {job.id: job.state for job in client.jobs()}
    assert states[first] is JobState.DONE and states[second] is JobState.CANCELLED
    assert server.runs("sleep 0.111") == 0
    with pytest.raises(InputError) as caught:
        client.fetch(second)
    assert caught.value.code == "job_not_done"


def test_a_running_job_is_cancelled_and_the_worker_lives(client, server, service):
    worker = server.worker().pid
    job_id = submit(service, client, "sleep 50")
    service.running(client, job_id, "sleep")
    assert client.cancel(job_id).stage == "cancelling"
    assert service.finish(client, job_id).state is JobState.CANCELLED
    assert server.worker().pid == worker
    assert client.cancel(job_id).state is JobState.CANCELLED  # once more changes nothing


def test_a_worker_that_ignores_a_cancel_is_replaced(client, server, service):
    worker = server.worker().pid
    job_id = submit(service, client, "ignore")
    service.running(client, job_id, "ignore")
    client.cancel(job_id)
    assert service.finish(client, job_id).state is JobState.CANCELLED
    assert service.finish(client, submit(service, client, "quick")).state is JobState.DONE
    assert server.worker().pid != worker


def test_errors_of_the_pipeline_arrive_with_code_message_and_action(client, service):
    job = service.finish(client, submit(service, client, "fail input"))
    error = error_from_dict(job.error)
    assert job.state is JobState.FAILED and isinstance(error, InputError)
    assert (error.code, error.message, error.action) == ("bad_thing", "The thing is bad.", "Use another thing.")
    with pytest.raises(InputError, match="The thing is bad"):
        client.fetch(job.id)


def test_a_bug_names_the_log_which_names_the_job(client, server, service):
    job = service.finish(client, submit(service, client, "fail bug"))
    assert job.error["code"] == "internal_error" and "server.log" in job.error["action"]
    log = (server.home / "server.log").read_text()
    assert "KeyError: 'no such thing'" in log and f"job {job.id} failed" in log


def test_lack_of_memory_is_called_so(client, service):
    assert service.finish(client, submit(service, client, "fail memory")).error["code"] == "out_of_memory"


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 55), lambda: np.empty(1 << 57)])
def test_lack_of_memory_is_known_whoever_says_it(allocate):
    """Torch raises a plain RuntimeError on the CPU."""
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert error_of(caught.value, "job").code == "out_of_memory"
    assert error_of(RuntimeError("shapes differ"), "job").code == "internal_error"


def test_a_job_survives_one_death_of_its_worker(client, server, service):
    assert service.finish(client, submit(service, client, "die once")).state is JobState.DONE
    assert server.runs("die once") == 2


def test_a_result_that_left_the_disk_is_called_lost(client, server, service):
    job_id = submit(service, client, "quick")
    service.finish(client, job_id)
    result_path(server.home, job_id).unlink()
    with pytest.raises(ServerError) as caught:
        client.fetch(job_id)
    assert caught.value.code == "result_lost" and "again" in caught.value.action


def test_the_next_worker_goes_on_from_where_the_last_one_died(client, server, service):
    assert service.finish(client, submit(service, client, "resume")).state is JobState.DONE
    assert server.runs("resume") == 2
    assert not list((server.home / "jobs").glob("*.checkpoint"))  # nobody needs it any more


def test_a_job_that_kills_two_workers_fails_and_the_server_lives(client, server, service):
    job = service.finish(client, submit(service, client, "die"))
    assert job.state is JobState.FAILED and job.error["code"] == "worker_died"
    assert server.runs("die") == 2
    assert service.finish(client, submit(service, client, "quick")).state is JobState.DONE


def test_an_idle_worker_that_dies_is_replaced(client, server, service):
    service.wait_for(lambda: client.hello()["worker"] == "ready")
    worker = server.worker()
    worker.kill()
    service.wait_for(lambda: server.worker().pid != worker.pid)
    assert service.finish(client, submit(service, client, "quick")).state is JobState.DONE


def test_results_are_listed_after_a_reconnect_and_forgotten_on_demand(client, server, service):
    job_id = submit(service, client, "quick")
    service.finish(client, job_id)
    client.close()
    with server.client() as later:
        assert job_id in [job.id for job in later.jobs() if job.state is JobState.DONE]
        assert later.fetch(job_id).arrays["vertices"].shape == (16, 3, 3)
        later.forget(job_id)
        assert job_id not in [job.id for job in later.jobs()]
        with pytest.raises(InputError) as caught:
            later.watch(job_id)
        assert caught.value.code == "unknown_job"
    name = hashlib.sha256(job_id.encode()).hexdigest()[:32]
    assert not list((server.home / "jobs").glob(f"{name}.*"))


def test_a_job_that_ended_before_it_was_watched_still_arrives(client, server, service):
    job_id = submit(service, client, "quick")
    service.finish(client, job_id)
    with server.client() as late:
        assert late.watch(job_id).state is JobState.DONE
        assert [job.state for job in late.poll(20)] == [JobState.DONE]


def test_a_running_job_is_not_forgotten(client, service):
    job_id = submit(service, client, "sleep 30")
    with pytest.raises(InputError) as caught:
        client.forget(job_id)
    assert caught.value.code == "job_running"
    client.cancel(job_id)
    service.finish(client, job_id)


def test_two_clients_watch_one_job(client, server, service):
    job_id = submit(service, client, "sleep 0.5")
    with server.client() as other:
        other.watch(job_id)
        assert service.finish(client, job_id).state is JobState.DONE
        assert service.finish(other, job_id).state is JobState.DONE


@pytest.mark.parametrize("job_id", ["", "../../etc/passwd", "a" * 65, "with space", "ü"])
def test_malformed_ids_are_refused(client, service, job_id):
    with pytest.raises(InputError) as caught:
        client.submit(job_id, service.make_request("quick"))
    assert caught.value.code == "bad_job_id"


def test_the_server_checks_requests_itself(client, service, new_id):
    request = service.make_request("quick")
    request.arrays["faces"] = np.array([[0, 1, 99]], np.int32)
    with pytest.raises(InputError, match="outside 0..2"):
        client._ask("submit", {"job": new_id, "settings": request.settings.to_dict(), "objects": []}, request.arrays)
    assert new_id not in [job.id for job in client.jobs()]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device of Linux that is always full")
def test_a_full_disk_is_said_and_nothing_is_kept(client, server, service, new_id):
    name = hashlib.sha256(new_id.encode()).hexdigest()[:32]
    (server.home / "jobs" / f"{name}.request.tmp").symlink_to("/dev/full")
    with pytest.raises(ServerError) as caught:
        client.submit(new_id, service.make_request("quick"))
    assert caught.value.code == "disk_full"
    assert new_id not in [job.id for job in client.jobs()]
    client.submit(new_id, service.make_request("quick"))  # the next attempt, with space
    assert service.finish(client, new_id).state is JobState.DONE


def test_the_queue_has_an_end(client, service):
    blocking = submit(service, client, "sleep 60")
    service.running(client, blocking, "sleep")
    waiting = [submit(service, client, "quick") for _ in range(64)]
    with pytest.raises(ServerError) as caught:
        submit(service, client, "quick")
    assert caught.value.code == "queue_full"
    for job_id in [*waiting, blocking]:
        client.cancel(job_id)
    assert service.finish(client, blocking).state is JobState.CANCELLED


def test_a_pipeline_that_cannot_be_imported_fails_the_job_with_the_reason(own_server, service):
    own_server.start(work="no_such_module:run")
    client = own_server.client()
    service.wait_for(lambda: client.hello()["worker"] == "failed")
    assert "no_such_module" in client.hello()["worker_error"]["message"]
    job = service.finish(client, submit(service, client, "quick"))
    assert job.state is JobState.FAILED and job.error["code"] == "worker_unusable"


def test_the_service_imports_without_torch():
    import subprocess

    code = "import sys, track4d.service; sys.exit('torch' in sys.modules or 'numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_of_jobs_are_messages_of_the_codec(client, server, service, new_id):
    client.submit(new_id, service.make_request("quick"))
    service.finish(client, new_id)
    path = server.home / "jobs" / f"{hashlib.sha256(new_id.encode()).hexdigest()[:32]}.result"
    assert set(codec.read_file(path.read_bytes()).arrays) == {"vertices"}
