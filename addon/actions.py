"""Actions of Blender 4.2 to 5.2 behind two functions.

F-curves are in the action itself (4.2, 4.3) or in the channel bag of a slot (4.4 and later).
"""

from __future__ import annotations

from typing import Any

import bpy


def assign(owner: bpy.types.ID, action: bpy.types.Action) -> None:
    """Makes `action` the active one of a datablock, with a slot of its own where actions have slots."""
    data = owner.animation_data or owner.animation_data_create()
    data.action = action
    if hasattr(action, "slots") and data.action_slot is None:
        suitable = {slot.handle for slot in data.action_suitable_slots}
        free = [slot for slot in action.slots if slot.handle in suitable and not slot.users()]
        data.action_slot = free[0] if free else action.slots.new(id_type=owner.id_type, name=owner.name)


def fcurves(owner: bpy.types.ID, create: bool = False) -> Any:
    """The collection of F-curves by which a datablock's active action moves it; an empty list when there is none.

    Args:
        owner: a datablock with an action.
        create: make the layer, the strip and the channel bag where they are missing.
    """
    data = owner.animation_data
    if data is None or data.action is None:
        return []
    action = data.action
    if not hasattr(action, "slots"):
        return action.fcurves
    if data.action_slot is None:
        return []
    if create and not action.layers:
        action.layers.new("Layer")
    for layer in action.layers:
        strip = layer.strips[0] if layer.strips else (layer.strips.new(type="KEYFRAME") if create else None)
        bag = strip.channelbag(data.action_slot, ensure=create) if strip else None
        if bag is not None:
            return bag.fcurves
    return []
