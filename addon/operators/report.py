"""The error that the panel shows: put away, or copied with everything that a developer would ask for."""

from __future__ import annotations

import json
import platform

import bpy
from track4d_protocol import PROTOCOL_VERSION, __version__

from .. import jobs
from .fixes import log_path

LOG_LINES = 40


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
    bl_description = "Copy versions, device, settings, the last error and the end of the log, to paste into a bug report"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.window_manager.clipboard = problem_report(context)
        self.report({"INFO"}, "The report is in the clipboard")
        return {"FINISHED"}


def problem_report(context: bpy.types.Context) -> str:
    """Versions, device, settings, last error, last result and the end of the log as text; no key and no picture is in it."""
    state, scene = jobs.state, context.scene
    device = (state.hello or {}).get("device", "unknown")
    lines = [
        f"Track4D {__version__}, protocol {PROTOCOL_VERSION}",
        f"Blender {bpy.app.version_string}, Python {platform.python_version()}, {platform.platform()}",
        f"Device: {device}",
        f"Server: {state.server.value} {json.dumps(state.hello, default=str)}",
        f"Settings: {json.dumps(scene.track4d.to_dict())}",
        f"Scene: {scene.render.fps / scene.render.fps_base:g} frames per second, frames {scene.frame_start} to {scene.frame_end}",
    ]
    for title, problem in (("Server error", state.server_problem), ("Last error", state.problem)):
        if problem is not None:
            lines.append(f"{title}: [{problem.code}] {problem.message} {problem.action} {problem.job_id}".rstrip())
    lines += [f"Warning: [{warning.code}] {warning.message}" for warning in state.warnings]
    if state.last_report:
        lines.append(f"Last result: {json.dumps(state.last_report, default=str)}")
    return "\n".join([*lines, "Log:", *_log_tail(context)])


def _log_tail(context: bpy.types.Context) -> list[str]:
    path = log_path(context)
    if path is None:
        return ["on the computer of the server"]
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 200 * LOG_LINES))
            return file.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError as error:
        return [f"can't be read: {error.strerror}"]


CLASSES = (TRACK4D_OT_dismiss_error, TRACK4D_OT_copy_report)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
