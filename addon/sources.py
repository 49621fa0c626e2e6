"""From what the user chose as the source of the motion to a request: the prompt, a video, or another object of the scene.

All of them are generators that pause often, so that Blender's window stays alive; nothing of them is in `bpy.data`
during a pause.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.messages import Request, Settings
from track4d_protocol.space import AZIMUTHS, canonical_similarity, intrinsics, orbit_viewmats

from . import actions, capture, image_sequences
from .capture import (
    PlainCopies,
    PlainCopy,
    Snapshot,
    check_group,
    find_again,
    pin_weights,
    positions,
    render_view,
    upright_frame,
)

if TYPE_CHECKING:
    from .properties import Track4DSettings

SIZE = 256  # pixels; the server works at this size
FILMED_FRAMES = 16  # of another object's motion; as many as the videos of Track4DGen have
MOST_FRAMES = 64  # of a video, as many as the server fits; of a longer one, frames at even distances are taken
Steps = Generator[tuple[int, int] | None, None, Request]  # yields steps done and steps in all


def plan(chosen: Track4DSettings, known: Sequence[tuple[int, str]]) -> tuple[Callable[[Snapshot], Steps], int]:
    """The work that makes the request, as a function of the snapshot, and how many steps it will have as far as is known.

    Args:
        chosen: what is asked for; looked at now, since the user may change it while the work goes on.
        known: the objects, as `capture.known_objects` gives them.

    Raises:
        InputError: no_vertex_group, no_source_object, no_views; more while the work goes on.
    """
    settings, group = chosen.to_message(), chosen.pin_group
    if group:
        check_group(find_again(known), group)
    total = 0
    if chosen.source == "VIDEO":
        views = chosen.views()

        def work(seen: Snapshot) -> Steps:
            return from_files(seen, settings, views)

    elif chosen.source == "OBJECT":
        film = filming(parts_of(chosen.source_object, known))
        total = FILMED_FRAMES * len(AZIMUTHS)

        def work(seen: Snapshot) -> Steps:
            return from_object(seen, settings, film)

    else:
        total = len(AZIMUTHS)

        def work(seen: Snapshot) -> Steps:
            return _from_prompt(seen, settings)

    def whole(seen: Snapshot) -> Steps:
        request = yield from work(seen)
        if group:
            request.arrays["pin"] = yield from pin_weights(seen, group)
        return request

    return whole, total


def _from_prompt(seen: Snapshot, settings: Settings) -> Steps:
    work = capture.steps(seen, settings)
    while True:
        try:
            yield next(work), len(AZIMUTHS)
        except StopIteration as finished:
            return finished.value


# A video in files


def from_files(seen: Snapshot, settings: Settings, views: dict[float, Path], size: int = SIZE) -> Steps:
    """A request whose motion is in a video of one to four views.

    Args:
        seen: the objects.
        settings: of the task "fit".
        views: video, picture of a sequence, or folder of pictures, by the azimuth of its camera in degrees (0 sees the
            object's front, 90 its left); or one folder with view_0, view_1, ... and cameras.json.
        size: the longer side of larger pictures is reduced to it.

    Raises:
        InputError: missing_file, no_views, unreadable_file, sizes_differ, bad_cameras, missing_cameras.
    """
    if len(views) == 1 and image_sequences.is_multi_view(path := next(iter(views.values()))):
        return (yield from from_folder(seen, settings, path, size))
    films = yield from image_sequences.films_steps(list(views.values()))
    video = yield from image_sequences.pictures_steps([image_sequences.spread(film, MOST_FRAMES) for film in films], size)
    viewmats = orbit_viewmats(list(views)).astype(np.float64)
    return fit_request(seen, settings, video, viewmats, intrinsics(video.shape[3], len(views)))


def from_folder(seen: Snapshot, settings: Settings, folder: Path, size: int = SIZE) -> Steps:
    """A request whose motion is in a multi-view video: a folder with view_0, view_1, ..., mask_0, ... and cameras.json.

    Args:
        as `from_files`.

    Raises:
        InputError: also bad_masks.
    """
    width, height = image_sequences.picture_size(folder)
    viewmats, Ks, space = image_sequences.read_cameras(folder, image_sequences.count_views(folder), height, width)
    video = yield from image_sequences.views_steps(folder, size, MOST_FRAMES)
    Ks[:, :2] *= np.array([[video.shape[3] / width], [video.shape[2] / height]])
    return fit_request(seen, settings, video, viewmats, Ks, space)


def fit_request(
    seen: Snapshot, settings: Settings, video: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, space: str = "canonical"
) -> Request:
    """A request with a video and its cameras in the place of pictures of our own.

    Args:
        seen: the objects.
        settings: of the task "fit".
        video: uint8 [V, F, H, W, 3 or 4].
        viewmats: [V, 4, 4] from `space` ("canonical" or "world") to the cameras; Ks: [V, 3, 3].
    """
    if space == "world":
        viewmats = viewmats @ seen.to_world
    else:
        viewmats = canonical_similarity(seen.vertices, settings.front).viewmats_to_world(viewmats)
    arrays = capture.mesh_arrays(seen) | {"video": np.ascontiguousarray(video), "viewmats": viewmats, "Ks": Ks}
    return Request(settings, [item.name for item in seen.objects], arrays)


# Another object of the scene


def parts_of(source: bpy.types.Object | None, known: Sequence[tuple[int, str]]) -> list[bpy.types.Object]:
    """The meshes that make up a source: itself and what is parented to it; none of them is to be animated itself.

    Raises:
        InputError: no_source_object.
    """
    own = {uid for uid, _ in known}
    parts = [obj for obj in (source, *source.children_recursive) if obj.type == "MESH"] if source else []
    if not parts or own & {obj.session_uid for obj in parts}:
        what = f"'{source.name}' holds no mesh of another object" if source else "No object is chosen as the motion's source"
        raise InputError("no_source_object", f"{what}.", "Choose the animated object whose motion shall be taken over.")
    return parts


def own_frames(parts: Sequence[bpy.types.Object]) -> tuple[float, float]:
    """First and last frame of the animation of objects, of their parents, shape keys and modifiers' objects.

    Without any, the frames of the scene.
    """
    owners: list[bpy.types.ID] = []
    for obj in parts:
        chain = [obj]
        while chain[-1].parent:
            chain.append(chain[-1].parent)
        chain += [target for modifier in obj.modifiers if (target := getattr(modifier, "object", None))]
        owners += [owner for each in chain for owner in (each, each.data, getattr(each.data, "shape_keys", None)) if owner]
    times: list[float] = []
    for owner in owners:
        data = getattr(owner, "animation_data", None)
        times += [time for curve in actions.fcurves(owner) for time in curve.range()]
        for track in data.nla_tracks if data else ():
            times += [time for strip in track.strips if not track.mute for time in (strip.frame_start, strip.frame_end)]
    scene = bpy.context.scene
    return (min(times), max(times)) if times and min(times) < max(times) else (scene.frame_start, scene.frame_end)


def filming(parts: Sequence[bpy.types.Object]) -> tuple[list[str], np.ndarray]:
    """What `from_object` shall film: names of objects, and at which times of the scene."""
    first, last = own_frames(parts)
    return [obj.name for obj in parts], np.linspace(first, last, min(FILMED_FRAMES, int(last - first) + 1))


def from_object(
    seen: Snapshot, settings: Settings, film: tuple[list[str], np.ndarray], size: int = SIZE, samples: int = 16
) -> Steps:
    """A request whose motion is that of other objects, filmed from four sides over their own frames.

    The cameras stand around the other object as around the one that shall move, so that both fill the pictures alike.

    Raises:
        InputError: no_source_object when one of them is removed meanwhile, and what `render_view` raises.
    """
    names, times = film
    total = len(times) * (len(AZIMUTHS) + 1)
    with _moment(names, times[0]) as copies:
        to_world = upright_frame(copies.items[0].matrix_world)
        from_world = np.linalg.inv(to_world)
        canonical = canonical_similarity(_places(copies, from_world), settings.front)
    reach = 1.0
    for number, time in enumerate(times, 1):
        with _moment(names, time) as copies:
            reach = max(reach, float(np.linalg.norm(canonical.apply(_places(copies, from_world)), axis=1).max()))
        yield number, total
    viewmats, Ks = orbit_viewmats().astype(np.float64), intrinsics(size, len(AZIMUTHS))
    viewmats[:, :3, 3] *= reach
    video = np.empty((len(AZIMUTHS), len(times), size, size, 4), np.uint8)
    for frame, time in enumerate(times):
        for view, (viewmat, K) in enumerate(zip(canonical.viewmats_to_world(viewmats), Ks)):
            with _moment(names, time) as copies:
                video[view, frame] = render_view(copies, from_world, canonical, viewmat, K, size, samples)
            yield len(times) + frame * len(AZIMUTHS) + view + 1, total
    return fit_request(seen, settings, video, viewmats, Ks)


def _places(copies: PlainCopies, from_world: np.ndarray) -> np.ndarray:
    """All vertices, [N, 3] float32."""
    matrices = [from_world @ copy.matrix_world for copy in copies.items]
    parts = [copy.positions @ matrix[:3, :3].T + matrix[:3, 3] for copy, matrix in zip(copies.items, matrices)]
    return np.concatenate(parts).astype(np.float32)


def _go_to(scene: bpy.types.Scene, frame: int, subframe: float) -> None:
    scene.frame_current, scene.frame_subframe = frame, subframe
    scene.view_layers[0].update()


@contextmanager
def _moment(names: Sequence[str], time: float) -> Iterator[PlainCopies]:
    """Copies of objects as they are at another time, in a temporary scene; the user's scene stays where it is."""
    scene = bpy.data.scenes.new(".Track4D")
    copies = PlainCopies(scene, [], [scene])
    try:
        objects = [bpy.data.objects.get(name) for name in names]
        if None in objects:
            raise InputError("no_source_object", "The source of the motion was removed.", "Undo that, or choose another.")
        for obj in objects:
            scene.collection.objects.link(obj)
        layer = scene.view_layers[0]
        _go_to(scene, int(time // 1), float(time % 1))
        for obj in objects:
            evaluated = obj.evaluated_get(layer.depsgraph)
            mesh = bpy.data.meshes.new_from_object(evaluated, preserve_all_data_layers=True, depsgraph=layer.depsgraph)
            copies.temporary.append(mesh)
            matrix_world = np.array(evaluated.matrix_world, np.float64)
            copies.items.append(PlainCopy(obj, mesh, positions(mesh), matrix_world))
        _go_to(scene, bpy.context.scene.frame_current, bpy.context.scene.frame_subframe)  # it has animated the originals too
        for obj in objects:
            scene.collection.objects.unlink(obj)
        yield copies
    finally:
        bpy.data.batch_remove(copies.temporary)
