"""Track4D in Blender: animate your own mesh from a sentence.

Enabling the extension only registers classes; the server is looked for when the tab is first drawn. Imported as
`track4d_addon` without registering, `capture`, `apply` and `export` work in scripts and in the bpy module.
"""

from __future__ import annotations


def register() -> None:
    from . import operators, panels, preferences, properties

    for module in (properties, preferences, operators, panels):
        module.register()


def unregister() -> None:
    from . import jobs, operators, panels, preferences, properties

    jobs.shut_down()
    for module in (panels, operators, preferences, properties):
        module.unregister()
