"""Long work in slices, so that Blender's window stays alive: a generator does a little at a time, the timer advances it.

Only the main thread may touch `bpy`; what is arithmetic alone goes into a thread beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from typing import Any, TypeVar

SLICE = 0.012  # seconds that work may take at a time, where it can be cut as small as that
Value = TypeVar("Value")


def in_background(function: Callable[..., Value], *values: Any) -> Generator[None, None, Value]:
    """Runs a function that doesn't touch `bpy` in a thread, and pauses until it has ended.

    Raises:
        Exception: what the function raises.
    """
    from concurrent.futures import Future

    outcome: Future[Value] = Future()

    def work() -> None:
        try:
            outcome.set_result(function(*values))
        except Exception as error:  # noqa: BLE001 - raised again where it is waited for
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="track4d work", daemon=True)
    thread.start()
    while thread.is_alive():
        yield
        thread.join(0.001)
    return outcome.result()


def finished(work: Generator[Any, None, Value]) -> Value:
    """Does all of the work in one go; returns what the generator returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value
