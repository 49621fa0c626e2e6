"""Bringing a result back onto the user's own objects, and taking it away again."""

from .shape_keys import remove, shape_keys, show

__all__ = ["remove", "shape_keys", "show"]
