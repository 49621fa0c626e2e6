"""How often do the senses of `real_verbs.py` tell the verb of a true motion? What they say of generated ones is read by that.

    python tools/extract_clips.py FOLDER clips && python benchmarks/true_verbs.py clips

First, of every mesh that has several clips of a verb, each of them among all the others of that mesh: the same animator, the
same body. Then true clips of other bodies of a kind, carried over by place in the bounding box and told among the body's own
clips: to the training's own meshes, from those of other sets; and to the models of `real_verbs.py`: what a generator would do
that knew those bodies by heart and nothing else.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import real_verbs
from scipy.spatial import cKDTree

FRAMES = 16
POINTS = 500  # of a surface, at random by area, where many clips are carried over
KINDS = (  # meshes of a kind; clips are not carried over between those that no comma parts: many have one rig, and the same clips
    "alpaca bull husky stag, cow zebra, rat cat, frog pig sheep",
    "man_casual woman_dress woman_smooth alien, warrior, zombie skeleton, astronaut_frog, cyberpunk_hero, mini_woman, "
    "block_robot banana",
    "trex triceratops apatosaurus stegosaurus velociraptor, kaiju",
    "anglerfish swordfish lionfish, dolphin whale, piranha",
    "wyvern bat, eagle, bird, bee",
    "spider_tall, crab, skull_monster",
    "robot_2legs robot_ball, drone flying_alien",
)
ALIKE = {
    "fox": "alpaca bull husky stag cow cat rat zebra",
    "gull": "bird bat wyvern eagle",
    "shark": "dolphin whale anglerfish lionfish piranha swordfish",
    "spider": "spider_tall crab",
    "robot_expressive": "alien cyberpunk_hero man_casual woman_dress woman_smooth mini_woman warrior zombie skeleton "
    "astronaut_frog block_robot",
}


def as_sampled(poses: np.ndarray) -> np.ndarray:
    """A clip [P, N, 3] as `FRAMES` frames."""
    return poses[np.round(np.arange(FRAMES) / FRAMES * len(poses)).astype(int) % len(poses)]


def among_own(folder: Path) -> dict[str, list[list[bool]]]:
    """By verb: whether each sense is right about a clip among the others of its mesh."""
    told: dict[str, list[list[bool]]] = {}
    for path in sorted(folder.glob("*.npz")):
        if set("~^") & set(path.stem):  # other bodies, with the same motions
            continue
        data = np.load(path)
        verbs, clips = [str(verb) for verb in data["verbs"]], data["clips"].astype(np.float32)
        shares = real_verbs.areas(data["rest"], data["faces"])
        for k, verb in enumerate(verbs):
            if verbs.count(verb) > 1 and len(set(verbs)) > 1:
                others = [(verbs[j], [clips[j]]) for j in range(len(verbs)) if j != k]
                answers = real_verbs.nearest(as_sampled(clips[k]), others, shares)
                told.setdefault(verb, []).append([answer == verb for answer in answers])
    return told


def unit(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places in the bounding box, [N, 3] in 0..1, and its size [3]."""
    low, high = points.min(0), points.max(0)
    return (points - low) / (high - low), high - low


def carried_over(
    sources: list[dict[str, np.ndarray]], rest: np.ndarray, own: list[tuple[str, list[np.ndarray]]], shares: np.ndarray
) -> dict[str, list[list[bool]]]:
    """By verb: whether each sense is right about a clip of another body, carried over to a body at rest [N, 3]."""
    places, size = unit(rest)
    told: dict[str, list[list[bool]]] = {}
    for data in sources:
        other_places, other_size = unit(data["rest"])
        near = cKDTree(other_places).query(places, k=3)[1]
        for verb, poses in zip(map(str, data["verbs"]), data["clips"].astype(np.float32)):
            if verb in [name for name, _ in own]:
                motion = as_sampled(poses - poses.mean(0))[:, near].mean(2) * (size / other_size)
                answers = real_verbs.nearest(rest + motion, own, shares)
                told.setdefault(verb, []).append([answer == verb for answer in answers])
    return told


def among_alike(folder: Path) -> list[np.ndarray]:
    """For every mesh of the training with three verbs or more, and every verb: how often each sense is right about clips of
    other sets."""
    means = []
    for kind in KINDS:
        rigs = [[dict(np.load(folder / f"{stem}.npz")) for stem in rig.split()] for rig in kind.split(",")]
        for rig in rigs:
            sources = [data for other in rigs if other is not rig for data in other]
            for data in rig:
                if len(set(map(str, data["verbs"]))) < 3:
                    continue
                shares = real_verbs.areas(data["rest"], data["faces"])
                some = np.random.default_rng(0).choice(len(shares), POINTS, p=shares)
                rest, clips = data["rest"][some], data["clips"][:, :, some].astype(np.float32)
                own = real_verbs.with_sides(map(str, data["verbs"]), clips, rest)
                told = carried_over(sources, rest, own, np.full(POINTS, 1 / POINTS))
                means += [np.mean(rows, 0) for rows in told.values()]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="folder written by tools/extract_clips.py")
    folder = parser.parse_args().clips
    row = "| {} | {} | " + " | ".join("{:.2f}" for _ in real_verbs.SENSES) + " |"
    print(f"| mesh, verb | clips | {' | '.join(real_verbs.SENSES)} |\n|---|---:" + "|---:" * len(real_verbs.SENSES) + "|")
    own = among_own(folder)
    for verb, rows in own.items():
        print(row.format(f"its own others, {verb}", len(rows), *np.mean(rows, 0)), flush=True)
    alike = among_alike(folder)
    means = []
    with tempfile.TemporaryDirectory() as out:
        for asset in real_verbs.CASES:
            model = real_verbs.extracted(asset, Path(out))
            sources = [dict(np.load(folder / f"{stem}.npz")) for stem in ALIKE[asset].split()]
            shares = real_verbs.areas(model["rest"], model["faces"])
            clips = real_verbs.with_sides(real_verbs.CASES[asset][1].values(), model["clips"], model["rest"])
            told = carried_over(sources, model["rest"], clips, shares)
            for verb, rows in told.items():
                means.append(np.mean(rows, 0))
                print(row.format(f"{asset}, {verb}", len(rows), *means[-1]), flush=True)
    everything = [told for rows in own.values() for told in rows]
    print(row.format("**all of its own others**", len(everything), *np.mean(everything, 0)))
    print(row.format("**carried over among the training's meshes**, mean of their verbs", len(alike), *np.mean(alike, 0)))
    print(row.format("**all carried over to the models**, mean of prompts", len(means), *np.mean(means, 0)))


if __name__ == "__main__":
    main()
