"""The sidebar tab "Track4D" of the 3D viewport. Drawing reads `jobs.state` and computes nothing."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import bpy

from . import marks

if TYPE_CHECKING:
    from .jobs import ActiveJob, FinishedJob, Problem, State

SHOWN_RESULTS = 5
STAGES = {  # the server's names of its stages, as a user reads them
    "canonicalise": "Preparing the mesh",
    "generate": "Imagining the motion",
    "fit": "Fitting the motion",
    "refine": "Refining the motion",
    "appearance": "Fitting the colours",
    "sample": "Sampling frames",
    "cancelling": "Cancelling",
}
START = ("track4d.start_server", "Start the Server", {})
CHOOSE = ("track4d.open_preferences", "Open the Preferences", {})
FIXES: dict[str, tuple[str, str, dict[str, Any]]] = {  # error code: operator, button, properties
    "server_not_running": START,
    "server_unreachable": START,
    "server_lost": START,
    "server_python_missing": CHOOSE,
    "server_not_started": CHOOSE,
    "home_unwritable": CHOOSE,
    "no_connection_file": CHOOSE,
    "bad_connection_file": CHOOSE,
    "not_authorised": CHOOSE,
    "offline": CHOOSE,
    "in_edit_mode": ("object.mode_set", "Leave Edit Mode", {"mode": "OBJECT"}),
    "linked_data": ("object.make_local", "Make Local", {"type": "SELECT_OBDATA"}),
    "shared_mesh": ("object.make_single_user", "Make Single User", {"object": True, "obdata": True}),
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
            _draw_job(layout, job, context.region.width)
        if state.problem is not None:
            draw_problem(layout.box(), state.problem, context.region.width, dismissable=True)
        if state.applied is not None and marks.is_animated(bpy.data.objects.get(state.applied["objects"][0])):
            _draw_applied(layout, state.applied)
        if state.warnings:
            _draw_warnings(layout, state.warnings, context.region.width)
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


def draw_server(layout: bpy.types.UILayout, state: State, width: int = 600) -> None:
    """One line about the server, or what keeps it away and the button that helps."""
    hello = state.hello or {}
    device = hello.get("device", "")
    connected = {"failed": ("The server can't work", "ERROR"), "starting": ("The server warms up", "SORTTIME")}
    text, icon = {
        "unknown": ("Looking for the server", "SORTTIME"),
        "connecting": ("Looking for the server", "SORTTIME"),
        "starting": ("Starting the server", "SORTTIME"),
        "connected": connected.get(hello.get("worker", ""), (f"Server on {device}" if device else "Server ready", "CHECKMARK")),
        "absent": ("No server", "UNLINKED"),
        "lost": ("Lost the server, looking for it", "UNLINKED"),
    }[state.server.value]
    layout.label(text=text, icon=icon)
    if state.server_problem is not None:
        draw_problem(layout.box(), state.server_problem, width)


def draw_problem(layout: bpy.types.UILayout, problem: Problem, width: int, dismissable: bool = False) -> None:
    """What is wrong, what to do, and a button that does it where there is one."""
    _draw_text(layout, f"{problem.message} {problem.action}", width, "ERROR")
    if problem.code in FIXES:
        operator, text, values = FIXES[problem.code]
        button = layout.operator(operator, text=text)
        for name, value in values.items():
            setattr(button, name, value)
    if dismissable:
        row = layout.row(align=True)
        row.operator("track4d.copy_report", icon="COPYDOWN")
        row.operator("track4d.dismiss_error", icon="X")


def _draw_warnings(layout: bpy.types.UILayout, warnings: list[Problem], width: int) -> None:
    box = layout.box()
    for warning in warnings:
        _draw_text(box, f"{warning.message} {warning.action}", width, "INFO")
    box.operator("track4d.dismiss_error", icon="X")


def _draw_text(layout: bpy.types.UILayout, text: str, width: int, icon: str) -> None:
    column = layout.column(align=True)
    column.scale_y = 0.8
    for number, line in enumerate(wrap(text, width)):
        column.label(text=line, icon=icon if number == 0 else "BLANK1")


def _draw_job(layout: bpy.types.UILayout, job: ActiveJob, width: int) -> None:
    from . import previews

    box = layout.box()
    box.label(text=f"{job.objects[0]}: {job.prompt}" if job.objects else job.prompt, icon="ARMATURE_DATA")
    box.progress(factor=job.step / job.total if job.total else 0.0, text=job_text(job))
    picture = previews.icon(job.id)
    if picture:
        units = width / bpy.context.preferences.system.ui_scale / 20  # a unit is the height of a button
        box.template_icon(picture, scale=max(5.0, min(16.0, units - 3.5)))
    box.operator("track4d.cancel", icon="CANCEL").job_id = job.id


def _draw_applied(layout: bpy.types.UILayout, applied: dict[str, Any]) -> None:
    box = layout.box()
    frames = f"{applied['frame_start']:g} to {applied['frame_end']:g}"
    box.label(text=f"{applied['objects'][0]} moves, frames {frames}", icon="CHECKMARK")
    row = box.row(align=True)
    play = row.operator("track4d.play", icon="PLAY")
    play.frame_start, play.frame_end = int(applied["frame_start"]), int(applied["frame_end"])
    row.operator("track4d.remove_animation", text="Remove", icon="TRASH")


def _draw_results(layout: bpy.types.UILayout, results: list[FinishedJob]) -> None:
    here = [job for job in results if all(name in bpy.data.objects for name in job.objects)][:SHOWN_RESULTS]
    box = layout.box()
    box.label(text="Finished, not applied", icon="CHECKMARK")
    for job in here:
        row = box.row(align=True)
        row.label(text=f"{', '.join(job.objects)}: {job.prompt}")
        row.operator("track4d.apply_result", text="Apply").job_id = job.id
        row.operator("track4d.dismiss_result", text="", icon="X").job_id = job.id
    if len(results) > len(here):
        box.label(text=f"{len(results) - len(here)} {'more' if here else 'of other files'}")


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
