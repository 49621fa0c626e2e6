"""`track4d probe`: which block's features of the video U-Net track points best."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def probe(
    weights: Annotated[Path | None, typer.Option(help="File of a small network, or folder of the converted published model; the "
                                                      "shipped small one by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of shards or MV-Video's JSON list; else procedural clips.")] = None,
    clips: Annotated[int, typer.Option(help="How many held-out clips.", min=1)] = 16,
    views: Annotated[int, typer.Option(help="Of each.", min=1)] = 4,
    frames: Annotated[int, typer.Option(help="Of each.", min=2)] = 16,
    step: Annotated[int, typer.Option(help="Training step of the slight noise, of 1000.", min=0, max=999)] = 20,
    heat: Annotated[Path | None, typer.Option(help="Picture to write with the similarity maps of the best features.")] = None,
    seed: Annotated[int, typer.Option(help="Other clips.")] = 0,
) -> None:
    """Track points by the features of every block, and say which block does it best (Track4DGen, Fig. 3)."""
    from rich.console import Console

    from ..training.probe import STANDING_STILL, heat_maps, score_table, track_errors
    from ..training.video_data import ClipShape
    from ..video.checkpoints import load_published
    from ..video.features import load_small
    from .train_video import open_clips

    model = load_published(weights) if weights and weights.is_dir() else load_small(weights)
    source, shape = open_clips(data, True, False), ClipShape(views, frames, model.size)
    drawn = [source(seed, position, shape) for position in range(clips)]
    scores = track_errors(model, drawn, step=step)
    console = Console(highlight=False)
    console.print(score_table(scores, model.unet.config.temporal_feature))
    best = min((score for score in scores if score.name != STANDING_STILL), key=lambda score: score.error)
    console.print(f"best: {best.name} (error {best.error:.2f} % of the picture's side, PCK {best.pck:.2f})")
    if heat:
        import cv2

        names = list(dict.fromkeys((model.unet.config.temporal_feature, best.name, "mid_block")))
        cv2.imwrite(str(heat), heat_maps(model, drawn[0], names, step=step)[..., ::-1])
        console.print(f"wrote {heat}")
