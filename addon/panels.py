"""The sidebar tab "Track4D" of the 3D viewport. Drawing reads `jobs.state` and computes nothing."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import bpy

if TYPE_CHECKING:
    from .jobs import ActiveJob, FinishedJob, Problem, State

SHOWN_RESULTS = 5
STAGES = {  # the server's names of its stages, as a user reads them
    "canonicalise": "Preparing the mesh",
    "generate": "Imagining the motion",
    "fit": "Fitting the motion",
    "appearance": "Fitting the colours",
    "sample": "Sampling frames",
    "cancelling": "Cancelling",
}
FIXES = {  # error code: operator, button
    "server_not_running": ("track4d.start_server", "Start the Server"),
    "server_unreachable": ("track4d.start_server", "Start the Server"),
    "server_python_missing": ("track4d.open_preferences", "Open the Preferences"),
    "server_lost": ("track4d.start_server", "Start the Server"),
    "server_not_started": ("track4d.open_preferences", "Open the Preferences"),
    "home_unwritable": ("track4d.open_preferences", "Open the Preferences"),
    "no_connection_file": ("track4d.open_preferences", "Open the Preferences"),
    "bad_connection_file": ("track4d.open_preferences", "Open the Preferences"),
    "not_authorised": ("track4d.open_preferences", "Open the Preferences"),
    "offline": ("track4d.open_preferences", "Open the Preferences"),
}


class VIEW3D_PT_track4d(bpy.types.Panel):
    bl_label = "Track4D"
    bl_category = "Track4D"
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"

    def draw(self, context: bpy.types.Context) -> None:
        from . import jobs

        jobs.wake(context)
        layout, settings, state = self.layout, context.scene.track4d, jobs.state
        draw_server(layout, state, context.region.width)
        column = layout.column()
        column.prop(settings, "prompt", text="", placeholder="the fox is running")
        button = column.row()
        button.scale_y = 1.4
        button.operator("track4d.animate", icon="PLAY")
        for job in state.active.values():
            _draw_job(layout, job)
        if state.problem is not None:
            draw_problem(layout.box(), state.problem, context.region.width, dismissable=True)
        for warning in state.warnings:
            draw_problem(layout.box(), warning, context.region.width, icon="INFO")
        if state.finished:
            _draw_results(layout, list(state.finished.values()))


class VIEW3D_PT_track4d_advanced(bpy.types.Panel):
    bl_label = "Settings"
    bl_category = "Track4D"
    bl_parent_id = "VIEW3D_PT_track4d"
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"
    bl_options = {"DEFAULT_CLOSED"}

    def draw(self, context: bpy.types.Context) -> None:
        layout, settings = self.layout, context.scene.track4d
        layout.use_property_split = True
        layout.use_property_decorate = False
        for name in ("front", "preset", "frames", "seed"):
            layout.prop(settings, name)
        layout.operator("track4d.remove_animation", icon="TRASH")


def draw_server(layout: bpy.types.UILayout, state: State, width: int = 600) -> None:
    """One line about the server, or what keeps it away and the button that helps."""
    text, icon = {
        "unknown": ("Looking for the server", "SORTTIME"),
        "connecting": ("Looking for the server", "SORTTIME"),
        "starting": ("Starting the server", "SORTTIME"),
        "connected": (f"Connected: {(state.hello or {}).get('device', 'server')}", "CHECKMARK"),
        "absent": ("No server", "UNLINKED"),
        "lost": ("Lost the server, looking for it again", "UNLINKED"),
    }[state.server.value]
    layout.label(text=text, icon=icon)
    if state.server_problem is not None:
        draw_problem(layout.box(), state.server_problem, width)


def draw_problem(
    layout: bpy.types.UILayout, problem: Problem, width: int, icon: str = "ERROR", dismissable: bool = False
) -> None:
    """What is wrong, what to do, and a button that does it where there is one."""
    column = layout.column(align=True)
    for number, line in enumerate(wrap(f"{problem.message} {problem.action}", width)):
        column.label(text=line, icon=icon if number == 0 else "BLANK1")
    row = layout.row(align=True)
    if problem.code in FIXES:
        operator, text = FIXES[problem.code]
        row.operator(operator, text=text)
    if dismissable:
        row.operator("track4d.copy_report", icon="COPYDOWN")
        row.operator("track4d.dismiss_error", icon="X")


def _draw_job(layout: bpy.types.UILayout, job: ActiveJob) -> None:
    from . import previews

    box = layout.box()
    row = box.row()
    row.label(text=f"{job.objects[0]}: {job.prompt}" if job.objects else job.prompt, icon="ARMATURE_DATA")
    row.operator("track4d.cancel", text="", icon="X").job_id = job.id
    box.progress(factor=job.step / job.total if job.total else 0.0, text=job_text(job))
    picture = previews.icon(job.id)
    if picture:
        box.template_icon(picture, scale=8)
    box.operator("track4d.cancel", icon="CANCEL").job_id = job.id


def _draw_results(layout: bpy.types.UILayout, results: list[FinishedJob]) -> None:
    box = layout.box()
    box.label(text="Finished, not applied", icon="CHECKMARK")
    for job in results[:SHOWN_RESULTS]:
        row = box.row(align=True)
        row.label(text=f"{', '.join(job.objects)}: {job.prompt}")
        row.operator("track4d.apply_result", text="Apply").job_id = job.id
        row.operator("track4d.dismiss_result", text="", icon="X").job_id = job.id
    if len(results) > SHOWN_RESULTS:
        box.label(text=f"and {len(results) - SHOWN_RESULTS} more")


def job_text(job: ActiveJob) -> str:
    """The words inside the progress bar, for instance "Fitting the motion, 2 min left"."""
    text: str = job.phase.value
    if job.phase.name == "QUEUED" and job.queue_position > 1:
        return f"{text}, {job.queue_position - 1} before it"
    if job.phase.name == "RUNNING" and job.stage:
        text = STAGES.get(job.stage, job.stage.capitalize())
    if job.seconds_left is None:
        return text
    return f"{text}, {duration(job.seconds_left)} left"


def duration(seconds: float) -> str:
    """A rough time for people: "40 s", "3 min", "1.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def wrap(text: str, width: int) -> list[str]:
    """Lines of a label that fit a region of `width` pixels; Blender's labels don't wrap."""
    scale = bpy.context.preferences.system.ui_scale
    return textwrap.wrap(text.strip(), max(16, int((width / scale - 50) / 6.5)))


CLASSES = (VIEW3D_PT_track4d, VIEW3D_PT_track4d_advanced)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
