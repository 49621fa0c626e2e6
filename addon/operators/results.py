"""Results that wait: of jobs that ended while Blender was closed, or whose objects were being edited."""

from __future__ import annotations

import bpy
from track4d_protocol.errors import Track4DError

from .. import jobs
from .animation import refused


class TRACK4D_OT_apply_result(bpy.types.Operator):
    bl_idname = "track4d.apply_result"
    bl_label = "Apply"
    bl_description = "Put this motion onto the objects it was made for"

    job_id: bpy.props.StringProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        try:
            jobs.apply(context, self.job_id)
        except Track4DError as error:
            return refused(self, error)
        return {"FINISHED"}


class TRACK4D_OT_dismiss_result(bpy.types.Operator):
    bl_idname = "track4d.dismiss_result"
    bl_label = "Discard"
    bl_description = "Delete this result from the server without applying it"

    job_id: bpy.props.StringProperty(options={"SKIP_SAVE"})

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, _context: bpy.types.Context) -> set[str]:
        jobs.dismiss(self.job_id)
        return {"FINISHED"}


CLASSES = (TRACK4D_OT_apply_result, TRACK4D_OT_dismiss_result)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
