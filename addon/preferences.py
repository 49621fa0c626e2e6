"""Preferences of the extension: which server to use and how to start it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import bpy

if TYPE_CHECKING:
    from .client_thread import Source

ADDON = __package__  # bl_ext.<repository>.track4d, the key of the preferences
SERVERS = (
    ("LOCAL", "This computer", "Start and use a server on this computer"),
    ("FILE", "Another server", "Use a server that somebody started, through its connection file"),
)


def _changed(_preferences: Track4DPreferences, context: bpy.types.Context) -> None:
    from . import jobs

    jobs.attach(context)


class Track4DPreferences(bpy.types.AddonPreferences):
    """Stored in Blender's preferences, shared by all files."""

    bl_idname = ADDON

    server: bpy.props.EnumProperty(name="Server", items=SERVERS, default="LOCAL", update=_changed)
    python: bpy.props.StringProperty(
        name="Server Python",
        description="The Python in which the server is installed, for instance ~/track4d/bin/python",
        subtype="FILE_PATH",
        update=_changed,
    )
    home: bpy.props.StringProperty(
        name="Server Folder",
        description="Where the server keeps its jobs, keys and log; empty for the usual place",
        subtype="DIR_PATH",
        update=_changed,
    )
    connection_file: bpy.props.StringProperty(
        name="Connection File",
        description="connection.json from the server's folder; it holds the keys, so keep it private",
        subtype="FILE_PATH",
        update=_changed,
    )

    def source(self) -> Source:
        """The same choice for the client thread, which may not touch bpy."""
        from .client_thread import Source

        other = self.server == "FILE"
        return Source(
            connection_file=_path(self.connection_file) or Path() if other else None,
            home=_path(self.home),
            python=str(_path(self.python) or ""),
            online=bpy.app.online_access,
        )

    def draw(self, _context: bpy.types.Context) -> None:
        from . import jobs, panels

        layout = self.layout
        layout.use_property_split = True
        layout.prop(self, "server")
        if self.server == "LOCAL":
            layout.prop(self, "python")
            layout.prop(self, "home")
        else:
            layout.prop(self, "connection_file")
        panels.draw_server(layout, jobs.state)
        row = layout.row(align=True)
        if jobs.state.server_problem is None or jobs.state.server_problem.code not in panels.FIXES:
            text = "Start the Server" if self.server == "LOCAL" else "Connect"
            row.operator("track4d.start_server", icon="FILE_REFRESH", text=text)
        row.operator("track4d.copy_report", icon="COPYDOWN")


def _path(text: str) -> Path | None:
    return Path(bpy.path.abspath(text)).expanduser() if text else None


def preferences(context: bpy.types.Context) -> Track4DPreferences:
    """The registered preferences of this extension."""
    return context.preferences.addons[ADDON].preferences


def register() -> None:
    bpy.utils.register_class(Track4DPreferences)


def unregister() -> None:
    bpy.utils.unregister_class(Track4DPreferences)
