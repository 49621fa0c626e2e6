"""How much each vertex is held still: the weights of a vertex group."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence

import bpy
import numpy as np
from track4d_protocol.errors import InputError

from .. import slices
from .mesh import Snapshot, changed, find_objects

CHUNK = 1000  # vertices that are looked at between two looks at the clock


def check_group(objects: Sequence[bpy.types.Object], group: str) -> None:
    """Raises:
    InputError: no_vertex_group, when none of the objects has the group.
    """
    if not any(group in obj.vertex_groups for obj in objects):
        raise InputError(
            "no_vertex_group",
            f"'{objects[0].name}' has no vertex group '{group}'.",
            "Choose one of its groups as the pin group, or empty the field.",
        )


def pin_weights(seen: Snapshot, group: str) -> Generator[None, None, np.ndarray]:
    """Weights of the vertex group of this name; 0 where a vertex or a whole object isn't in it. In slices.

    Returns:
        [N] float32 in 0..1, as the vertices of the snapshot.

    Raises:
        InputError: changed_during_capture, object_missing.
    """
    weights = np.zeros(len(seen.vertices), np.float32)
    end = time.perf_counter() + slices.SLICE
    for number, (item, part) in enumerate(seen.slices()):
        for start in range(0, item.count, CHUNK):
            if time.perf_counter() > end:
                yield
                end = time.perf_counter() + slices.SLICE
            obj = find_objects(seen)[number]
            if group not in obj.vertex_groups:
                break
            if len(obj.data.vertices) != item.count:
                raise changed(item.name)
            index = obj.vertex_groups[group].index
            chunk = obj.data.vertices[start : start + CHUNK]
            weights[part][start : start + CHUNK] = [
                next((entry.weight for entry in vertex.groups if entry.group == index), 0.0) for vertex in chunk
            ]
    return weights
