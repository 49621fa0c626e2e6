"""What an operator does when it is refused: the error stands in the panel, and shortly in the status bar."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import bpy
from track4d_protocol.errors import Track4DError

from .. import jobs

Execute = Callable[[Any, bpy.types.Context], "set[str] | None"]


def refusing(execute: Execute) -> Callable[[Any, bpy.types.Context], set[str]]:
    """For an operator's `execute`: it has finished unless it says otherwise or raises a `Track4DError`, which is shown."""

    @wraps(execute)
    def shown(self: bpy.types.Operator, context: bpy.types.Context) -> set[str]:
        try:
            return execute(self, context) or {"FINISHED"}
        except Track4DError as error:
            jobs.complain(error)
            self.report({"WARNING"}, error.message)
            return {"CANCELLED"}

    return shown
