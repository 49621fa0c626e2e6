"""First run: set up a server on this computer, take that back, or use a server that runs elsewhere."""

from __future__ import annotations

import bpy

from .. import jobs, local_setup
from ..preferences import ADDON, preferences
from .refusal import refusing


class TRACK4D_OT_set_up_server(bpy.types.Operator):
    bl_idname = "track4d.set_up_server"
    bl_label = "Set Up Local Server"
    bl_description = "Make a Python environment for the server in its own folder and install the server there, about 5 GB"

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        chosen = preferences(context)
        _begin(context, "install", bpy.path.abspath(chosen.setup_python), chosen.setup_package.strip())


class TRACK4D_OT_remove_setup(bpy.types.Operator):
    bl_idname = "track4d.remove_setup"
    bl_label = "Remove"
    bl_description = "Stop the server and delete the environment that was set up for it; jobs and results stay"

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    @refusing
    def execute(self, context: bpy.types.Context) -> None:
        _begin(context, "remove")


class TRACK4D_OT_stop_setup(bpy.types.Operator):
    bl_idname = "track4d.stop_setup"
    bl_label = "Stop"
    bl_description = "Stop the set-up; it can go on later"

    def execute(self, context: bpy.types.Context) -> set[str]:
        local_setup.stop(preferences(context).server_home())
        jobs.attach(context)
        return {"FINISHED"}


class TRACK4D_OT_open_setup_log(bpy.types.Operator):
    bl_idname = "track4d.open_setup_log"
    bl_label = "Log"
    bl_description = "Open what the set-up said"

    def execute(self, context: bpy.types.Context) -> set[str]:
        log = preferences(context).server_home() / local_setup.LOG
        return bpy.ops.wm.path_open(filepath=str(log)) if log.exists() else {"CANCELLED"}


class TRACK4D_OT_use_existing_server(bpy.types.Operator):
    bl_idname = "track4d.use_existing_server"
    bl_label = "Use an Existing Server"
    bl_description = "Use a server that somebody runs: choose its address and its connection file, which holds the keys"

    def execute(self, context: bpy.types.Context) -> set[str]:
        preferences(context).server = "FILE"
        return {"FINISHED"} if bpy.app.background else bpy.ops.preferences.addon_show(module=ADDON)


def _begin(context: bpy.types.Context, action: str, python: str = "", package: str = "") -> None:
    local_setup.start(preferences(context).server_home(), action, python, package, online=bpy.app.online_access)
    jobs.attach(context)


CLASSES = (
    TRACK4D_OT_set_up_server,
    TRACK4D_OT_remove_setup,
    TRACK4D_OT_stop_setup,
    TRACK4D_OT_open_setup_log,
    TRACK4D_OT_use_existing_server,
)


register, unregister = bpy.utils.register_classes_factory(CLASSES)
