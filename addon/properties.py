"""Settings of an animation, stored per scene. What a running job is doing is never stored in the file: see state.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    ("paper", "As in the Paper", "The recipe of Track4DGen's paper, which takes hours on a CPU"),
)
MODELS = (
    ("motion", "Track4D", "The small generator that ships with Track4D: seconds, and simple motions"),
    ("published", "Animate3D", "The published video model, by weights that are yours to download: hours on a CPU"),
)
SOURCES = (
    ("PROMPT", "Prompt", "The motion is imagined from a sentence"),
    ("VIDEO", "Video", "The motion is that of one to four videos, one per side"),
    ("OBJECT", "Object", "The motion is that of another animated object of this scene, which is filmed from four sides"),
)
OUTPUTS = (
    ("shape_keys", "Shape Keys", "The mesh itself moves; every program reads it"),
    ("gaussian_cloud", "Gaussian Cloud", "A cloud of 4D Gaussians beside the mesh, which stays as it is"),
    ("mesh_cache", "Mesh Cache", "The mesh moves by a file beside the .blend: small in memory, for long motions of large meshes"),
    ("all", "All", "Shape keys, Gaussian cloud and mesh cache"),
)
SIDES = {0.0: "view_front", 90.0: "view_left", 180.0: "view_back", 270.0: "view_right"}  # by the camera's azimuth
COLORS = (
    ("CAMERA", "As Seen by the Camera", "The colours change with the direction from the scene's camera"),
    ("FIXED", "From Where the Camera Is Now", "The colours are those seen along the camera's present direction, from everywhere"),
)
REMEMBERED = (
    "prompt", "seed", "frames", "preset", "model", "front", "strength", "loop", "keep_root", "pin_group", "output",
    "cloud_colors", "source", "view_front", "view_left", "view_back", "view_right",
)  # fmt: skip


def _is_source(_settings: Track4DSettings, obj: bpy.types.Object) -> bool:
    return obj.type in ("MESH", "ARMATURE", "EMPTY")


def _view(side: str) -> Any:
    return bpy.props.StringProperty(
        name=side,
        description=f"Video of the {side.lower()} side: a film, a picture of an image sequence, or a folder of pictures. "
        "Or, alone, a folder that holds view_0, view_1, ... and cameras.json",
        subtype="FILE_PATH",
        options=set(),
    )


class Track4DLights(bpy.types.PropertyGroup):
    """The rig whose light is baked; strengths as in `lighting.RIG`."""

    key: bpy.props.FloatProperty(name="Key", default=0.85, min=0.0, soft_max=2.0, options=set())
    fill: bpy.props.FloatProperty(name="Fill", default=0.35, min=0.0, soft_max=2.0, options=set())
    back: bpy.props.FloatProperty(name="Back", default=0.6, min=0.0, soft_max=2.0, options=set())
    background: bpy.props.FloatProperty(name="Background", default=0.3, min=0.0, soft_max=2.0, options=set())
    samples: bpy.props.IntProperty(
        name="Samples", description="Of the bake, per corner of the mesh", default=64, min=1, max=4096, options=set()
    )
    keep_rig: bpy.props.BoolProperty(
        name="Keep Lights", description="Leave the lights in the scene after the bake", options=set()
    )

    def strengths(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("key", "fill", "back", "background")}


class Track4DSettings(bpy.types.PropertyGroup):
    """`scene.track4d`: what the user chose in the panel."""

    source: bpy.props.EnumProperty(name="Motion From", items=SOURCES, default="PROMPT", options=set())
    prompt: bpy.props.StringProperty(
        name="Prompt",
        description="What the object does, as a sentence: the fox is running",
        options=set(),
    )
    view_front: _view("Front")
    view_left: _view("Left")
    view_back: _view("Back")
    view_right: _view("Right")
    source_object: bpy.props.PointerProperty(
        name="Object",
        description="The animated object whose motion is taken over; of a rig with parts, the rig",
        type=bpy.types.Object,
        poll=_is_source,
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
        description="Length of the animation on the timeline; the first frame is the object as it is now",
        default=16,
        min=2,
        max=600,
        soft_max=250,
        options=set(),
    )
    preset: bpy.props.EnumProperty(name="Quality", items=PRESETS, default="default", options=set())
    model: bpy.props.EnumProperty(
        name="Model", description="What imagines the motion", items=MODELS, default="motion", options=set()
    )
    front: bpy.props.EnumProperty(
        name="Front",
        description="Direction in which the object looks: with a wrong front, a fox runs sideways",
        items=FRONTS,
        default="-Y",
        options=set(),
    )
    strength: bpy.props.FloatProperty(
        name="Strength",
        description="How far the motion goes: 0 stands still, 1 is as imagined, more exaggerates",
        default=1.0,
        min=0.0,
        max=3.0,
        soft_max=2.0,
        options=set(),
    )
    loop: bpy.props.BoolProperty(
        name="Loop", description="The last frame is the first one again, so that the motion can be repeated", options=set()
    )
    keep_root: bpy.props.BoolProperty(
        name="On the Spot", description="The object doesn't travel along the ground, as for a walk cycle", options=set()
    )
    pin_group: bpy.props.StringProperty(
        name="Pin Group", description="A vertex group that stays still: fully where its weight is 1", options=set()
    )
    output: bpy.props.EnumProperty(name="Output", items=OUTPUTS, default="shape_keys", options=set())
    cloud_colors: bpy.props.EnumProperty(name="Colours", items=COLORS, default="CAMERA", options=set())
    lights: bpy.props.PointerProperty(type=Track4DLights)

    def to_message(self) -> Settings:
        """The same settings as they travel to the server."""
        from track4d_protocol.messages import Settings

        return Settings(
            prompt=self.prompt.strip() if self.source == "PROMPT" else "",
            seed=self.seed,
            frames=self.frames,
            preset=self.preset,
            front=self.front,
            task="animate" if self.source == "PROMPT" else "fit",
            model=self.model if self.source == "PROMPT" else "motion",
            strength=self.strength,
            loop=self.loop,
            keep_root=self.keep_root,
        )

    def views(self) -> dict[float, Path]:
        """The chosen files of the source VIDEO by their cameras' azimuths.

        Raises:
            InputError: no_views.
        """
        from track4d_protocol.errors import InputError

        found = {azimuth: getattr(self, name) for azimuth, name in SIDES.items() if getattr(self, name)}
        if not found:
            raise InputError("no_views", "No video is chosen.", "Choose a video of at least one side.")
        return {azimuth: Path(bpy.path.abspath(path)) for azimuth, path in found.items()}

    def title(self) -> str:
        """What a job is called in the panel."""
        if self.source == "VIDEO":
            return f"as in {Path(next(filter(None, (getattr(self, name) for name in SIDES.values())), 'a video')).name}"
        if self.source == "OBJECT":
            return f"as {self.source_object.name if self.source_object else 'nothing'} moves"
        return self.prompt.strip()

    def to_dict(self) -> dict[str, Any]:
        """What a result remembers of these settings; of JSON's kinds."""
        source = {"source_object": self.source_object.name} if self.source_object else {}
        return {name: getattr(self, name) for name in REMEMBERED} | source | {"title": self.title()}

    def use(self, remembered: dict[str, Any]) -> None:
        """The inverse of `to_dict`; what isn't known there, or no longer exists, stays as it is."""
        for name in REMEMBERED:
            if name not in remembered:
                continue
            kind = self.bl_rna.properties[name]
            if kind.type == "ENUM" and remembered[name] not in kind.enum_items:
                continue
            setattr(self, name, remembered[name])
        self.source_object = bpy.data.objects.get(remembered.get("source_object", ""), None)


CLASSES = (Track4DLights, Track4DSettings)


def register() -> None:
    for cls in CLASSES:
        bpy.utils.register_class(cls)
    bpy.types.Scene.track4d = bpy.props.PointerProperty(type=Track4DSettings)


def unregister() -> None:
    del bpy.types.Scene.track4d
    for cls in reversed(CLASSES):
        bpy.utils.unregister_class(cls)
