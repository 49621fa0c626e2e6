"""How much each vertex is held still: the weights of a vertex group."""

from __future__ import annotations

import numpy as np
from track4d_protocol.errors import InputError

from .mesh import Snapshot, find_objects


def pin_weights(seen: Snapshot, group: str) -> np.ndarray:
    """Weights of the vertex group of this name; 0 where a vertex or a whole object isn't in it.

    Returns:
        [N] float32 in 0..1, as the vertices of the snapshot.

    Raises:
        InputError: no_vertex_group, when none of the objects has the group.
    """
    weights = np.zeros(len(seen.vertices), np.float32)
    found = False
    for (_, part), obj in zip(seen.slices(), find_objects(seen)):
        if group not in obj.vertex_groups:
            continue
        found, index = True, obj.vertex_groups[group].index
        weights[part] = [
            next((entry.weight for entry in vertex.groups if entry.group == index), 0.0) for vertex in obj.data.vertices
        ]
    if not found:
        raise InputError(
            "no_vertex_group",
            f"'{seen.objects[0].name}' has no vertex group '{group}'.",
            "Choose one of its groups as the pin group, or empty the field.",
        )
    return weights
