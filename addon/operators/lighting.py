"""The four-point rig of evaluation sets: put around the selection, baked into vertex colours, written as a set's asset."""

from __future__ import annotations

from pathlib import Path

import bpy
from track4d_protocol import __version__

from .refusal import refusing


def _meshes(context: bpy.types.Context) -> list[bpy.types.Object]:
    return [obj for obj in context.selected_objects if obj.type == "MESH"]


class _OnMeshes:
    """An operator for the selected meshes."""

    @classmethod
    def poll(cls, context: bpy.types.Context) -> bool:
        if context.mode != "OBJECT":
            cls.poll_message_set("Leave edit mode first")  # type: ignore[attr-defined]
            return False
        if not _meshes(context):
            cls.poll_message_set("Select a mesh first")  # type: ignore[attr-defined]
            return False
        return True


class TRACK4D_OT_add_lights(_OnMeshes, bpy.types.Operator):
    bl_idname = "track4d.add_lights"
    bl_label = "Add Lights"
    bl_description = "Put key, fill, back and background light around the selection; earlier ones are replaced"
    bl_options = {"REGISTER", "UNDO"}

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from .. import lighting

        settings = context.scene.track4d
        lighting.add_rig(_meshes(context), lighting.rig_with(**settings.lights.strengths()), settings.front)


class TRACK4D_OT_remove_lights(bpy.types.Operator):
    bl_idname = "track4d.remove_lights"
    bl_label = "Remove Lights"
    bl_description = "Take Track4D's four lights out of the scene"
    bl_options = {"REGISTER", "UNDO"}

    @classmethod
    def poll(cls, _context: bpy.types.Context) -> bool:
        return "Track4D lights" in bpy.data.collections

    def execute(self, _context: bpy.types.Context) -> set[str]:
        from .. import lighting

        lighting.remove_rig()
        return {"FINISHED"}


class TRACK4D_OT_bake_lights(_OnMeshes, bpy.types.Operator):
    bl_idname = "track4d.bake_lights"
    bl_label = "Bake Light"
    bl_description = (
        "Bake all light of the four lights and of the scene into vertex colours of the selected meshes, by Cycles. "
        "Lights that you have edited are used as they are"
    )
    bl_options = {"REGISTER", "UNDO"}

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from .. import lighting

        settings, objects = context.scene.track4d, _meshes(context)
        placed = lighting.ensure_rig(objects, lighting.rig_with(**settings.lights.strengths()), settings.front)
        try:
            lighting.bake(objects, settings.lights.samples)
        finally:
            if placed and not settings.lights.keep_rig:
                lighting.remove_rig()
        self.report({"INFO"}, f"The light is in the colour attribute '{lighting.COLORS}'")


class TRACK4D_OT_write_lit(_OnMeshes, bpy.types.Operator):
    bl_idname = "track4d.write_lit"
    bl_label = "Write to Evaluation Set"
    bl_description = "Write the selected meshes with their baked light as an asset: mesh, static Gaussians and manifest"

    directory: bpy.props.StringProperty(subtype="DIR_PATH", options={"SKIP_SAVE"})

    def invoke(self, context: bpy.types.Context, _event: bpy.types.Event) -> set[str]:
        context.window_manager.fileselect_add(self)
        return {"RUNNING_MODAL"}

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        from .. import bake_lighting, lighting

        settings, objects, selected = context.scene.track4d, _meshes(context), list(context.selected_objects)
        baked, name, source = lighting.baked_with(objects), objects[0].name, Path(bpy.data.filepath)
        manifest = {
            "name": name,
            "prompt": settings.prompt.strip(),
            "source": source.name,
            "licence": "",
            "credit": "",
            "front": settings.front,
            **baked,
            "version": __version__,
            "sha256": {"source": bake_lighting.file_hash(source)} if source.is_file() else {},
        }
        try:
            folder = bake_lighting.write_asset(objects, Path(self.directory) / bpy.path.clean_name(name), manifest)
        finally:
            for obj in context.view_layer.objects:
                obj.select_set(obj in selected)
        self.report({"INFO"}, f"Written to '{folder}'")


CLASSES = (TRACK4D_OT_add_lights, TRACK4D_OT_remove_lights, TRACK4D_OT_bake_lights, TRACK4D_OT_write_lit)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
