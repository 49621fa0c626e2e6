"""From objects to a request: what they are, and four pictures of them. The objects and the scene stay untouched.

seen = capture.snapshot(objects)                      # checks; keep it until the result is applied
request = capture.capture(seen, settings)             # or view by view: yield from capture.steps(seen, settings)
apply.apply(seen, result)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

import bpy
import numpy as np
from track4d_protocol.errors import InputError
from track4d_protocol.messages import Request, Settings
from track4d_protocol.space import canonical_similarity

from ..slices import finished
from .cameras import orbit_cameras
from .colors import BaseColors, read_pixels, read_surface, to_bytes
from .mesh import (
    ObjectSnapshot,
    PlainCopies,
    PlainCopy,
    Snapshot,
    changed,
    find_again,
    find_objects,
    known_objects,
    plain_copies,
    positions,
    snapshot,
    snapshot_steps,
    topology_hash,
    upright_frame,
)
from .pictures import quiet_handlers, render_view
from .pins import check_group, pin_weights

# Other modules import from here and nothing from the modules within: two threads that import a package and a module of it at the
# same time would wait for each other.
__all__ = ["BaseColors", "ObjectSnapshot", "PlainCopies", "PlainCopy", "Report", "Snapshot", "capture", "check_group",
           "find_again", "find_objects", "known_objects", "pin_weights", "positions", "quiet_handlers", "read_pixels",
           "read_surface", "snapshot", "snapshot_steps", "steps", "to_bytes", "topology_hash", "upright_frame"]  # fmt: skip

Report = Callable[[str, int, int], None]  # stage, step, total; may raise `Cancelled`


def capture(
    objects: Sequence[bpy.types.Object] | Snapshot,
    settings: Settings,
    size: int = 256,
    samples: int = 16,
    report: Report | None = None,
) -> Request:
    """Captures objects in one go.

    Args:
        objects: mesh objects, or their snapshot when it was taken already.
        settings: go into the request; `front` says where the first camera stands.
        size: width and height of the pictures in pixels.
        samples: of Cycles, per pixel.
        report: called before each picture and at the end.

    Returns:
        The request, in capture space (see `mesh`).

    Raises:
        InputError: the objects can't be animated or rendered; see `snapshot` and `render_view`.
    """
    return finished(steps(objects, settings, size, samples, report))


def steps(
    objects: Sequence[bpy.types.Object] | Snapshot,
    settings: Settings,
    size: int = 256,
    samples: int = 16,
    report: Report | None = None,
) -> Generator[int, None, Request]:
    """`capture`, with a pause after each picture so that an interface can stay alive.

    Nothing of the capture is in `bpy.data` during a pause, so saving, undo, or dropping the generator leave no trace.

    Yields:
        How many pictures are done, 1..V.

    Raises:
        InputError: also changed_during_capture, when an object was changed during a pause, and nothing_visible.
    """
    seen = objects if isinstance(objects, Snapshot) else snapshot(objects)
    viewmats, Ks = orbit_cameras(seen.vertices, settings.front, size)
    canonical, from_world = canonical_similarity(seen.vertices, settings.front), np.linalg.inv(seen.to_world)
    views = []
    for done, (viewmat, K) in enumerate(zip(viewmats, Ks)):
        if report:
            report("capture", done, len(viewmats))
        with plain_copies(find_objects(seen)) as copies:
            _check_unchanged(seen, copies)
            views.append(render_view(copies, from_world, canonical, viewmat, K, size, samples))
        yield done + 1
    if max(int(view[..., 3].max()) for view in views) < 128:
        name = seen.objects[0].name
        raise InputError(
            "nothing_visible",
            f"'{name}' can't be seen in any picture: its materials are transparent.",
            "Give it a material that can be seen while it is animated.",
        )
    if report:
        report("capture", len(viewmats), len(viewmats))
    return Request(
        settings,
        [item.name for item in seen.objects],
        mesh_arrays(seen) | {"views": np.stack(views), "viewmats": viewmats, "Ks": Ks},
    )


def mesh_arrays(seen: Snapshot) -> dict[str, np.ndarray]:
    """The arrays of a request that describe the mesh."""
    return {
        "vertices": seen.vertices,
        "faces": seen.faces,
        "uvs": seen.uvs,
        "materials": seen.materials,
        "object_counts": np.array([item.count for item in seen.objects], np.int32),
        **{f"texture_{k}": np.ascontiguousarray(texture) for k, texture in enumerate(seen.textures)},
    }


def _check_unchanged(seen: Snapshot, copies) -> None:
    from_world = np.linalg.inv(seen.to_world)
    for (item, part), copy in zip(seen.slices(), copies.items):
        matrix = from_world @ copy.matrix_world
        points = copy.positions.astype(np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
        if len(points) != item.count or not np.allclose(
            points, seen.vertices[part], rtol=1e-5, atol=1e-5 * np.ptp(seen.vertices)
        ):
            raise changed(item.name)
