"""Errors that a user can act on: a stable code, a sentence that names what is wrong, and what to do about it."""

from __future__ import annotations


class Track4DError(Exception):
    """Base of every error that is shown to a user.

    Args:
        code: stable identifier in snake case; documented in docs/errors.md.
        message: one sentence that names the object and the number at fault.
        action: one sentence that says what to do.
    """

    def __init__(self, code: str, message: str, action: str = "") -> None:
        super().__init__(code, message, action)
        self.code, self.message, self.action = code, message, action

    def __str__(self) -> str:
        return f"{self.message} {self.action}".strip() + f" [{self.code}]"

    def to_dict(self) -> dict[str, str]:
        return {"kind": type(self).__name__, "code": self.code, "message": self.message, "action": self.action}


class InputError(Track4DError):
    """The mesh, the prompt, a file or a setting can't be used."""


class TransportError(Track4DError):
    """The server can't be reached, or doesn't speak this version of the protocol."""


class ServerError(Track4DError):
    """The server failed: the worker died, memory ran out, or there is a bug."""


class Cancelled(Track4DError):
    """The user asked for the job to stop."""

    def __init__(self, code: str = "cancelled", message: str = "The job was cancelled.", action: str = "") -> None:
        super().__init__(code, message, action)


_KINDS = {kind.__name__: kind for kind in (InputError, TransportError, ServerError, Cancelled)}


def error_from_dict(data: dict[str, str]) -> Track4DError:
    """The inverse of `Track4DError.to_dict`; an unknown kind becomes a `ServerError`."""
    kind = _KINDS.get(data.get("kind", ""), ServerError)
    return kind(str(data.get("code", "unknown")), str(data.get("message", "")), str(data.get("action", "")))
