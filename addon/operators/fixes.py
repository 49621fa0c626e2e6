"""Buttons beside an error that do what it asks for."""

from __future__ import annotations

from pathlib import Path

import bpy

from .. import jobs
from ..preferences import preferences
from ..properties import PRESETS

CONVERTIBLE = {"CURVE", "SURFACE", "META", "FONT", "CURVES", "POINTCLOUD", "GREASEPENCIL", "GPENCIL"}


class TRACK4D_OT_convert_to_mesh(bpy.types.Operator):
    bl_idname = "track4d.convert_to_mesh"
    bl_label = "Convert to Mesh"
    bl_description = "Turn the selected curves, texts and other surfaces into meshes"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if not any(obj.type in CONVERTIBLE for obj in context.selected_objects):
            cls.poll_message_set("No curve, text or other surface is selected")
            return False
        return context.mode == "OBJECT"

    def execute(self, context: bpy.types.Context) -> set[str]:
        context.view_layer.objects.active = next(obj for obj in context.selected_objects if obj.type in CONVERTIBLE)
        jobs.state.problem = None
        return bpy.ops.object.convert(target="MESH")


class TRACK4D_OT_apply_scale(bpy.types.Operator):
    bl_idname = "track4d.apply_scale"
    bl_label = "Apply Scale"
    bl_description = (
        "Give the selected objects a scale of 1; their shape stays as it looks. "
        "Where a scale is zero, the object gets its thickness back first"
    )
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        return context.mode == "OBJECT" and bool(context.selected_objects)

    def execute(self, context: bpy.types.Context) -> set[str]:
        jobs.state.problem = None
        for obj in context.selected_objects:
            while obj is not None:
                unflatten(obj)
                obj = obj.parent
        return bpy.ops.object.transform_apply(location=False, rotation=False, scale=True)


def unflatten(obj: bpy.types.Object) -> None:
    """Gives axes whose scale is zero the mean scale of the others: applied as it is, a zero would flatten the mesh for good."""
    for scale in (obj.scale, obj.delta_scale):
        sizes = [abs(size) for size in scale]
        whole = [size for size in sizes if size > 1e-7 * max(sizes)]
        for axis, size in enumerate(sizes):
            if size not in whole:
                scale[axis] = sum(whole) / len(whole) if whole else 1.0


class TRACK4D_OT_smaller_preset(bpy.types.Operator):
    bl_idname = "track4d.smaller_preset"
    bl_label = "Choose a Smaller Preset"
    bl_description = "Choose the next quality that needs less time and memory"

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.scene.track4d.preset == PRESETS[0][0]:
            cls.poll_message_set("The quality is the smallest already: use a simpler object")
            return False
        return True

    def execute(self, context: bpy.types.Context) -> set[str]:
        names, settings = [item[0] for item in PRESETS], context.scene.track4d
        settings.preset = names[names.index(settings.preset) - 1]
        jobs.state.problem = None
        return {"FINISHED"}


class TRACK4D_OT_open_log(bpy.types.Operator):
    bl_idname = "track4d.open_log"
    bl_label = "Open the Log"
    bl_description = "Show the log of this computer's server"

    def execute(self, context: bpy.types.Context) -> set[str]:
        path = log_path(context)
        if path is None or not path.is_file():
            where = "on the computer of the server" if path is None else f"not at '{path}'"
            self.report({"WARNING"}, f"The log is {where}")
            return {"CANCELLED"}
        return bpy.ops.wm.path_open(filepath=str(path))


def log_path(context: bpy.types.Context) -> Path | None:
    """The log of this computer's server; None when another server is used."""
    from track4d_protocol.keys import default_home
    from track4d_protocol.local import LOG_FILE

    source = preferences(context).source()
    return None if source.connection_file else (source.home or default_home()) / LOG_FILE


CLASSES = (TRACK4D_OT_convert_to_mesh, TRACK4D_OT_apply_scale, TRACK4D_OT_smaller_preset, TRACK4D_OT_open_log)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
