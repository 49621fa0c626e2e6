"""What travels between a client and the server: requests, jobs and results, and the check of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np

from .errors import InputError, TransportError
from .limits import LIMITS, Limits
from .space import FRONTS

PRESETS = ("fast", "default", "fine", "paper")
STRONGEST = 3.0
GLIMPSES = ("preview", "motion", "motion_points")  # what a running job shows, as arrays
TASKS = ("animate", "fit")  # from a prompt | from a video that the request brings
MODELS = ("motion", "published")  # the generator that ships | the multi-view video model, whose weights a user downloads


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        prompt: the sentence, e.g. "the fox is running".
        seed: of every random number of the job.
        frames: of the motion; frame 0 is the captured pose.
        preset: one of `PRESETS`.
        front: the world axis the object faces, one of `space.FRONTS`.
        task: one of `TASKS`.
        model: one of `MODELS`; what imagines the motion, for the task "animate".
        strength: factor on the motion, 0 to `STRONGEST`.
        loop: the last frame shall be the first one.
        keep_root: the object stays where it is and moves on the spot.
    """

    prompt: str = ""
    seed: int = 0
    frames: int = 16
    preset: str = "default"
    front: str = "-Y"
    task: str = "animate"
    model: str = "motion"
    strength: float = 1.0
    loop: bool = False
    keep_root: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Settings:
        """The inverse of `to_dict`.

        Raises:
            InputError: a value has the wrong type.
        """
        if not isinstance(data, dict):
            raise InputError("bad_settings", "The settings are not a map.", "Update the add-on and the server.")
        values: dict[str, Any] = {}
        for entry in fields(cls):
            value = data.get(entry.name, entry.default)
            if type(value) is not type(entry.default):
                raise InputError("bad_settings", f"The setting '{entry.name}' is {value!r}, not of type "
                                 f"{type(entry.default).__name__}.", "Set it again.")
            values[entry.name] = value
        return cls(**values)


@dataclass
class Request:
    """A captured object and what shall happen to it.

    Attributes:
        settings: what the user chose.
        objects: names of the objects, in the order of `object_counts`.
        arrays: in the user's world space and units: vertices f32 [N, 3]; faces i32 [T, 3]; uvs f32 [T, 3, 2]; materials
            i32 [T]; texture_0, texture_1, ... uint8 [h, w, 3] sRGB, top row first, one per material; object_counts i32
            [O] vertices per object; views uint8 [V, R, R, 4] sRGB, straight alpha; viewmats f [V, 4, 4]; Ks f32 [V, 3, 3];
            pin f32 [N] in 0..1, how much each vertex is held still, where it is given; for the task "fit" also video uint8
            [V, F, H, W, 3 or 4], whose cameras viewmats and Ks then are. The server draws position and depth maps itself,
            of the mesh with these cameras.
    """

    settings: Settings
    objects: list[str]
    arrays: dict[str, np.ndarray]


@dataclass
class Result:
    """What the server made.

    Attributes:
        report: prompt, seed, preset, seconds per stage, warnings, versions, model and figures.
        arrays: vertices f32 [F, N, 3] in the request's space; video uint8 [V, F, R, R, 3]; gaussian_means [F, G, 3],
            gaussian_quats [F, G, 4] wxyz, gaussian_scales [G, 3], gaussian_opacities [G], gaussian_colors [G, 3],
            gaussian_sh [G, K, W, 3] (4D SH, see `splats.Splats`).
    """

    report: dict[str, Any]
    arrays: dict[str, np.ndarray]


class JobState(str, Enum):
    """Where a job stands; the last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        return self in (JobState.DONE, JobState.FAILED, JobState.CANCELLED)


@dataclass
class Job:
    """A request on the server, as the server sees it now.

    Attributes:
        id: made by the client.
        stage: "generate", "fit", ...; "cancelling" between a cancel and the worker's end.
        step: steps of the stage that are done, of `total`.
        seconds_left: of the stage, estimated; None while unknown.
        queue_position: 1 = next; 0 when it doesn't wait.
        error: of a failed job, for `errors.error_from_dict`.
        created: seconds since 1970.
        preview: uint8 [H, W, 3] sRGB, or [T, H, W, 3] to be played over and over; only in the update that brings a new one.
        motion: f32 [F, M, 3], where the vertices `motion_points` i32 [M] of the request go as far as that is known; only in
            the update that brings it, together with its points.
    """

    id: str
    state: JobState
    stage: str = ""
    step: int = 0
    total: int = 0
    seconds_left: float | None = None
    queue_position: int = 0
    error: dict[str, str] | None = None
    objects: list[str] = field(default_factory=list)
    prompt: str = ""
    created: float = 0.0
    preview: np.ndarray | None = field(default=None, repr=False)
    motion: np.ndarray | None = field(default=None, repr=False)
    motion_points: np.ndarray | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but what travels as arrays."""
        data = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name not in GLIMPSES}
        return data | {"state": self.state.value}

    @classmethod
    def from_dict(cls, data: Any, arrays: Mapping[str, np.ndarray] | None = None) -> Job:
        """The inverse of `to_dict`.

        Args:
            arrays: of the message; those that are named in `GLIMPSES` are the job's.

        Raises:
            TransportError: this is not a job.
        """
        try:
            known = {entry.name for entry in fields(cls)} - set(GLIMPSES)
            values = {name: value for name, value in data.items() if name in known}
            values |= {name: array for name, array in (arrays or {}).items() if name in GLIMPSES}
            return cls(**values | {"state": JobState(data["state"])})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TransportError("bad_message", f"The server sent a job that can't be read: {error}.",
                                 "Update the add-on and the server.") from error


# name: (dtype kinds, shape); a letter is a size that must be the same everywhere, a number is exact, None is free.
_ANIMATE = {
    "vertices": ("f", ("N", 3)), "faces": ("i", ("T", 3)), "uvs": ("f", ("T", 3, 2)), "materials": ("i", ("T",)),
    "object_counts": ("i", (None,)), "views": ("u", ("V", "R", "R", 4)),
    "viewmats": ("f", ("V", 4, 4)), "Ks": ("f", ("V", 3, 3)), "pin": ("f", ("N",))}
_OPTIONAL = {"uvs", "materials", "object_counts", "pin"}


def check_request(request: Request, limits: Limits = LIMITS) -> None:
    """Refuses what no worker could use, before anything is sent or stored.

    Raises:
        InputError: a setting, a missing array, a shape, an index or a size is wrong.
    """
    settings, arrays = request.settings, request.arrays
    _check_settings(settings, request.objects, limits)
    expected = dict(_ANIMATE)
    optional = set(_OPTIONAL)
    if settings.task == "fit":
        expected["video"] = ("u", ("V", "F", None, None, None))
        optional.add("views")
    expected |= {name: ("u", (None, None, 3)) for name in arrays if name.startswith("texture_")}
    sizes: dict[str, int] = {}
    for name, (kind, shape) in expected.items():
        if name in arrays:
            _check_array(name, arrays[name], kind, shape, sizes)
        elif name not in optional:
            raise InputError("missing_array", f"The request has no '{name}'.", "Update the add-on and the server.")
    pictures = [array.shape[-3:-1] for name, array in arrays.items() if name.startswith(("views", "texture_", "video"))]
    largest = max((size for shape in pictures for size in shape), default=0)
    for size, limit, what in ((sizes["N"], limits.vertices, "vertices"), (sizes["T"], limits.faces, "triangles"),
                              (sizes["V"], limits.views, "views"), (sizes.get("F", 0), limits.frames, "frames"),
                              (largest, limits.pixels, "pixels in width or height of a picture")):
        if size > limit:
            raise InputError("too_large", f"The request has {size} {what}; the server takes {limit}.",
                             "Simplify the object, or use smaller pictures.")
    if not sizes["N"] or not sizes["T"] or not sizes["V"]:
        raise InputError("empty_mesh",
                         f"The request has {sizes['N']} vertices, {sizes['T']} triangles and {sizes['V']} views.",
                         "Choose an object with a surface.")
    _check_indices(request, sizes)


def _check_settings(settings: Settings, objects: list[str], limits: Limits) -> None:
    if settings.preset not in PRESETS:
        raise InputError("bad_settings", f"The preset '{settings.preset}' is not known.",
                         f"Use one of {', '.join(PRESETS)}.")
    if settings.task not in TASKS:
        raise InputError("bad_settings", f"The task '{settings.task}' is not known.", f"Use one of {', '.join(TASKS)}.")
    if settings.model not in MODELS:
        raise InputError("bad_settings", f"The model '{settings.model}' is not known.", f"Use one of {', '.join(MODELS)}.")
    if settings.front not in FRONTS:
        raise InputError("bad_front", f"The front axis '{settings.front}' is not known.",
                         f"Use one of {', '.join(FRONTS)}.")
    if not 2 <= settings.frames <= limits.frames:
        raise InputError("bad_settings", f"{settings.frames} frames were asked for.", f"Ask for 2 to {limits.frames}.")
    if not 0 <= settings.seed < 2**63:
        raise InputError("bad_settings", f"The seed {settings.seed} is out of range.",
                         "Use a number from 0 to 2^63 - 1.")
    if not 0 <= settings.strength <= STRONGEST:  # NaN is neither
        raise InputError("bad_settings", f"The strength {settings.strength} is out of range.",
                         f"Use a number from 0 to {STRONGEST:g}.")
    if len(settings.prompt) > limits.prompt:
        raise InputError("prompt_too_long", f"The prompt has {len(settings.prompt)} characters.",
                         f"Use at most {limits.prompt}.")
    if settings.task == "animate" and not settings.prompt.strip():
        raise InputError("empty_prompt", "The prompt is empty.", 'Say what happens, for example "the fox is running".')
    if not isinstance(objects, list) or not all(isinstance(name, str) and len(name) <= 1024 for name in objects):
        raise InputError("bad_settings", "The object names are not a list of texts.",
                         "Update the add-on and the server.")
    if len(objects) > limits.objects:
        raise InputError("too_large", f"The request has {len(objects)} objects; the server takes {limits.objects}.",
                         "Join some, or choose fewer.")


def _check_array(name: str, array: np.ndarray, kind: str, shape: tuple, sizes: dict[str, int]) -> None:
    same = array.ndim == len(shape) and array.dtype.kind == kind and (kind != "u" or array.itemsize == 1)
    if same:
        same = all(want is None or (sizes.setdefault(want, size) if isinstance(want, str) else want) == size
                   for want, size in zip(shape, array.shape))
    if not same:
        wanted = [sizes.get(want, want) if isinstance(want, str) else want for want in shape]
        raise InputError("bad_array", f"The array '{name}' is {array.dtype} {list(array.shape)}, "
                         f"not of kind '{kind}' and shape {wanted}.", "Update the add-on and the server.")


def _check_indices(request: Request, sizes: dict[str, int]) -> None:
    arrays = request.arrays
    for name in ("vertices", "viewmats", "Ks", "pin"):
        if name in arrays and not np.isfinite(arrays[name]).all():
            raise InputError("not_finite", f"The array '{name}' has numbers that are not finite.",
                             "Undo the modifier that made them.")
    if arrays["faces"].min() < 0 or arrays["faces"].max() >= sizes["N"]:
        raise InputError("bad_faces", f"A triangle uses a vertex outside 0..{sizes['N'] - 1}.",
                         "Use 'Mesh > Clean Up' on the object.")
    textures = sum(name.startswith("texture_") for name in arrays)
    if any(f"texture_{index}" not in arrays for index in range(textures)):
        raise InputError("bad_array", f"The {textures} textures are not numbered from 0.",
                         "Update the add-on and the server.")
    materials = arrays.get("materials")
    if materials is not None and textures and not 0 <= materials.min() <= materials.max() < textures:
        raise InputError("bad_materials", f"A triangle uses a material outside 0..{textures - 1}.",
                         "Update the add-on and the server.")
    counts = arrays.get("object_counts")
    if counts is not None and (len(counts) != len(request.objects) or counts.min(initial=0) < 0
                               or int(counts.sum()) != sizes["N"]):
        raise InputError("bad_array", f"The vertices of {len(request.objects)} objects don't add up to {sizes['N']}.",
                         "Update the add-on and the server.")
    if "video" in arrays and arrays["video"].shape[-1] not in (3, 4):
        raise InputError("bad_array", f"The video has {arrays['video'].shape[-1]} colour channels.", "Use 3 or 4.")
