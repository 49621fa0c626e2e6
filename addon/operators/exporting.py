"""Write the selected objects with their motion, or their Gaussians, to a file."""

from __future__ import annotations

from pathlib import Path

import bpy

from ..files import WRITABLE, suffix
from .refusal import refusing

FORMATS = [(ending, f"{ending}  {what}", f"Write {ending}: {what}") for ending, what in WRITABLE.items()]


class TRACK4D_OT_export(bpy.types.Operator):
    bl_idname = "track4d.export"
    bl_label = "Export"
    bl_description = "Write the selected objects with the motion that they show, so that every vertex comes back exactly"

    filepath: bpy.props.StringProperty(subtype="FILE_PATH", options={"SKIP_SAVE"})
    form: bpy.props.EnumProperty(name="Format", items=FORMATS)
    morph_normals: bpy.props.BoolProperty(
        name="Morph Normals", description="Normals of the morph targets too, in glTF: files become up to six times as large"
    )

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave edit mode first")
            return False
        if not any(o.type == "MESH" for o in context.selected_objects):
            cls.poll_message_set("Select a mesh or a Gaussian cloud first")
            return False
        return True

    def invoke(self, context: bpy.types.Context, _event: bpy.types.Event) -> set[str]:
        folder = Path(bpy.data.filepath).parent if bpy.data.filepath else Path.home()
        name = bpy.path.clean_name(context.selected_objects[0].name)
        self.filepath = str(folder / f"{name}{self.form}")
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    def check(self, _context: bpy.types.Context) -> bool:
        """The file browser asks after every change: the name ends as the format says."""
        path = Path(self.filepath)
        given = suffix(path)
        if given == self.form:
            return False
        stem = path.name[: -len(given)] if given in WRITABLE else path.name
        self.filepath = str(path.with_name(stem + self.form))
        return True

    def draw(self, _context: bpy.types.Context) -> None:
        self.layout.use_property_split = True
        self.layout.prop(self, "form")
        if self.form in (".glb", ".gltf"):
            self.layout.prop(self, "morph_normals")

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from ..export import export

        objects = [obj for obj in context.selected_objects if obj.type == "MESH"]
        written = export(objects, self.filepath, self.morph_normals)
        several = f" and {len(written) - 1} more" if len(written) > 1 else ""
        self.report({"INFO"}, f"Wrote {written[0].name}{several} to {written[0].parent}")


register, unregister = bpy.utils.register_classes_factory([TRACK4D_OT_export])
