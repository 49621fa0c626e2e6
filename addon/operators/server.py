"""Start the server, or show where it is chosen."""

from __future__ import annotations

import bpy

from .. import jobs
from ..preferences import ADDON


class TRACK4D_OT_start_server(bpy.types.Operator):
    bl_idname = "track4d.start_server"
    bl_label = "Start the Server"
    bl_description = "Start this computer's server when it doesn't run, and connect to it"

    def execute(self, context: bpy.types.Context) -> set[str]:
        jobs.attach(context, start=True)
        return {"FINISHED"}


class TRACK4D_OT_open_preferences(bpy.types.Operator):
    bl_idname = "track4d.open_preferences"
    bl_label = "Open the Preferences"
    bl_description = "Show which server Track4D uses"

    def execute(self, _context: bpy.types.Context) -> set[str]:
        return bpy.ops.preferences.addon_show(module=ADDON)


CLASSES = (TRACK4D_OT_start_server, TRACK4D_OT_open_preferences)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
