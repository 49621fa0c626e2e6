"""The sidebar tab "Track4D" of the 3D viewport. Drawing reads `jobs.state` and computes nothing."""

from __future__ import annotations

import textwrap
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import bpy

from . import marks, prompts
from .properties import SIDES

if TYPE_CHECKING:
    from .properties import Track4DSettings
    from .state import ActiveJob, FinishedJob, Problem, State

SHOWN_RESULTS = 5
SHOWN_TAKES = 8
STAGES = {  # the server's names of its stages, as a user reads them
    "canonicalise": "Preparing the mesh",
    "generate": "Imagining the motion",
    "fit": "Fitting the motion",
    "refine": "Refining the motion",
    "appearance": "Fitting the colours",
    "sample": "Sampling frames",
    "cancelling": "Cancelling",
}
Fix = tuple[str, str, dict[str, Any]]  # operator, button, properties
START: Fix = ("track4d.start_server", "Start the Server", {})
CHOOSE: Fix = ("track4d.open_preferences", "Open the Preferences", {})
CONVERT: Fix = ("track4d.convert_to_mesh", "Convert to Mesh", {})
SMALLER: Fix = ("track4d.smaller_preset", "Choose a Smaller Preset", {})
SAVE: Fix = ("wm.save_mainfile", "Save the File", {})
SINGLE: Fix = ("object.make_single_user", "Make Single User", {"object": True, "obdata": True})
FIXES: dict[str, Fix] = {  # by error code
    "server_not_running": START,
    "server_unreachable": START,
    "server_lost": START,
    "server_python_missing": ("track4d.set_up_server", "Set Up Local Server", {}),
    "server_not_started": CHOOSE,
    "home_unwritable": CHOOSE,
    "no_connection_file": CHOOSE,
    "bad_connection_file": CHOOSE,
    "not_authorised": CHOOSE,
    "offline": CHOOSE,
    "in_edit_mode": ("object.mode_set", "Leave Edit Mode", {"mode": "OBJECT"}),
    "linked_data": ("object.make_local", "Make Local", {"type": "SELECT_OBDATA"}),
    "shared_mesh": SINGLE,
    "flat_transform": ("track4d.apply_scale", "Apply Scale", {}),
    "wrong_object_type": CONVERT,
    "no_mesh_selected": CONVERT,
    "out_of_memory": SMALLER,
    "too_little_memory": SMALLER,
    "worker_died": SMALLER,
    "cloud_too_large": SMALLER,
    "too_large": SMALLER,
    "unsaved_file": SAVE,
    "not_baked": ("track4d.bake_lights", "Bake Light", {}),
}
WITH_LOG = {"worker_died", "worker_unusable", "internal_error", "server_not_started", "client_failed", "disk_full", "bad_result"}


class _Tab:
    """Where the panels are."""

    bl_category = "Track4D"
    bl_space_type = "VIEW_3D"
    bl_region_type = "UI"


class _ClosedPart(_Tab):
    """A part of the tab that is closed at first."""

    bl_parent_id = "VIEW3D_PT_track4d"
    bl_options = {"DEFAULT_CLOSED"}


class VIEW3D_PT_track4d(_Tab, bpy.types.Panel):
    bl_label = "Track4D"

    def draw(self, context: bpy.types.Context) -> None:
        from . import jobs

        jobs.wake(context)
        draw_main(self.layout, context, jobs.state)


class VIEW3D_PT_track4d_settings(_ClosedPart, bpy.types.Panel):
    bl_label = "Settings"

    def draw(self, context: bpy.types.Context) -> None:
        draw_settings(self.layout, context)


class VIEW3D_PT_track4d_export(_ClosedPart, bpy.types.Panel):
    bl_label = "Export"

    def draw(self, _context: bpy.types.Context) -> None:
        self.layout.operator_context = "INVOKE_DEFAULT"
        self.layout.operator_menu_enum("track4d.export", "form", text="Export As", icon="EXPORT")


class VIEW3D_PT_track4d_lights(_ClosedPart, bpy.types.Panel):
    bl_label = "Baked Light"

    def draw(self, context: bpy.types.Context) -> None:
        draw_lights(self.layout, context)


class VIEW3D_MT_track4d_prompts(bpy.types.Menu):
    bl_label = "Recent Prompts"

    def draw(self, _context: bpy.types.Context) -> None:
        for prompt in prompts.recent():
            self.layout.operator("track4d.use_prompt", text=prompt, translate=False).prompt = prompt
        if not prompts.recent():
            self.layout.label(text="No prompts yet")


def draw_main(layout: bpy.types.UILayout, context: bpy.types.Context, state: State) -> None:
    """The tab without its closed parts."""
    settings, width = context.scene.track4d, context.region.width
    draw_server(layout, state, width)
    column = layout.column()
    _draw_source(column, settings)
    row = column.split(factor=0.6, align=True)
    row.scale_y = 1.4
    row.operator("track4d.animate", icon="PLAY").variations = 1
    row.operator("track4d.animate", text="3 Variations").variations = 3
    for job in state.active.values():
        _draw_job(layout, job, width, several=len(state.active) > 1)
    if state.problem is not None:
        draw_problem(layout.box(), state.problem, width, dismissable=True)
    _draw_history(layout, context.object, width, state.playing)
    if state.warnings:
        _draw_warnings(layout, state.warnings, width)
    if state.finished:
        _draw_results(layout, list(state.finished.values()))


def _draw_source(layout: bpy.types.UILayout, settings: Track4DSettings) -> None:
    if settings.source == "PROMPT":
        row = layout.row(align=True)
        row.prop(settings, "prompt", text="", placeholder="the fox is running")
        row.menu("VIEW3D_MT_track4d_prompts", text="", icon="DOWNARROW_HLT")
    elif settings.source == "VIDEO":
        column = layout.column(align=True)
        for name in SIDES.values():
            column.prop(settings, name)
    else:
        layout.prop(settings, "source_object", text="Moves As")


def draw_settings(layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
    """Everything about the next animation but its prompt."""
    settings, scene, obj = context.scene.track4d, context.scene, context.object
    layout.use_property_split = True
    layout.use_property_decorate = False
    layout.prop(settings, "source")
    if settings.source == "PROMPT":
        layout.prop(settings, "model")
    for name in ("front", "preset", "output"):
        layout.prop(settings, name)
    if settings.output in ("gaussian_cloud", "all"):
        layout.prop(settings, "cloud_colors")
    layout.prop(settings, "seed")
    column = layout.column(align=True)
    column.prop(settings, "frames")
    column.prop(scene.render, "fps")
    rate = scene.render.fps / scene.render.fps_base
    row = column.split(factor=0.4)
    row.label()
    row.label(text=f"{settings.frames / rate:.2f} s from frame {scene.frame_start}")
    for name in ("strength", "loop", "keep_root"):
        layout.prop(settings, name)
    if obj is not None and obj.type == "MESH":
        layout.prop_search(settings, "pin_group", obj, "vertex_groups")
    else:
        layout.prop(settings, "pin_group")


def draw_lights(layout: bpy.types.UILayout, context: bpy.types.Context) -> None:
    """The rig of evaluation sets and its bake."""
    lights = context.scene.track4d.lights
    layout.use_property_split = True
    layout.use_property_decorate = False
    column = layout.column(align=True)
    for name in ("key", "fill", "back", "background"):
        column.prop(lights, name)
    row = layout.row(align=True)
    row.operator("track4d.add_lights", icon="LIGHT_AREA")
    row.operator("track4d.remove_lights", text="", icon="X")
    layout.prop(lights, "samples")
    layout.prop(lights, "keep_rig")
    layout.operator("track4d.bake_lights", icon="RENDER_STILL")
    layout.operator("track4d.write_lit", icon="EXPORT")


def draw_server(layout: bpy.types.UILayout, state: State, width: int) -> None:
    """What is known of the server, or what keeps it away and the button that helps."""
    from . import jobs

    column = layout.column(align=True)
    for text, icon in jobs.status(state):
        for number, line in enumerate(wrap(text, width)):
            column.label(text=line, icon=icon if number == 0 else "BLANK1", translate=False)
    if state.setup.state in ("interrupted", "failed"):
        box = layout.box()
        draw_text(box, state.setup.text, width, "ERROR")
        box.operator("track4d.set_up_server", text="Go On Setting Up")
    if state.server_problem is not None:
        draw_problem(layout.box(), state.server_problem, width)


def draw_problem(layout: bpy.types.UILayout, problem: Problem, width: int, dismissable: bool = False) -> None:
    """What is wrong, what to do, its code, and a button that does it where there is one."""
    draw_text(layout, f"{problem.message} {problem.action} [{problem.code}]", width, "ERROR")
    if problem.code in FIXES:
        operator, text, values = FIXES[problem.code]
        button = layout.operator(operator, text=text)
        for name, value in values.items():
            setattr(button, name, value)
    if problem.code == "server_python_missing":
        layout.operator("track4d.use_existing_server")
    if problem.code in WITH_LOG:
        layout.operator("track4d.open_log", icon="TEXT")
    if dismissable:
        row = layout.row(align=True)
        row.operator("track4d.copy_report", icon="COPYDOWN")
        row.operator("track4d.dismiss_error", icon="X")


def _draw_warnings(layout: bpy.types.UILayout, warnings: list[Problem], width: int) -> None:
    box = layout.box()
    for warning in warnings:
        draw_text(box, f"{warning.message} {warning.action}", width, "INFO")
    box.operator("track4d.dismiss_error", icon="X")


def draw_text(layout: bpy.types.UILayout, text: str, width: int, icon: str) -> None:
    column = layout.column(align=True)
    column.scale_y = 0.8
    for number, line in enumerate(wrap(text, width)):
        column.label(text=line, icon=icon if number == 0 else "BLANK1")


def _draw_job(layout: bpy.types.UILayout, job: ActiveJob, width: int, several: bool) -> None:
    from . import previews

    box = layout.box()
    text = f"{job.objects[0]}: {job.prompt}" if job.objects else job.prompt
    seed = job.order.settings.get("seed", 0)
    draw_text(box, f"{text}, seed {seed}" if seed or several else text, width, "ARMATURE_DATA")
    box.progress(factor=job.step / job.total if job.total else 0.0, text=job_text(job))
    picture = previews.icon(job.id)
    if picture:
        units = width / _scale() / 20  # a unit is the height of a button
        box.template_icon(picture, scale=max(5.0, min(16.0, units - 3.5)))
    box.operator("track4d.cancel", icon="CANCEL").job_id = job.id


def _draw_history(layout: bpy.types.UILayout, obj: bpy.types.Object | None, width: int, playing: bool) -> None:
    """The active object's results: which one is shown, and what can be done with it."""
    from .results import shown_take, subject

    obj = subject(obj)
    records = marks.history(obj)
    if obj is None or not records:
        return
    shown = shown_take(obj)
    box = layout.box()
    record = records.get(shown)
    if record and "frames" in record:
        first, last = record["frames"]
        box.label(text=f"{obj.name} moves, frames {first:g} to {last:g}", icon="CHECKMARK")
        row = box.row(align=True)
        play = row.operator("track4d.play", text="Stop" if playing else "Play", icon="PAUSE" if playing else "PLAY")
        play.frame_start, play.frame_end = int(first), int(-(-last // 1))
        row.operator("track4d.remove_animation", text="Remove", icon="TRASH")
    cloudy = record is not None and record.get("settings", {}).get("output") in ("gaussian_cloud", "all")
    if cloudy or obj.hide_viewport or obj.hide_render:
        row = box.row(align=True)
        row.label(text="The mesh in the cloud" if cloudy else "The mesh is hidden")
        for name in ("hide_viewport", "hide_render"):
            row.prop(obj, name, text="")
    column = box.column(align=True)
    newest = list(records.items())[: -SHOWN_TAKES - 1 : -1]
    for take, about in newest:
        row = column.row(align=True)
        text = f"seed {about.get('seed', 0)}: {about.get('title') or about.get('prompt', '')}"  # the seed first: prompts are cut
        icon = "RADIOBUT_ON" if take == shown else "RADIOBUT_OFF"
        row.operator("track4d.show_take", text=text, icon=icon, emboss=take == shown).take = take
        row.operator("track4d.remove_take", text="", icon="X").take = take
    if len(records) > len(newest):
        column.label(text=f"{len(records) - len(newest)} older")
    if record is None:
        return
    details = [record.get("model", ""), record.get("settings", {}).get("preset", ""), _day(record.get("made", 0.0))]
    draw_text(box, ", ".join(filter(None, details)), width, "INFO")
    for operator, icon in (("track4d.use_settings", "COPYDOWN"), ("track4d.again", "FILE_REFRESH")):
        box.operator(operator, icon=icon).take = shown
    box.operator_menu_enum("track4d.output_as", "output", icon="OUTPUT")


@lru_cache(maxsize=64)
def _day(seconds: float) -> str:
    return time.strftime("%d %b %H:%M", time.localtime(seconds)) if seconds else ""


def _draw_results(layout: bpy.types.UILayout, results: list[FinishedJob]) -> None:
    here = [job for job in results if all(name in bpy.data.objects for name in job.objects)][:SHOWN_RESULTS]
    box = layout.box()
    away = sum(job.away for job in here)
    box.label(text=f"{away} finished while you were away" if away else "Finished, not applied", icon="CHECKMARK")
    for job in here:
        row = box.row(align=True).split(factor=0.65, align=True)
        row.label(text=f"{', '.join(job.objects)}: {job.prompt}")
        row = row.row(align=True)
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
    if job.phase.name in ("RUNNING", "CAPTURING") and job.total > 1:
        text += f", {job.step} of {job.total}"
    if job.seconds_left is None:
        return text
    return f"{text}, {duration(job.seconds_left)} left"


def duration(seconds: float) -> str:
    """A rough time for people: "40 s", "3 min", "1.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def wrap(text: str, width: int) -> tuple[str, ...]:
    """Lines of a label that fit a region of `width` pixels; Blender's labels don't wrap."""
    return _wrap(text.strip(), max(16, int((width / _scale() - 50) / 6.5)))


def _scale() -> float:
    return bpy.context.preferences.system.ui_scale or 1.0  # 0 without a window


@lru_cache(maxsize=32)
def _wrap(text: str, letters: int) -> tuple[str, ...]:
    return tuple(textwrap.wrap(text, letters))


CLASSES = (
    VIEW3D_MT_track4d_prompts,
    VIEW3D_PT_track4d,
    VIEW3D_PT_track4d_settings,
    VIEW3D_PT_track4d_export,
    VIEW3D_PT_track4d_lights,
)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
