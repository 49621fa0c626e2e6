"""`track4d evaluate`: is an evaluation set whole, and how well do results of it stand up?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Cell = Callable[[str, dict[str, Any]], str]


def _number(part: str, name: str, digits: int) -> Cell:
    """What a column says of an asset's figures; what is not known is a dash."""

    def cell(_asset: str, figures: dict[str, Any]) -> str:
        value = figures.get(part, {}).get(name)
        return "-" if value is None else f"{value:.{digits}f}"

    return cell


WORDS = ("asset", "prompt")
STILL: dict[str, Cell] = {
    "asset": lambda asset, _: asset,
    "prompt": lambda _, figures: figures.get("prompt", "-"),
    "vertices": lambda _, figures: str(figures.get("vertices", "-")),
    "Gaussians": lambda _, figures: str(figures.get("gaussians", "-")),
    "PSNR": _number("gaussians_look", "psnr", 1),
    "IoU": _number("gaussians_look", "iou", 3),
}
MOVING: dict[str, Cell] = {name: STILL[name] for name in ("asset", "PSNR", "IoU")} | {
    "frames": _number("motion", "frames", 0),
    "start PSNR": _number("result_look", "psnr", 1),
    "start IoU": _number("result_look", "iou", 3),
    "motion": _number("motion", "size", 3),
    "roughness": _number("motion", "roughness", 2),
    "stretch": _number("motion", "stretch", 2),
}


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="Folder that `track4d bake-lighting` wrote.")],
    results: Annotated[Path | None, typer.Option(help="Folder with NAME.glb, NAME.t4d or NAME_0001.ply, ... of the "
                                                 "set's assets.")] = None,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Of the pictures that are compared, in pixels.")] = 512,
    report: Annotated[Path | None, typer.Option(help="File to write the same figures to, as JSON.")] = None,
) -> None:
    """Check an evaluation set, and measure results of it: how true to the asset they begin, and how they move."""
    import json
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from track4d_protocol.errors import InputError

    from ..evaluation import asset_folders, find_result, look, measure, read_asset

    if results is not None and not results.is_dir():
        raise InputError("missing_folder", f"The folder '{results}' isn't there.", "Check its name.")
    console = Console(highlight=False)
    found: dict[str, dict[str, Any]] = {}
    problems = []
    for path in asset_folders(folder):
        figures: dict[str, Any] = {}
        found[path.name] = figures
        try:
            asset = read_asset(path)
            figures |= {name: asset.manifest[name] for name in ("prompt", "vertices", "gaussians", "samples")}
            figures["gaussians_look"] = asdict(look(asset, asset.splats, size))
            result = find_result(results, path.name) if results is not None else None
            if result is not None:
                figures["motion"] = asdict(measure(result))
                figures["result_look"] = asdict(look(asset, result, size))
            elif results is not None:
                raise InputError("no_result", f"'{results}' has no result of '{path.name}'.",
                                 f"Put {path.name}.glb, {path.name}.t4d or {path.name}_0001.ply, ... there.")
        except InputError as error:
            figures["error"] = error.to_dict()
            problems.append((path.name, error))
    columns = STILL if results is None else MOVING
    table = Table(box=None)
    for heading in columns:
        table.add_column(heading, **({"overflow": "fold"} if heading in WORDS else {"justify": "right", "no_wrap": True}))
    for name, figures in found.items():
        table.add_row(*(Text(columns[heading](name, figures)) for heading in columns))
    console.print(table)
    for name, problem in problems:
        console.print(Text(f"{name}: {problem.message} {problem.action}", "red"), soft_wrap=True)
    if report is not None:
        report.write_text(json.dumps(found, indent=1), "utf-8")
    if problems:
        raise typer.Exit(1)
