"""Animate the selected objects, stop it, and take the animation away again."""

from __future__ import annotations

import bpy
from track4d_protocol.errors import Track4DError

from .. import jobs, marks


class TRACK4D_OT_animate(bpy.types.Operator):
    bl_idname = "track4d.animate"
    bl_label = "Animate"
    bl_description = "Animate the selected meshes as the prompt says; Blender stays free meanwhile"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave edit mode first")
            return False
        if not any(o.type == "MESH" for o in context.selected_objects):
            cls.poll_message_set("Select a mesh first")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        if not context.scene.track4d.prompt.strip():
            self.report({"WARNING"}, 'Say in the prompt what happens, for example "the fox is running"')
            return {"CANCELLED"}
        try:
            jobs.start(context, [o for o in context.selected_objects if o.type == "MESH"])
        except Track4DError as error:
            jobs.complain(error)
            self.report({"WARNING"}, error.message)
            return {"CANCELLED"}
        return {"FINISHED"}


class TRACK4D_OT_cancel(bpy.types.Operator):
    bl_idname = "track4d.cancel"
    bl_label = "Cancel"
    bl_description = "Stop this animation; the scene stays as it is"

    job_id: bpy.props.StringProperty(options={"SKIP_SAVE"})

    def execute(self, _context: bpy.types.Context) -> set[str]:
        jobs.cancel(self.job_id)
        return {"FINISHED"}


class TRACK4D_OT_remove_animation(bpy.types.Operator):
    bl_idname = "track4d.remove_animation"
    bl_label = "Remove Animation"
    bl_description = "Take Track4D's animation off the selected objects, which stand as before"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not any(marks.is_animated(o) for o in context.selected_objects):
            cls.poll_message_set("Select an object that Track4D has animated")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        from ..apply import remove

        try:
            remove([o for o in context.selected_objects if marks.is_animated(o)])
        except Track4DError as error:
            jobs.complain(error)
            self.report({"WARNING"}, error.message)
            return {"CANCELLED"}
        jobs.state.applied = None
        return {"FINISHED"}


class TRACK4D_OT_play(bpy.types.Operator):
    bl_idname = "track4d.play"
    bl_label = "Play"
    bl_description = "Play the animation over and over, by a preview range around it; again to stop"
    bl_options = {"REGISTER", "UNDO"}

    frame_start: bpy.props.IntProperty(options={"SKIP_SAVE"})
    frame_end: bpy.props.IntProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        scene = context.scene
        scene.use_preview_range = True
        scene.frame_preview_start, scene.frame_preview_end = self.frame_start, self.frame_end
        return bpy.ops.screen.animation_play()


CLASSES = (TRACK4D_OT_animate, TRACK4D_OT_cancel, TRACK4D_OT_remove_animation, TRACK4D_OT_play)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
