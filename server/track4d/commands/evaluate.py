"""`track4d evaluate`: is an evaluation set whole, and how well do results of it stand up?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


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
    headings = ["asset", "prompt", "vertices", "Gaussians", "PSNR", "IoU"]
    headings += ["frames", "start PSNR", "start IoU", "motion", "roughness", "stretch"] if results is not None else []
    table = Table(*headings, box=None)
    for name, figures in found.items():
        table.add_row(*map(Text, _row(name, figures, len(headings))))
    console.print(table)
    for name, problem in problems:
        console.print(Text(f"{name}: {problem.message} {problem.action}", "red"), soft_wrap=True)
    if report is not None:
        report.write_text(json.dumps(found, indent=1), "utf-8")
    if problems:
        raise typer.Exit(1)


def _row(name: str, figures: dict[str, Any], columns: int) -> list[str]:
    """The cells of one asset; what is not known is a dash."""
    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    cells = [name]
    if "gaussians_look" in figures:
        look = figures["gaussians_look"]
        cells += [figures["prompt"], str(figures["vertices"]), str(figures["gaussians"]), shown(look["psnr"], 1),
                  shown(look["iou"], 3)]
    if "result_look" in figures:
        look, motion = figures["result_look"], figures["motion"]
        cells += [str(motion["frames"]), shown(look["psnr"], 1), shown(look["iou"], 3), shown(motion["size"], 3),
                  shown(motion["roughness"], 2), shown(motion["stretch"], 2)]
    return cells + ["-"] * (columns - len(cells))
