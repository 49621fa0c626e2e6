"""Where a server lives and the keys that open it: the connection file.

A connection file is a secret: whoever reads it can use the server. It is written with mode 0600.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .errors import TransportError

CONNECTION_FILE = "connection.json"


@dataclass(frozen=True)
class Connection:
    """How to reach one server.

    Attributes:
        address: "tcp://host:port".
        server_key: the server's public CURVE key, Z85 (40 bytes).
        public_key: the client's public CURVE key, Z85.
        secret_key: the client's secret CURVE key, Z85.
    """

    address: str
    server_key: bytes
    public_key: bytes
    secret_key: bytes

    def __repr__(self) -> str:
        return f"Connection({self.address!r})"  # keys don't belong into logs


def default_home() -> Path:
    """The folder of the server's jobs and keys: TRACK4D_HOME, or `track4d` in the platform's folder for user data."""
    chosen = os.environ.get("TRACK4D_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return base / "track4d"


def read_connection(path: Path | str) -> Connection:
    """Reads a connection file.

    Raises:
        TransportError: `no_connection_file`, or `bad_connection_file` when it isn't one.
    """
    try:
        data = json.loads(Path(path).read_text("utf-8"))
        keys = {name: data[name].encode("ascii") for name in ("server_key", "public_key", "secret_key")}
        if not str(data["address"]).startswith("tcp://") or any(len(key) != 40 for key in keys.values()):
            raise ValueError("an address or a key is malformed")
        return Connection(str(data["address"]), **keys)
    except OSError as error:
        raise TransportError("no_connection_file", f"The connection file '{path}' can't be read: {error.strerror}.",
                             "Start the server, or choose the file that it wrote.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TransportError("bad_connection_file", f"'{path}' is not a connection file: {error}.",
                             "Choose the file that the server wrote.") from error


def write_connection(path: Path | str, connection: Connection) -> None:
    """Writes a connection file that only its owner can read; readers see the old file or the whole new one.

    Raises:
        OSError: the folder can't be written.
    """
    data = {"address": connection.address, "server_key": connection.server_key.decode("ascii"),
            "public_key": connection.public_key.decode("ascii"), "secret_key": connection.secret_key.decode("ascii")}
    write_secret(path, json.dumps(data, indent=1))


def write_secret(path: Path | str, text: str) -> None:
    """Writes text to a file of mode 0600, under a temporary name first.

    Raises:
        OSError: the folder can't be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
