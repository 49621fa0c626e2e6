"""Animate the selected objects, stop it, and take the animation away again."""

from __future__ import annotations

from itertools import count, islice

import bpy
from track4d_protocol.errors import InputError

from .. import jobs, marks, prompts
from ..results import chosen
from .refusal import refusing

VARIATIONS = 3


def start(context: bpy.types.Context, objects: list[bpy.types.Object], variations: int = 1) -> None:
    """Begins an animation with the scene's settings; of several, none has a seed that this prompt has had on the first object.

    Raises:
        InputError: see `jobs.start` and `apply.check_kind`.
    """
    from ..apply import check_kind

    check_kind(context.scene.track4d.output)
    settings = context.scene.track4d
    records = marks.history(objects[0]).values() if variations > 1 and objects else ()
    had = {record["seed"] for record in records if record.get("title") == settings.title()}
    jobs.start(context, objects, list(islice((seed for seed in count(settings.seed) if seed not in had), variations)))


class TRACK4D_OT_animate(bpy.types.Operator):
    bl_idname = "track4d.animate"
    bl_label = "Animate"
    bl_description = "Animate the selected meshes as the prompt says; Blender stays free meanwhile"

    variations: bpy.props.IntProperty(default=1, min=1, max=8, options={"SKIP_SAVE"})

    @classmethod
    def description(cls, _context: bpy.types.Context, properties: bpy.types.OperatorProperties) -> str:
        if properties.variations == 1:
            return cls.bl_description
        return f"{properties.variations} animations of the selected meshes with seeds they haven't had, to choose from"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave edit mode first")
            return False
        if not chosen(context):
            cls.poll_message_set("Select a mesh first")
            return False
        return True

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        settings = context.scene.track4d
        if settings.source == "PROMPT" and not settings.prompt.strip():
            raise InputError("empty_prompt", "The prompt is empty.", 'Say what happens, for example "the fox is running".')
        objects = chosen(context)
        start(context, [obj for obj in objects if obj.type == "MESH"] or objects, self.variations)
        if settings.source == "PROMPT":
            prompts.add(settings.prompt)


class TRACK4D_OT_use_prompt(bpy.types.Operator):
    bl_idname = "track4d.use_prompt"
    bl_label = "Use This Prompt"
    bl_description = "Put this sentence into the prompt"

    prompt: bpy.props.StringProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.scene.track4d.prompt = self.prompt
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
    bl_description = "Take all of Track4D's animations off the selected objects, which stand as before"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not any(marks.is_animated(obj) for obj in chosen(context)):
            cls.poll_message_set("Select an object that Track4D has animated")
            return False
        return True

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from ..apply import remove

        remove([obj for obj in chosen(context) if marks.is_animated(obj)])
        jobs.state.applied = None


class TRACK4D_OT_play(bpy.types.Operator):
    bl_idname = "track4d.play"
    bl_label = "Play"
    bl_description = "Play the animation over and over, by a preview range around it; again to stop"
    bl_options = {"UNDO"}  # there is nothing to adjust afterwards

    frame_start: bpy.props.IntProperty(options={"SKIP_SAVE"})
    frame_end: bpy.props.IntProperty(options={"SKIP_SAVE"})

    def execute(self, context: bpy.types.Context) -> set[str]:
        scene = context.scene
        scene.use_preview_range = True
        scene.frame_preview_start, scene.frame_preview_end = self.frame_start, self.frame_end
        return bpy.ops.screen.animation_play()


CLASSES = (TRACK4D_OT_animate, TRACK4D_OT_use_prompt, TRACK4D_OT_cancel, TRACK4D_OT_remove_animation, TRACK4D_OT_play)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
