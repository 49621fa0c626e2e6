"""First run: set up a server on this computer, take that back, or use a server that runs elsewhere."""

from __future__ import annotations

import bpy
from track4d_protocol.errors import Track4DError

from .. import jobs, local_setup
from ..preferences import ADDON, preferences


class TRACK4D_OT_set_up_server(bpy.types.Operator):
    bl_idname = "track4d.set_up_server"
    bl_label = "Set Up Local Server"
    bl_description = "Make a Python environment for the server in its own folder and install the server there, about 5 GB"

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        chosen = preferences(context)
        python = bpy.path.abspath(chosen.setup_python)
        return _begin(self, context, "install", python, chosen.setup_package.strip() or "track4d")


class TRACK4D_OT_remove_setup(bpy.types.Operator):
    bl_idname = "track4d.remove_setup"
    bl_label = "Remove"
    bl_description = "Stop the server and delete the environment that was set up for it; jobs and results stay"

    def invoke(self, context: bpy.types.Context, event: bpy.types.Event) -> set[str]:
        return context.window_manager.invoke_confirm(self, event)

    def execute(self, context: bpy.types.Context) -> set[str]:
        return _begin(self, context, "remove")


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


def _begin(
    operator: bpy.types.Operator, context: bpy.types.Context, action: str, python: str = "", package: str = ""
) -> set[str]:
    home = preferences(context).server_home()
    try:
        local_setup.start(home, action, python, package, online=bpy.app.online_access)
    except Track4DError as error:
        jobs.complain(error)
        operator.report({"WARNING"}, error.message)
        return {"CANCELLED"}
    jobs.attach(context)
    return {"FINISHED"}


CLASSES = (
    TRACK4D_OT_set_up_server,
    TRACK4D_OT_remove_setup,
    TRACK4D_OT_stop_setup,
    TRACK4D_OT_open_setup_log,
    TRACK4D_OT_use_existing_server,
)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)


def unregister() -> None:
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
