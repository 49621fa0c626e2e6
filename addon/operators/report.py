"""The error that the panel shows: put away, or copied with everything that a developer would ask for."""

from __future__ import annotations

import json
import platform

import bpy
from track4d_protocol import PROTOCOL_VERSION, __version__

from .. import jobs


class TRACK4D_OT_dismiss_error(bpy.types.Operator):
    bl_idname = "track4d.dismiss_error"
    bl_label = "Dismiss"
    bl_description = "Put the messages away"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        jobs.state.problem, jobs.state.warnings = None, []
        return {"FINISHED"}


class TRACK4D_OT_copy_report(bpy.types.Operator):
    bl_idname = "track4d.copy_report"
    bl_label = "Copy Report"
    bl_description = "Copy versions, server and the last error to the clipboard, to paste into a bug report"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.window_manager.clipboard = problem_report()
        self.report({"INFO"}, "The report is in the clipboard")
        return {"FINISHED"}


def problem_report() -> str:
    """Versions, server, last error and last result as text; no key and no picture is in it."""
    state = jobs.state
    lines = [
        f"Track4D {__version__}, protocol {PROTOCOL_VERSION}",
        f"Blender {bpy.app.version_string}, Python {platform.python_version()}, {platform.platform()}",
        f"Server: {state.server.value} {json.dumps(state.hello, default=str)}",
    ]
    for title, problem in (("Server error", state.server_problem), ("Last error", state.problem)):
        if problem is not None:
            lines.append(f"{title}: [{problem.code}] {problem.message} {problem.action} {problem.job_id}".rstrip())
    if state.last_report:
        lines.append(f"Last result: {json.dumps(state.last_report, default=str)}")
    return "\n".join(lines)


CLASSES = (TRACK4D_OT_dismiss_error, TRACK4D_OT_copy_report)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
