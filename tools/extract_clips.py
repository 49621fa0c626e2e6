"""Vertex trajectories of captioned, animated GLB files, as the generator's training reads them. Needs bpy.

    python tools/extract_clips.py FOLDER OUT [--verbs walk run ...] [--bodies 9] [--puppets 12]

FOLDER holds the GLB files and `captions.json`:
{file: {"noun": ..., "front": "-Y", "clips": {name: {"verb": ..., "loops": ...}}}}; "front" may be left out.
OUT gets one .npz per file: faces [T, 3]; rest [N, 3]; clips [C, 24, N, 3], each resampled to 24 poses over its length,
canonical orientation and scale, root drift removed; verbs [C]; loops [C]; noun.
With --bodies, as many other bodies of random proportions do the same, each in a file of its own; with --puppets, so do as many
bodies made anew of simple solids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import bpy
import numpy as np
from track4d.training.bodies import other_body
from track4d.training.puppets import puppet
from track4d_addon.trajectories import open_animated, play
from track4d_protocol import space

POSES = 24
PUPPET_SEED = 7
MOST_VERTICES = 13000
FRONTS = {"cat.glb": "+X", "slime.glb": "+X", "eagle.glb": "+Y"}  # all others face -Y
# Caption to the generator's verb.
VERBS = {"crawl": "walk", "death": "die", "hit": "get hit", "shake head": "shake the head"}
VERBS |= {
    name: name
    for name in "walk run jump fly swim wave dance nod spin bounce attack idle punch kick sit eat roll crouch turn clap".split()
}
CYCLIC = {"walk", "run", "fly", "swim", "idle"}


def visible_meshes() -> list[bpy.types.Object]:
    """The asset's meshes without the importer's bone shapes."""
    shapes = {bone.custom_shape for thing in bpy.data.objects if thing.type == "ARMATURE" for bone in thing.pose.bones}
    return sorted(
        (
            thing
            for thing in bpy.context.view_layer.objects
            if thing.type == "MESH" and thing not in shapes and not thing.hide_render
        ),
        key=lambda thing: thing.name,
    )


def snapshot(meshes: list[bpy.types.Object]) -> tuple[np.ndarray, np.ndarray]:
    """World positions [N, 3] after all modifiers, and triangles [T, 3]."""
    graph = bpy.context.evaluated_depsgraph_get()
    positions, triangles, count = [], [], 0
    for thing in meshes:
        evaluated = thing.evaluated_get(graph)
        mesh = evaluated.to_mesh()
        flat = np.empty(len(mesh.vertices) * 3, np.float32)
        mesh.vertices.foreach_get("co", flat)
        mesh.calc_loop_triangles()
        corners = np.empty(len(mesh.loop_triangles) * 3, np.int32)
        mesh.loop_triangles.foreach_get("vertices", corners)
        matrix = np.array(evaluated.matrix_world)
        positions.append(flat.reshape(-1, 3) @ matrix[:3, :3].T + matrix[:3, 3])
        triangles.append(corners.reshape(-1, 3) + count)
        count += len(mesh.vertices)
        evaluated.to_mesh_clear()
    return np.concatenate(positions), np.concatenate(triangles)


def animated() -> list:
    """Everything that carries animation: objects and shape keys."""
    blocks = list(bpy.data.objects) + list(bpy.data.shape_keys)
    return [block for block in blocks if block.animation_data is not None]


def extract(path: Path, caption: dict, verbs: set[str]) -> dict | None:
    """The file's trajectories; None where it has no clip of these verbs or too many vertices."""
    wanted = {name: clip for name, clip in caption["clips"].items() if VERBS.get(clip["verb"]) in verbs}
    if not wanted:
        return None
    default = open_animated(path)
    meshes, blocks = visible_meshes(), animated()
    strips: dict[str, list] = {}
    for block in blocks:
        for track in block.animation_data.nla_tracks:
            for strip in track.strips:
                strips.setdefault(track.name, []).append((block, strip.action, strip.action_slot))
        block.animation_data.action = None
        block.animation_data.use_nla = False
    for thing in bpy.data.objects:
        if thing.type == "ARMATURE":
            thing.data.pose_position = "REST"
    bpy.context.view_layer.update()
    rest, faces = snapshot(meshes)
    if len(rest) > MOST_VERTICES:
        return None
    for thing in bpy.data.objects:
        if thing.type == "ARMATURE":
            thing.data.pose_position = "POSE"
    similarity = space.canonical_similarity(rest, caption.get("front", FRONTS.get(path.name, "-Y")))
    clips, names, loops = [], [], []
    for name, clip in wanted.items():
        if name not in strips:
            continue
        play(set(blocks), strips[name], default)
        first = min(action.frame_range[0] for _, action, _ in strips[name])
        last = max(action.frame_range[1] for _, action, _ in strips[name])
        poses = []
        for frame in np.linspace(first, last, POSES, endpoint=not clip["loops"]):
            bpy.context.scene.frame_set(int(frame), subframe=float(frame - int(frame)))
            positions, _ = snapshot(meshes)
            poses.append(similarity.apply(positions))
        trajectory = np.stack(poses)
        drift = trajectory.mean(1)[-1] - trajectory.mean(1)[0]
        drift[2] = 0
        if np.linalg.norm(drift) > 0.3:
            trajectory -= np.linspace(0, 1, POSES)[:, None, None] * drift
        if trajectory.shape[1] != len(rest) or not np.isfinite(trajectory).all():
            continue
        clips.append(trajectory.astype(np.float32))
        names.append(VERBS[clip["verb"]])
        loops.append(bool(clip["loops"]) or names[-1] in CYCLIC)
    if not clips:
        return None
    return {
        "faces": faces.astype(np.int32),
        "rest": similarity.apply(rest),
        "clips": np.stack(clips).astype(np.float16),
        "verbs": np.array(names),
        "loops": np.array(loops),
        "noun": np.array(caption["noun"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--verbs", nargs="+", default=sorted(set(VERBS.values())))
    parser.add_argument("--bodies", type=int, default=0)
    parser.add_argument("--puppets", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    captions = json.loads((arguments.folder / "captions.json").read_text())
    for name, caption in captions.items():
        found = extract(arguments.folder / name, caption, set(arguments.verbs))
        if found is not None:
            stem, clips = Path(name).stem, found["clips"].astype(np.float32)
            np.savez(arguments.out / f"{stem}.npz", **found)
            bodies = [(found["rest"], clips)]
            for k in range(arguments.bodies):
                rng = np.random.default_rng([len(name), *name.encode(), k])
                rest, other = other_body(found["rest"], found["faces"], clips, rng)
                bodies.append((rest, other))
                np.savez(arguments.out / f"{stem}~{k}.npz", **found | {"rest": rest, "clips": other.astype(np.float16)})
            for k in range(arguments.puppets):
                rng = np.random.default_rng([PUPPET_SEED, *name.encode(), k])
                rest, other = bodies[int(rng.integers(len(bodies)))]
                rest, faces, other = puppet(rest, found["faces"], other, rng)
                body = {"rest": rest, "faces": faces, "clips": other.astype(np.float16)}
                np.savez(arguments.out / f"{stem}^{k}.npz", **found | body)
            print(name, len(found["rest"]), "vertices,", ", ".join(found["verbs"]), flush=True)


if __name__ == "__main__":
    main()
