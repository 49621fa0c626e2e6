"""What the buttons do; one module per thing they act on."""

from . import animation, report, results, server

MODULES = (animation, results, server, report)


def register() -> None:
    for module in MODULES:
        module.register()


def unregister() -> None:
    for module in reversed(MODULES):
        module.unregister()
