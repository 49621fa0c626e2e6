"""Who may talk to the server: its own key pair, the keys of clients, and ZAP (RFC 27), by which ZeroMQ asks."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import zmq
import zmq.utils.z85
from track4d_protocol.errors import InputError, ServerError
from track4d_protocol.keys import Connection, read_connection, write_connection, write_secret

LOCAL_CLIENT = "local"  # the client of this machine, whose keys are in the connection file
_SERVER_KEYS = "server-keys.json"
log = logging.getLogger("track4d.service")


def server_keys(home: Path) -> Connection:
    """The server's own key pair, in the form of a connection; made once per home, so that connection files stay valid.

    Raises:
        OSError: the home can't be written.
    """
    path = home / _SERVER_KEYS
    if not path.exists():
        public, secret = zmq.curve_keypair()
        write_connection(path, Connection("tcp://server", public, public, secret))
    return read_connection(path)


def grant(home: Path, name: str, address: str) -> Connection:
    """Makes a key pair for a client and lets it in; the secret key is kept nowhere but in what is returned.

    Args:
        name: of the client, letters, digits and "-".
        address: under which the client reaches the server, e.g. "tcp://192.168.1.5:7000".

    Raises:
        InputError: `bad_client_name`.
        OSError: the home can't be written.
    """
    if not name.replace("-", "").isalnum() or not name.isascii() or len(name) > 64:
        raise InputError("bad_client_name", f"The client name '{name}' is malformed.", "Use letters, digits and '-'.")
    public, secret = zmq.curve_keypair()
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (home / "client-keys").mkdir(exist_ok=True, mode=0o700)
    write_secret(home / "client-keys" / f"{name}.key", public.decode("ascii") + "\n")
    return Connection(address, server_keys(home).server_key, public, secret)


class Gatekeeper:
    """Answers ZeroMQ's question whether a key may connect.

    Keys are the files of `client-keys` (one public key each, Z85; read at every question, so that removing a file locks
    a client out at its next connection) and the worker's.

    Args:
        context: of the server's socket, which must be bound after this is made.
        home: the server's folder.
    """

    def __init__(self, context: zmq.Context, home: Path) -> None:
        self._folder = home / "client-keys"
        self._extra: dict[bytes, str] = {}
        self.socket = context.socket(zmq.REP)
        self.socket.linger = 0
        self.socket.bind("inproc://zeromq.zap.01")

    def admit(self, public_key: bytes, name: str) -> None:
        """Lets one more key in until the server ends, in place of others of the same kind."""
        self._extra = {public_key: name}

    def answer(self) -> None:
        """Answers one question that waits at `socket`."""
        version, request, _domain, address, _identity, mechanism, *credentials = self.socket.recv_multipart()
        name = None
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            name = self._name(zmq.utils.z85.encode(credentials[0]))
        if name is None:
            log.warning("refused a client from %s: its key is not in client-keys", address.decode("ascii", "replace"))
            self.socket.send_multipart([version, request, b"400", b"unknown key", b"", b""])
        else:
            self.socket.send_multipart([version, request, b"200", b"OK", name.encode(), b""])

    def _name(self, key: bytes) -> str | None:
        if key in self._extra:
            return self._extra[key]
        for path in sorted(self._folder.glob("*.key")):
            try:
                if path.read_bytes().strip() == key:
                    return path.stem
            except OSError as error:
                log.warning("'%s' can't be read: %s", path, error)
        return None

    def close(self) -> None:
        self.socket.close(0)


def private_folder(path: Path) -> None:
    """Makes a folder that only its owner can enter; one that is there keeps its permissions.

    Raises:
        ServerError: `home_not_private`: everybody on this machine could put keys into it.
        OSError: it can't be made.
    """
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if os.name == "posix" and path.stat().st_mode & stat.S_IWOTH:
        raise ServerError("home_not_private", f"Everybody on this machine can write to '{path}'.",
                          "Choose a folder inside it, which is made private.")
