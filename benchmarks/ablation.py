"""What each tracking loss is worth (Track4DGen, Table 4 left, at small scale): full, without correspondence, without position.

python benchmarks/ablation.py [--out runs/ablation] [--base-steps 300] [--steps 100] [--seeds 3] [--clips 16]

All variants start from one base that was trained with the diffusion loss alone, and see the same clips. A run that was stopped
goes on where it was. Scores are of the supervised features, on held-out procedural objects, over points that move.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from track4d.training.probe import STANDING_STILL, track_errors
from track4d.training.video import VideoTraining, train
from track4d.training.video_data import ClipShape, Procedural
from track4d.video.features import FEATURE_UNET, load_small
from track4d.video.multiview_video import MultiViewVideo
from track4d.video.unet import MultiViewUNet

# Weights of the correspondence and of the position loss.
VARIANTS = {"full": (0.1, 10.0), "w/o correspondence": (0.0, 10.0), "w/o position": (0.1, 0.0)}
BASE_SEED = 1000  # the base sees other clips than the variants


def trained(out: Path, start: Path | None, settings: VideoTraining) -> tuple[Path, float]:
    """The weights of a training, and the CPU seconds that it took just now."""
    torch.manual_seed(BASE_SEED)
    model = load_small(start) if start else MultiViewVideo(MultiViewUNet(FEATURE_UNET))
    begun = time.process_time()
    return train(out, model, Procedural(), settings, resume=True, workers=0), time.process_time() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--base-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shape = ClipShape(4, 8, 64)
    held_out = [Procedural(validation=True)(0, position, shape) for position in range(arguments.clips)]
    feature = FEATURE_UNET.temporal_feature

    base, _ = trained(arguments.out / "base", None, VideoTraining.small(steps=arguments.base_steps, seed=BASE_SEED,
                                                                        correspondence=0.0, position=0.0))
    results: dict[str, list[dict]] = {"base": [asdict(track_errors(load_small(base), held_out, [feature])[0])]}
    for seed in range(arguments.seeds):
        for name, (correspondence, position) in VARIANTS.items():
            folder = arguments.out / f"{name.replace('w/o', 'without').replace(' ', '_')}_{seed}"
            record = folder / f"scores_{arguments.steps}_{arguments.clips}.json"
            if not record.exists():
                settings = VideoTraining.small(steps=arguments.steps, seed=seed, correspondence=correspondence, position=position)
                weights, seconds = trained(folder, base, settings)
                score = track_errors(load_small(weights), held_out, [feature])[0]
                record.write_text(json.dumps(asdict(score) | {"cpu_seconds": round(seconds)}))
            results.setdefault(name, []).append(json.loads(record.read_text()))

    still = track_errors(load_small(base), held_out, [feature])[-1]
    assert still.name == STANDING_STILL
    columns = ("error", "pck", "centred_error", "centred_pck", "likeness", "contrast")
    print(f"| {len(held_out)} clips, {still.points} points | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    print(f"| standing still | {still.error:.2f} | {still.pck:.2f} |" + " |" * (len(columns) - 2))
    for name, scores in results.items():
        cells = []
        for column in columns:
            values = [score[column] for score in scores]
            cells.append(f"{np.mean(values):.2f}" + (f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""))
        print(f"| {name} | " + " | ".join(cells) + " |")
    means = {name: np.mean([score["error"] for score in results[name]]) for name in VARIANTS}
    print("\nby error, best first: " + ", ".join(sorted(means, key=lambda name: means[name])))
    wins = {other: sum(mine["error"] < theirs["error"] for mine, theirs in zip(results["full"], results[other]))
            for other in list(VARIANTS)[1:]}
    print("seeds in which full is better: " + ", ".join(f"{other} {count} of {arguments.seeds}" for other, count in wins.items()))


if __name__ == "__main__":
    main()
