"""The history of an object: show one of its results, use its settings, do it again, put it in otherwise, remove it."""

from __future__ import annotations

from typing import Any

import bpy

from .. import jobs, marks, results
from ..properties import OUTPUTS
from .animation import start
from .refusal import refusing


class _TakeOperator:
    """An operator for one take of the active object."""

    take: bpy.props.StringProperty(options={"SKIP_SAVE"})

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave edit mode first")  # type: ignore[attr-defined]
            return False
        if not marks.history(results.subject(context.object)):
            cls.poll_message_set("Select an object that Track4D has animated")  # type: ignore[attr-defined]
            return False
        return True

    def record(self, context: bpy.types.Context) -> dict[str, Any]:
        """What the active object remembers of the take; the one that is shown, where none was named."""
        obj = results.subject(context.object)
        self.take = self.take or results.shown_take(obj)
        return marks.history(obj)[self.take]

    def owners(self, context: bpy.types.Context) -> list[bpy.types.Object]:
        """The active object, and what was animated together with it."""
        self.record(context)
        return results.owners(results.subject(context.object), self.take)


class TRACK4D_OT_show_take(_TakeOperator, bpy.types.Operator):
    bl_idname = "track4d.show_take"
    bl_label = "Show This Result"
    bl_description = "Let this result move the object; the others stay in the list"
    bl_options = {"REGISTER", "UNDO"}

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from .. import apply

        apply.show(self.owners(context), self.take)


class TRACK4D_OT_remove_take(_TakeOperator, bpy.types.Operator):
    bl_idname = "track4d.remove_take"
    bl_label = "Remove This Result"
    bl_description = "Take this result off the object; the others stay"
    bl_options = {"REGISTER", "UNDO"}

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from .. import apply

        owners = self.owners(context)
        apply.remove(owners, self.take)
        for obj in owners:
            marks.forget(obj, self.take)  # also where the user has removed the motion himself
        jobs.state.applied = None


class TRACK4D_OT_use_settings(_TakeOperator, bpy.types.Operator):
    bl_idname = "track4d.use_settings"
    bl_label = "Use These Settings"
    bl_description = "Put the prompt, the seed and all settings of this result into the panel"
    bl_options = {"REGISTER", "UNDO"}

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.scene.track4d.use(self.record(context).get("settings", {}))
        return {"FINISHED"}


class TRACK4D_OT_again(_TakeOperator, bpy.types.Operator):
    bl_idname = "track4d.again"
    bl_label = "Again with Another Seed"
    bl_description = "Animate with the settings of this result, and a seed that it hasn't had yet"

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        record, settings = self.record(context), context.scene.track4d
        settings.use(record.get("settings", {}))
        running = [{"title": job.prompt, "seed": job.order.settings.get("seed", 0)} for job in jobs.state.active.values()]
        settings.seed = results.next_seed([*marks.history(results.subject(context.object)).values(), *running], record)
        start(context, self.owners(context))


class TRACK4D_OT_output_as(_TakeOperator, bpy.types.Operator):
    bl_idname = "track4d.output_as"
    bl_label = "Output As"
    bl_description = "Fetch this result once more and put it into the scene in another form"

    output: bpy.props.EnumProperty(name="Output", items=OUTPUTS)

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from ..apply import check_kind

        record = self.record(context)
        order = jobs.Order(record.get("settings", {}) | {"output": self.output}, record.get("batch", ""))
        check_kind(self.output)
        jobs.fetch_again(context, self.take, self.owners(context), order)


CLASSES = (TRACK4D_OT_show_take, TRACK4D_OT_remove_take, TRACK4D_OT_use_settings, TRACK4D_OT_again, TRACK4D_OT_output_as)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
