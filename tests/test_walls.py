"""The three walls of the house: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# root folder -> packages it never imports
WALLS = {
    "addon": {"torch", "track4d", "track4d_addon", "scipy", "numba", "cv2", "trimesh"},
    "server": {"bpy", "track4d_addon", "mathutils", "bmesh"},
}


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports, at any depth of the code; relative imports are inside the wall."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("root", WALLS)
def test_wall_holds(root: str) -> None:
    files = sorted((ROOT / root).rglob("*.py"))
    assert files, f"no files under {root}"
    broken = {str(f.relative_to(ROOT)): sorted(imported(f) & WALLS[root]) for f in files if imported(f) & WALLS[root]}
    assert not broken


def test_nobody_reaches_into_the_packages_of_the_extension() -> None:
    """Two threads that load a package and a module of it at the same time would wait for each other."""
    for file in sorted((ROOT / "addon").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(), str(file))):
            if isinstance(node, ast.ImportFrom) and node.level and node.module and "." in node.module:
                package = ROOT / "addon" / node.module.split(".")[0]
                assert not package.is_dir(), f"{file.name}, line {node.lineno}: {node.module}"


def test_the_protocol_needs_three_packages_and_no_more() -> None:
    used = set().union(*map(imported, (ROOT / "protocol").rglob("*.py")))
    assert used - set(sys.stdlib_module_names) - {"track4d_protocol"} == {"numpy", "zmq", "msgpack"}


def test_the_check_sees_an_import_inside_a_function(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("def f():\n    from bpy.types import Object\n    return Object\n")
    assert imported(file) == {"bpy"}
