"""Does a real model, never trained on, do what the sentence says? The nearest of its own true clips decides.

    python benchmarks/real_verbs.py [--weights FILE] [--samples 2]

Every asset is animated from its rest pose by every verb that it has a clip of. A sample counts as the verb of the clip that
is nearest to it at the clip's best phase and speed, in three senses: by the angle between both motions (the whole surface
about its own mean over time, whatever the size: is it that kind of motion? which can't tell idling from a large motion that
it resembles), by their mean distance (which favours small motions: to one that is not quite in step, standing still is
nearer), and by their concordance (Lin 1989: kind and size). Of a motion with a side its mirror image counts too: who waves
the other hand waves. How often these senses tell the verb of true motions `true_verbs.py` says.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "shared" / "assets"
POSES = 24

# asset: noun, {clip: verb}
CASES = {
    "fox": ("fox", {"Run": "run", "Walk": "walk", "Survey": "look around"}),
    "gull": ("gull", {"Walk": "walk", "Idle": "idle", "Flap": "fly"}),
    "robot_expressive": ("robot", {
        "Yes": "nod", "Wave": "wave", "Walking": "walk", "Running": "run", "Sitting": "sit", "Punch": "punch",
        "No": "shake the head", "Jump": "jump", "Idle": "idle", "Death": "die", "Dance": "dance",
    }),
    "shark": ("shark", {"Swim Horizontal": "swim", "Swim Vertical": "swim", "Idle": "idle", "Hit": "get hit", "Bite": "attack"}),
    "spider": ("spider", {
        "Walk": "walk", "Jump": "jump", "Idle": "idle", "Hit": "get hit", "Eating": "eat", "Death": "die", "Death 2": "die",
        "Attack": "attack", "Bite": "attack",
    }),
}
SENSES = ("angle", "distance", "concordance")
CYCLIC = ("walk", "run", "fly", "swim", "idle", "dance")


def extract(asset: str, out: Path) -> None:
    """Rest pose, clips and surface of one asset, canonical; needs bpy."""
    import bpy
    from clips import evaluated, load, mesh_objects, own_pose, play, set_pose, surface
    from track4d_protocol import space

    path = ASSETS / f"{asset}.glb"
    state = own_pose(path)
    load(path)
    objects = mesh_objects()
    moving = {}
    for clip in CASES[asset][1]:
        first, last = play(clip, state)
        poses = []
        for k in range(POSES):
            moment = first + (last - first) * k / POSES
            bpy.context.scene.frame_set(math.floor(moment), subframe=moment - math.floor(moment))
            poses.append(evaluated(objects))
        moving[clip] = np.stack(poses)
    for item in [*bpy.data.objects, *bpy.data.shape_keys]:
        if item.animation_data:
            item.animation_data.action = None
    set_pose(state)
    rest = evaluated(objects)
    similarity = space.canonical_similarity(rest, "-Y")
    clips = np.stack([similarity.apply(poses) for poses in moving.values()])
    np.savez(out, rest=similarity.apply(rest), clips=clips, **surface(objects))


def extracted(asset: str, folder: Path) -> dict[str, np.ndarray]:
    """What `extract` writes, by a process of its own because of bpy."""
    file = folder / f"{asset}.npz"
    subprocess.run([sys.executable, __file__, "--extract", asset, str(file)], check=True, capture_output=True)
    return dict(np.load(file))


def with_sides(verbs: Iterable[str], clips: np.ndarray, rest: np.ndarray) -> list[tuple[str, list[np.ndarray]]]:
    """Each verb and its clip [P, N, 3] of a body at rest [N, 3], with the mirror image where the verb has a side."""
    from track4d.training.actions import SIDED

    return [(verb, [poses, mirrored(rest, poses)] if verb in SIDED else [poses]) for verb, poses in zip(verbs, clips)]


def areas(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Each vertex' share of the surface, [N]."""
    corners = vertices[faces]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    shares = np.bincount(faces.reshape(-1), np.repeat(area, 3), len(vertices))
    return shares / shares.sum()


def distances(motion: np.ndarray, poses: np.ndarray, cyclic: bool, shares: np.ndarray) -> np.ndarray:
    """How far a motion [F, N, 3] is from a clip [P, N, 3] at its best phase and speed, in each of `SENSES`.

    1 - cosine, mean distance, and 1 - 2 a.b / (a.a + b.b).
    """
    weights = np.sqrt(shares)[:, None]
    motion, poses = motion * weights, poses * weights
    flat, clip = motion.reshape(len(motion), -1), poses.reshape(len(poses), -1)
    between, own, others = flat @ clip.T, flat @ flat.T, clip @ clip.T
    free = motion - motion.mean(0)
    frames = np.arange(len(motion)) / len(motion)
    found = []
    for rate in (0.5, 0.75, 1.0, 1.5, 2.0, 3.0) if cyclic else (0.6, 0.8, 1.0, 1.4, 2.0):
        for start in np.arange(0, 1, 1 / 12) if cyclic else (0.0, 0.1):
            phase = start + rate * frames
            place = np.mod(phase, 1.0) if cyclic else np.minimum(phase, 1 - 1 / POSES)
            chosen = np.round(place * POSES).astype(int) % POSES
            product, mine, its = (about_mean(each) for each in (between[:, chosen], own, others[np.ix_(chosen, chosen)]))
            gap = np.linalg.norm(free - (poses[chosen] - poses[chosen].mean(0)), axis=-1)
            found.append((
                1 - product / max(math.sqrt(max(mine * its, 0)), 1e-9),
                float((gap * weights[:, 0]).sum() / len(motion)),
                1 - 2 * product / max(mine + its, 1e-9),
            ))
    return np.min(found, 0)


def nearest(motion: np.ndarray, clips: list[tuple[str, list[np.ndarray]]], shares: np.ndarray) -> list[str]:
    """The verb of the clip that is nearest to a motion [F, N, 3] in each sense; of a clip, [P, N, 3], mirror images count."""
    found = [
        np.min([distances(motion, poses, verb in CYCLIC, shares) for poses in sides], 0)
        for verb, sides in clips
    ]
    return [clips[k][0] for k in np.argmin(found, 0)]


def about_mean(products: np.ndarray) -> float:
    """The scalar product of two sequences [F], each about its own mean, from those of all their elements [F, F]."""
    return float(np.trace(products) - products.sum() / len(products))


def mirrored(rest: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """A clip [P, N, 3] with left and right exchanged: each vertex does what the one opposite did."""
    flip = np.array([1, -1, 1], np.float32)
    _, opposite = cKDTree(rest).query(rest * flip)
    return rest + (poses - rest)[:, opposite] * flip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extract", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    arguments = parser.parse_args()
    if arguments.extract:
        extract(arguments.extract[0], Path(arguments.extract[1]))
        return
    import torch
    from track4d.geometry import zbuffer
    from track4d.geometry.mesh import Mesh
    from track4d.training.objects import light
    from track4d.video.generator import MotionGenerator
    from track4d.video.text import VERBS
    from track4d_protocol import space

    phrases = {verb.name: verb.phrases[0] for verb in VERBS}
    torch.set_num_threads(1)
    chosen = MotionGenerator.load(arguments.weights) if arguments.weights else None
    viewmats, size = space.orbit_viewmats(), 128
    Ks = space.intrinsics(size, 4)
    prompts, right = 0, [0] * len(SENSES)
    print(f"| asset | verb | {' | '.join(f'by {sense} | right' for sense in SENSES)} |")
    print("|---|---" + "|---|---:" * len(SENSES) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for asset in arguments.only:
            noun, clips = CASES[asset]
            data = extracted(asset, Path(folder))
            truths = with_sides(clips.values(), data["clips"], data["rest"])
            mesh = Mesh(data["rest"], data["faces"], data["uvs"], data["materials"], list(data["textures"]))
            shading = light(mesh.vertices, mesh.faces, np.random.default_rng(0)).repeat(3, 1).astype(np.float32)
            rgba = zbuffer.render(mesh, mesh.vertices[None], viewmats, Ks, size, shading=shading)[0]
            views = (zbuffer.straight(rgba).clip(0, 1) * 255 + 0.5).astype(np.uint8)
            shares = areas(mesh.vertices, mesh.faces)
            for verb in dict.fromkeys(clips.values()):
                answers: list[list[str]] = [[] for _ in SENSES]
                for seed in range(arguments.samples):
                    prompt = f"the {noun} {phrases[verb]}"
                    generator = chosen or MotionGenerator.shipped(prompt)
                    motion = generator.generate(mesh, views, viewmats, Ks, prompt, steps=arguments.steps, seed=seed)
                    for answer, told in zip(answers, nearest(motion.tracks, truths, shares)):
                        answer.append(told)
                hits = [sum(answer == verb for answer in one) for one in answers]
                prompts, right = prompts + arguments.samples, [a + b for a, b in zip(right, hits)]
                cells = [f"{', '.join(one)} | {hit}/{arguments.samples}" for one, hit in zip(answers, hits)]
                print(f"| {asset} | {verb} | {' | '.join(cells)} |", flush=True)
    for sense, count in zip(SENSES, right):
        print(f"recognised by {sense}: {count} of {prompts} = {count / prompts:.0%}")


if __name__ == "__main__":
    main()
