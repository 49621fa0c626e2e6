"""Preferences of the extension: which server to use and how to start it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import bpy
from track4d_protocol.keys import default_home

from .local_setup import environment_python, read_status

if TYPE_CHECKING:
    from .client_thread import Source
    from .local_setup import Status

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
    setup_python: bpy.props.StringProperty(
        name="Set Up With",
        description="The Python from which the server's environment is made; empty for Blender's own",
        subtype="FILE_PATH",
    )
    setup_package: bpy.props.StringProperty(
        name="Package",
        description="What pip installs in place of the server that came with the extension: a wheel, or a folder with the source",
    )
    address: bpy.props.StringProperty(
        name="Address",
        description="host:port by which the server is reached from here; empty for the address in the connection file",
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
        from . import orders
        from .client_thread import Source

        other = self.server == "FILE"
        inside = environment_python(self.server_home())
        return Source(
            connection_file=_path(self.connection_file) or Path() if other else None,
            address=self.address.strip(),
            home=_path(self.home),
            python=str(_path(self.python) or (inside if read_status(self.server_home()).state == "ready" else "")),
            online=bpy.app.online_access,
            outbox=orders.folder(),
        )

    def server_home(self) -> Path:
        """The folder of this computer's server."""
        return _path(self.home) or default_home()

    def draw(self, context: bpy.types.Context) -> None:
        from . import jobs, panels

        layout, width = self.layout, context.region.width - 40  # the boxes around it
        layout.use_property_split = True
        layout.prop(self, "server")
        if self.server == "LOCAL":
            _draw_setup(layout.box(), self, jobs.state.setup, width)
            layout.prop(self, "python")
            layout.prop(self, "home")
        else:
            layout.prop(self, "connection_file")
            layout.prop(self, "address")
        panels.draw_server(layout, jobs.state, width)
        row = layout.row(align=True)
        if jobs.state.server_problem is None or jobs.state.server_problem.code not in panels.FIXES:
            text = "Start the Server" if self.server == "LOCAL" else "Connect"
            row.operator("track4d.start_server", icon="FILE_REFRESH", text=text)
        row.operator("track4d.copy_report", icon="COPYDOWN")


def _draw_setup(layout: bpy.types.UILayout, chosen: Track4DPreferences, setup: Status, width: int) -> None:
    """The environment that Track4D makes for the server, or the buttons that make it."""
    from .panels import draw_text

    if setup.busy:
        factor = (setup.step - 1 + setup.fraction) / setup.total if setup.step else 0.0
        layout.progress(factor=factor, text=setup.text)
        layout.operator("track4d.stop_setup", icon="CANCEL")
        return
    if setup.state == "ready":
        draw_text(layout, f"Server {setup.version} is set up in {chosen.server_home()}", width, "CHECKMARK")
    else:
        text = setup.text or "The server takes about 5 GB, most of it PyTorch, which comes from the Python package index"
        draw_text(layout, text, width, "INFO" if setup.state == "absent" else "ERROR")
        layout.prop(chosen, "setup_python")
        layout.prop(chosen, "setup_package")
    row = layout.row(align=True)
    text = {"absent": "Set Up Local Server", "ready": "Set Up Again"}.get(setup.state, "Go On")
    row.operator("track4d.set_up_server", text=text, icon="IMPORT")
    if setup.state != "absent":
        row.operator("track4d.remove_setup", icon="TRASH")
        row.operator("track4d.open_setup_log", icon="TEXT")


def _path(text: str) -> Path | None:
    return Path(bpy.path.abspath(text)).expanduser() if text else None


def preferences(context: bpy.types.Context) -> Track4DPreferences:
    """The registered preferences of this extension."""
    return context.preferences.addons[ADDON].preferences


def register() -> None:
    bpy.utils.register_class(Track4DPreferences)


def unregister() -> None:
    bpy.utils.unregister_class(Track4DPreferences)
