"""Peers that don't keep to the protocol: they get an error or nothing, and the server lives on."""

import random
import socket
import threading
from dataclasses import replace

import msgpack
import pytest
import zmq
from track4d.service import grant
from track4d_protocol import PROTOCOL_VERSION, codec
from track4d_protocol.client import Client
from track4d_protocol.errors import InputError, TransportError
from track4d_protocol.keys import Connection, read_connection
from track4d_protocol.limits import LIMITS
from track4d_protocol.messages import JobState


def answer_to(raw, frames) -> codec.Message:
    raw.send_multipart(frames)
    while True:
        message = codec.decode(raw.recv_multipart())
        if message.kind != "heartbeat":
            return message


def test_without_encryption_nothing_comes_back(server, client):
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(read_connection(server.connection_file).address)
    dealer.send_multipart(codec.encode("hello", {"serial": 1}))
    assert not dealer.poll(1000)
    context.destroy(0)
    assert client.hello()


def test_an_unknown_key_is_told_so(server, client):
    public, secret = zmq.curve_keypair()
    stranger = replace(read_connection(server.connection_file), public_key=public, secret_key=secret)
    with Client(stranger, timeout=20) as other, pytest.raises(TransportError) as caught:
        other.hello()
    assert caught.value.code == "not_authorised"
    assert "not in client-keys" in (server.home / "server.log").read_text()
    assert client.hello()


def test_an_impostor_of_the_server_gets_nothing(server):
    public, _ = zmq.curve_keypair()
    deceived = replace(read_connection(server.connection_file), server_key=public)
    with Client(deceived, timeout=1.0) as other, pytest.raises(TransportError) as caught:
        other.hello()
    assert caught.value.code in ("not_authorised", "server_unreachable")


def test_a_client_that_was_granted_enters_until_its_key_is_removed(server, client):
    connection = grant(server.home, "laptop", read_connection(server.connection_file).address)
    with Client(connection, timeout=20) as other:
        assert other.hello()
        with pytest.raises(InputError) as caught:
            other.shutdown()
        assert caught.value.code == "not_local"
    (server.home / "client-keys" / "laptop.key").unlink()
    with Client(connection, timeout=20) as other, pytest.raises(TransportError) as refused:
        other.hello()
    assert refused.value.code == "not_authorised"


@pytest.mark.parametrize("name", ["../up", "", "a/b", "worker:1"])
def test_names_of_clients_stay_in_their_folder(tmp_path, name):
    with pytest.raises(InputError):
        grant(tmp_path, name, "tcp://127.0.0.1:1")


def header(body=None, arrays=()) -> bytes:
    return msgpack.packb({"body": {"serial": 7} if body is None else body, "arrays": list(arrays)})


HEAD = b"T4D" + bytes([PROTOCOL_VERSION])
GARBAGE = {
    "empty": [b""], "text": [b"GET / HTTP/1.1"], "no header": [HEAD + b"hello"], "no kind": [HEAD, header()],
    "odd kind": [HEAD + b"../x", header()], "header of text": [HEAD + b"hello", b"hello"],
    "header of a list": [HEAD + b"hello", msgpack.packb([1])], "body of a list": [HEAD + b"hello", header([1])],
    "header too large": [HEAD + b"hello", b"\0" * (LIMITS.header_bytes + 1)],
    "deep nesting": [HEAD + b"hello", b"\x91" * 100_000],
    "extension": [HEAD + b"hello", header({"x": msgpack.ExtType(42, b"code")})],
    "array missing": [HEAD + b"submit", header(arrays=[["a", "uint8", [3], 3]])],
    "array not declared": [HEAD + b"submit", header(), b"abc"],
    "array too short": [HEAD + b"submit", header(arrays=[["a", "uint8", [3], 3]]), b"ab"],
    "array of objects": [HEAD + b"submit", header(arrays=[["a", "object", [1], 8]]), b"12345678"],
    "array of a lie": [HEAD + b"submit", header(arrays=[["a", "uint8", [2**40, 2**40], 3]]), b"abc"],
    "array of negative size": [HEAD + b"submit", header(arrays=[["a", "uint8", [-3], -3]]), b"abc"],
    "two of one name": [HEAD + b"submit", header(arrays=[["a", "uint8", [1], 1]] * 2), b"a", b"b"],
    "unknown kind": [HEAD + b"explode", header()],
    "the worker's kind": [HEAD + b"worker_done", header({"job": "x", "serial": 1})],
    "no serial": [HEAD + b"hello", header({})], "job of a list": [HEAD + b"watch", header({"job": [1], "serial": 1})],
    "job absent": [HEAD + b"cancel", header()],
    "chunk before the start": [HEAD + b"chunk", header({"job": "x", "start": -1, "serial": 1})],
    "settings of text": [HEAD + b"submit", header({"job": "x", "serial": 1, "settings": "x", "objects": []})],
    "objects of numbers": [
        HEAD + b"submit", header({"job": "x", "serial": 1, "settings": {"prompt": "x"}, "objects": [1]})],
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_is_answered_with_an_error(raw, client, name):
    answer = answer_to(raw, GARBAGE[name])
    assert answer.kind == "error" and answer.body["error"]["code"] != "internal_error"
    assert client.hello()


def test_random_frames_are_survived(raw, client):
    dice = random.Random(0)
    for _ in range(300):
        frames = [dice.randbytes(dice.choice([0, 1, 5, 30])) for _ in range(dice.randint(1, 4))]
        if dice.random() < 0.5:
            frames[0] = HEAD + dice.choice([b"submit", b"watch", b"chunk", b"hello"])
        assert answer_to(raw, frames).kind == "error"
    assert client.hello()


def test_another_version_is_told_both(raw, client):
    frames = [b"T4D" + bytes([99]) + b"hello", header()]
    answer = answer_to(raw, frames)
    assert answer.body["error"]["code"] == "protocol_mismatch"
    assert all(f"version {version}" in answer.body["error"]["message"] for version in (99, PROTOCOL_VERSION))
    assert client.hello()


def test_a_server_of_another_version_is_named():
    context = zmq.Context()
    public, secret = zmq.curve_keypair()
    old = context.socket(zmq.ROUTER)
    old.linger, old.curve_server, old.curve_secretkey = 0, True, secret
    port = old.bind_to_random_port("tcp://127.0.0.1")

    def answer_in_version_200() -> None:
        identity = old.recv_multipart()[0]
        old.send_multipart([identity, b"T4D" + bytes([200]) + b"hello", b"anything"])

    thread = threading.Thread(target=answer_in_version_200)
    thread.start()
    mine = zmq.curve_keypair()
    with Client(Connection(f"tcp://127.0.0.1:{port}", public, *mine), timeout=20) as client:
        with pytest.raises(TransportError) as caught:
            client.hello()
    thread.join()
    context.destroy(0)
    assert caught.value.code == "protocol_mismatch" and "version 200" in caught.value.message


def test_a_client_that_never_reads_is_dropped(raw, client):
    raw.rcvhwm = 1
    for serial in range(20_000):
        try:
            raw.send_multipart([HEAD + b"hello", header({"serial": serial})], flags=zmq.NOBLOCK)
        except zmq.Again:
            break
    assert client.hello()


def test_bytes_that_are_not_zeromq_are_survived(server, client):
    host, port = read_connection(server.connection_file).address.removeprefix("tcp://").split(":")
    for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 1000, b"\xff\0\0\0\0\0\0\0\x01\x7f\x03" + b"\0" * 200):
        with socket.create_connection((host, int(port))) as plain:
            plain.sendall(data)
    assert client.hello()


def test_an_eavesdropper_reads_nothing(server, service, new_id):
    """Everything through a proxy that keeps what it sees; neither prompt nor names nor keys are in there."""
    connection = read_connection(server.connection_file)
    host, port = connection.address.removeprefix("tcp://").split(":")
    heard = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def pump(source: socket.socket, target: socket.socket) -> None:
            while data := source.recv(65536):
                heard.extend(data)
                target.sendall(data)
            target.close()

        def accept() -> None:
            inner, outer = listener.accept()[0], socket.create_connection((host, int(port)))
            for pair in ((inner, outer), (outer, inner)):
                threading.Thread(target=lambda pair=pair: _quietly(pump, *pair), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        proxy = replace(connection, address=f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        with Client(proxy, timeout=20) as client:
            client.submit(new_id, service.make_request("sleep 0.0123456"))
            assert service.finish(client, new_id).state is JobState.DONE
            assert client.fetch(new_id).report["prompt"] == "sleep 0.0123456"
    assert len(heard) > 1000
    for secret in (b"0.0123456", b"triangle", b"vertices", new_id.encode(), connection.secret_key, b"submit"):
        assert secret not in heard


def _quietly(function, *arguments) -> None:
    try:
        function(*arguments)
    except OSError:  # the other side has closed
        return
