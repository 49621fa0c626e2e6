"""What the buttons do; one module per thing they act on."""

from . import animation, exporting, fixes, lighting, report, results, server, setup, takes

MODULES = (animation, takes, exporting, results, server, setup, fixes, report, lighting)


def register() -> None:
    for module in MODULES:
        module.register()


def unregister() -> None:
    for module in reversed(MODULES):
        module.unregister()
