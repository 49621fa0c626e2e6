"""Writes docs/errors.md: every error and warning code in the sources, with its sentence and what to do.

    python tools/list_errors.py            # writes the page
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
KINDS = {"InputError": "input", "TransportError": "connection", "ServerError": "server", "warning": "note"}
HEAD = """# Errors by code

What Track4D says when something is wrong, and what to do. The code stands in the panel, in the terminal in brackets
and in the report. *input*: the object, the sentence, a file or a setting; *connection*: the server can't be reached;
*server*: the server failed; *note*: the work goes on. `…` stands for the name or the number at fault. This page is made
from the sources by `python tools/list_errors.py`.

| code | kind | what it says | what to do |
|---|---|---|---|
"""


def text(node: ast.expr | None) -> str:
    """The words of a string expression; `…` for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


def errors_in(path: Path) -> set[tuple[str, str, str, str]]:
    """(code, kind, message, action) of every error and warning that a file can make."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            given = [*node.args, None, None]
            code = text(given[0]) if isinstance(given[0], ast.Constant) else ""
            if name in KINDS and code.isidentifier() and given[1] is not None:
                found.add((code, KINDS[name], text(given[1]), text(given[2]) if given[2] is not None else ""))
        elif isinstance(node, ast.Dict):
            entries = {text(key): value for key, value in zip(node.keys, node.values) if key is not None}
            if {"code", "message"} <= set(entries):
                found.add((text(entries["code"]), "note", text(entries["message"]), text(entries.get("action"))))
    return found


def page() -> str:
    """The whole of docs/errors.md."""
    files = sorted(p for part in ("protocol", "server", "addon") for p in (ROOT / part).rglob("*.py"))
    rows = sorted(set().union(*(errors_in(p) for p in files)))
    return HEAD + "".join(f"| `{code}` | {kind} | {message.replace('|', '/')} | {action.replace('|', '/')} |\n"
                          for code, kind, message, action in rows if code.isidentifier())


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}")
