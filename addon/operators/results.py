"""Results that wait: of jobs that ended while Blender was closed, or whose objects were being edited."""

from __future__ import annotations

import bpy

from .. import jobs
from .refusal import refusing


class TRACK4D_OT_apply_result(bpy.types.Operator):
    bl_idname = "track4d.apply_result"
    bl_label = "Apply"
    bl_description = "Put this motion onto the objects it was made for"

    job_id: bpy.props.StringProperty(options={"SKIP_SAVE"})

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        jobs.apply(context, self.job_id)


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


register, unregister = bpy.utils.register_classes_factory(CLASSES)
