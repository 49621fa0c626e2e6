"""The last prompts of this user, over all files: a small file in the extension's own folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import bpy

MOST = 20
log = logging.getLogger(__name__)
_prompts: list[str] | None = None


def recent() -> list[str]:
    """The newest first. The file is read once."""
    global _prompts
    if _prompts is None:
        _prompts = _read()
    return _prompts


def add(prompt: str) -> None:
    """Puts a prompt on top. Another Blender may have added some in the meantime."""
    global _prompts
    path, prompt = _path(), prompt.strip()
    if not prompt:
        return
    before = _read() if path else recent()
    _prompts = [prompt, *(other for other in before if other != prompt)][:MOST]
    if path is None:
        return
    part = path.with_suffix(".part")
    try:
        part.write_text(json.dumps(_prompts), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        log.warning("The recent prompts can't be kept in '%s': %s", path, error)


def _path() -> Path | None:
    """The file; None where this package isn't installed as an extension."""
    try:
        return Path(bpy.utils.extension_path_user(__package__, create=True)) / "prompts.json"
    except (ValueError, OSError):
        return None


def _read() -> list[str]:
    path = _path()
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else []
    except (OSError, ValueError):
        return []
    return [prompt for prompt in found if isinstance(prompt, str)][:MOST] if isinstance(found, list) else []
