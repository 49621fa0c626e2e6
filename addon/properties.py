"""Settings of an animation, stored per scene. What a running job is doing is never stored in the file: see jobs.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import bpy

if TYPE_CHECKING:
    from track4d_protocol.messages import Settings

FRONTS = (
    ("-Y", "-Y", "The object looks towards -Y, as in Blender's front view"),
    ("+Y", "+Y", "The object looks towards +Y"),
    ("+X", "+X", "The object looks towards +X, as in Blender's right view"),
    ("-X", "-X", "The object looks towards -X"),
)
PRESETS = (
    ("fast", "Fast", "A quick look at the motion"),
    ("default", "Default", "The quality that is meant to be kept"),
    ("fine", "Fine", "More Gaussians and more work on motion and colours"),
)


class Track4DSettings(bpy.types.PropertyGroup):
    """`scene.track4d`: what the user chose in the panel."""

    prompt: bpy.props.StringProperty(
        name="Prompt",
        description="What the object does, as a sentence: the fox is running",
        options=set(),
    )
    seed: bpy.props.IntProperty(
        name="Seed",
        description="The same seed and prompt give the same motion again; another seed gives another motion",
        min=0,
        options=set(),
    )
    frames: bpy.props.IntProperty(
        name="Frames",
        description="Length of the animation; the first frame is the object as it is now",
        default=16,
        min=2,
        max=250,
        options=set(),
    )
    preset: bpy.props.EnumProperty(name="Quality", items=PRESETS, default="default", options=set())
    front: bpy.props.EnumProperty(
        name="Front",
        description="Direction in which the object looks: with a wrong front, a fox runs sideways",
        items=FRONTS,
        default="-Y",
        options=set(),
    )

    def to_message(self) -> Settings:
        """The same settings as they travel to the server."""
        from track4d_protocol.messages import Settings

        return Settings(
            prompt=self.prompt.strip(), seed=self.seed, frames=self.frames, preset=self.preset, front=self.front
        )


def register() -> None:
    bpy.utils.register_class(Track4DSettings)
    bpy.types.Scene.track4d = bpy.props.PointerProperty(type=Track4DSettings)


def unregister() -> None:
    del bpy.types.Scene.track4d
    bpy.utils.unregister_class(Track4DSettings)
