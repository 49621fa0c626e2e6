"""Track4DGen from a captured object to its motion: the paper's Figure 1 on one page."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from track4d_protocol import __version__
from track4d_protocol.errors import InputError
from track4d_protocol.messages import Request, Result, check_request
from track4d_protocol.space import BACKGROUND, Similarity, canonical_similarity

from .gaussians.appearance import Sitting, drawn_sittings, refine_appearance, still_psnr
from .gaussians.cloud import Cloud, seed_cloud
from .gaussians.light import fit_light, resample_sh
from .gaussians.spherical_harmonics import rotate_sh, sh_from_colors
from .geometry.mesh import Mesh, check_mesh
from .geometry.zbuffer import over, render, scale_intrinsics
from .motion.appearance import estimate_shading
from .motion.direction import directed, is_cycle, looped
from .motion.field import quaternion_product
from .motion.fit import Tracks3D, fit_motion
from .motion.footage import MOST_VIEWS, WORKING_SIZE, Footage, read_footage
from .motion.reconstruct import reconstruct_motion
from .motion.refine import object_pictures, refine_motion
from .motion.sds import motion_prior, video_prior
from .presets import FITTED_FRAMES, PRESETS, Preset
from .progress import JobReport, Report
from .video.checkpoints import open_published
from .video.generator import STEPS, MotionGenerator, decode_video
from .video.multiview_video import MultiViewVideo, fitted, on_background
from .video.text import count_tokens, in_manner, length_warnings

# What a job takes at its peak, measured; bytes. The registration plans its own share (`fit.check_memory`).
PIXEL_BYTES = 48  # of the video at the size the fit works with: its footage, and the refinement's pictures in float32
DRAWN_BYTES = 24  # of a video that is drawn: RGBA in float32 and in bytes
GAUSSIAN_BYTES, VERTEX_BYTES = 64, 36  # of each in each frame of the result
FILMED = 8  # frames drawn at a time: all of a long film in float32 would take gigabytes
MODEL_TITLES = {"motion": "Track4D motion, shipped weights", "published": "MV-VDM, published weights"}
PINNED = 0.5  # vertices held more than this keep their shape while the motion is refined


def run(request: Request, report: JobReport, checkpoint: Path | None = None) -> Result:
    """Animates the request's mesh by its prompt, or by its video.

    Args:
        request: mesh, pictures, cameras and settings in the user's space.
        report: gets the progress; may raise `Cancelled`.
        checkpoint: file of this request alone, from which a run that was interrupted goes on.

    Returns:
        The mesh's vertices over time in the user's space, the Gaussians bound to it, a video of both, and the report.

    Raises:
        InputError: something in the request can't be used.
    """
    clock = Clock(report)
    check_request(request)
    settings, quality = request.settings, PRESETS[request.settings.preset]
    check_memory(request, quality)

    with clock("canonicalise"):
        mesh, similarity = canonical_mesh(request)
        viewmats = similarity.viewmats_to_canonical(request.arrays["viewmats"])  # [V, 4, 4]
        Ks = np.asarray(request.arrays["Ks"], np.float32)  # [V, 3, 3]
        pin = request.arrays.get("pin")  # [N]
    if settings.task == "fit":
        seen = given(request, mesh, viewmats, Ks)
    else:
        with clock("generate"):  # Stage One
            generate = painted if settings.model == "published" else imagined
            seen = generate(request, mesh, viewmats, Ks, similarity, report)
    footage, tracks, warnings = seen.footage, seen.tracks, list(seen.warnings)

    captured = still_sitting(mesh, seen.stills, viewmats, seen.Ks)
    with clock("fit"):  # Stage Two
        if quality.paper is None:
            field = fit_motion(mesh, seen.video, seen.viewmats, seen.video_Ks, seen.shading, tracks, quality.fit, settings.seed,
                               report)
            warnings += field.warnings
        else:
            cloud = surface_gaussians(mesh, captured, seen.shading, quality, settings.seed)
            features = diffusion_features(footage, settings.prompt, settings.seed)
            found = reconstruct_motion(mesh, cloud, footage, quality.paper, features, **prior(request, mesh, viewmats, seen),
                                       seed=settings.seed, checkpoint=checkpoint, report=report)
            field, sh = found.field, found.coefficients
        if settings.loop and is_cycle(field.vertices):
            field = replace(field, loops=True)
        report("fit", 1, 1, motion=similarity.invert(field.vertices))
    if tracks is None and quality.paper is None:  # a video of tracks shows these and nothing else: no more to be learnt
        with clock("refine"):
            refining = quality.refine.rounds * quality.refine.steps > 0
            features = diffusion_features(footage, settings.prompt, settings.seed) if refining else None
            field = refine_motion(mesh, field, footage, seen.shading, quality.refine, features,
                                  pinned=None if pin is None else pin > PINNED, seed=settings.seed, checkpoint=checkpoint,
                                  report=report).field
    with clock("appearance"):
        if quality.paper is None:
            cloud = surface_gaussians(mesh, captured, seen.shading, quality, settings.seed, field.vertices)
            sh = sh_from_colors(cloud.colors)  # [G, K, W, 3]
            if tracks is None and quality.color_steps:
                terms = 1 if settings.loop else quality.sh_terms  # cosines over the clip don't end where they began
                cloud, sh, _ = fit_light(cloud, mesh.faces, field.vertices, object_pictures(footage), footage.masks,
                                         footage.viewmats, footage.Ks, quality.sh_degree, terms, quality.color_steps,
                                         settings.seed, report=report)
        fidelity = still_psnr(cloud, mesh.faces, captured)

    with clock("sample"):
        strength = settings.strength if tracks is None else 1.0  # tracks have it already
        field = looped(field) if settings.loop else field
        vertices = field.sample(np.linspace(-1, 1, settings.frames))  # [F, N, 3]
        vertices = directed(vertices, strength, keep_root=settings.keep_root, pin=pin)
        means, quats = cloud.pose(torch.from_numpy(mesh.faces), torch.from_numpy(vertices))  # [F, G, 3], [F, G, 4]
        rendered = film(mesh, vertices, seen.viewmats, seen.Ks, seen.stills.shape[1], seen.shading)

    return Result(
        report={
            "version": __version__, "task": settings.task, "prompt": settings.prompt, "seed": settings.seed,
            "preset": settings.preset, "model": MODEL_TITLES[settings.model], "frames": settings.frames,
            "vertices": len(mesh.vertices), "triangles": len(mesh.faces),
            "gaussians": len(cloud.opacities), "seconds": clock.seconds, "warnings": warnings,
            "moved": moved(vertices), "edge_change_p99": edge_change(mesh, vertices), "still_psnr": round(fidelity, 2),
            "torch": torch.__version__,
        },
        arrays={
            "vertices": similarity.invert(vertices),
            "video": rendered,
            "gaussian_means": similarity.invert(means.numpy()),
            "gaussian_quats": turned_back(quats, similarity).numpy(),
            "gaussian_scales": (cloud.scales / similarity.scale).numpy().astype(np.float32),
            "gaussian_opacities": cloud.opacities.numpy(),
            "gaussian_colors": cloud.colors.numpy(),
            "gaussian_sh": turned_sh(resample_sh(sh, footage.frames, settings.frames), similarity).numpy(),
        },
    )


@dataclass(frozen=True)
class Seen:
    """The multi-view video that Stage Two explains, and what is known of it.

    Attributes:
        video: [V, F, H, W, 3 or 4] uint8; viewmats: [V, 4, 4], its cameras; video_Ks: [V, 3, 3] in pixels of it.
        footage: the same, ready to be compared.
        stills: [V, S, S, 4] uint8 of the mesh at rest; Ks: [V, 3, 3] in pixels of these.
        shading: [N, 3] the light in them, a factor on the texture.
        tracks: where the vertices go, if the video was made from that.
        painter: the video model that made it, as long as it is needed.
        warnings: for the user.
    """

    video: np.ndarray
    viewmats: np.ndarray
    video_Ks: np.ndarray
    footage: Footage
    stills: np.ndarray
    Ks: np.ndarray
    shading: np.ndarray
    tracks: Tracks3D | None = None
    painter: MultiViewVideo | None = None
    warnings: Sequence[dict[str, str]] = ()


def given(request: Request, mesh: Mesh, viewmats: np.ndarray, Ks: np.ndarray) -> Seen:
    """The user's own video."""
    video = request.arrays["video"]
    footage = read_footage(video, viewmats, Ks)
    stills, still_Ks = footage.straight_views(), footage.Ks.astype(np.float32)
    return Seen(video, viewmats, Ks, footage, stills, still_Ks, estimate_shading(mesh, stills, viewmats, still_Ks))


def imagined(request: Request, mesh: Mesh, viewmats: np.ndarray, Ks: np.ndarray, similarity: Similarity,
             report: JobReport) -> Seen:
    """Stage One by the generator that ships: it moves the mesh, and the video is drawn of that."""
    settings, stills, generator = request.settings, request.arrays["views"], MotionGenerator.shipped(request.settings.prompt)
    check_stills(stills, len(generator.network.view))
    generated = generator.generate(mesh, stills, viewmats, Ks, settings.prompt, frames=FITTED_FRAMES, seed=settings.seed,
                                   report=report)
    wanted = directed(generated.tracks, settings.strength, settings.loop, settings.keep_root, request.arrays.get("pin"))
    shading = estimate_shading(mesh, stills, viewmats, Ks)
    filming = stepped_back(viewmats, wanted)
    video = decode_video(mesh, wanted, filming, Ks, stills.shape[1], shading)  # [V, F, H, W, 4]
    report("generate", STEPS, STEPS, moving_grid(video), similarity.invert(wanted))
    return Seen(video, filming, Ks, read_footage(video, filming, Ks), stills, Ks, shading, Tracks3D(wanted, generated.confidence),
                warnings=word_warnings(generator, settings.prompt))


def painted(request: Request, mesh: Mesh, viewmats: np.ndarray, Ks: np.ndarray, similarity: Similarity,
            report: JobReport) -> Seen:
    """Stage One by the published video model. Its frame 0, which comes back a little changed, is the captured pictures again."""
    settings, stills = request.settings, request.arrays["views"]  # [V, H, H, 4]
    painter, licences = open_published()
    check_stills(stills, MOST_VIEWS)
    video = painter.generate(stills, viewmats, settings.prompt, FITTED_FRAMES, loop=settings.loop, seed=settings.seed,
                             report=report)  # [V, F, S, S, 4]
    rest, _ = fitted(stills, painter.size, painter.cell)  # [V, 4, S, S]
    video[:, 0, ..., :3] = (on_background(rest).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    video_Ks = scale_intrinsics(Ks, video.shape[2] / stills.shape[1])
    footage, shading = painted_footage(video, viewmats, video_Ks), estimate_shading(mesh, stills, viewmats, Ks)
    kept = painter if PRESETS[settings.preset].paper else None  # its memory is needed for the rest
    return Seen(video, viewmats, video_Ks, footage, stills, Ks, shading, painter=kept,
                warnings=[*painter.prompt_warnings(settings.prompt), *licence_warnings(licences)])


def prior(request: Request, mesh: Mesh, viewmats: np.ndarray, seen: Seen) -> dict:
    """What 4D-SDS asks: the model that painted the video, or the generator of motions."""
    prompt = request.settings.prompt
    if seen.painter is None:
        return {"motion_prior": motion_prior(MotionGenerator.shipped(prompt), mesh, seen.shading, prompt)}
    rest, _ = fitted(seen.stills, seen.painter.size, seen.painter.cell)  # [V, 4, S, S]
    return {"video_prior": video_prior(seen.painter, prompt, torch.from_numpy(viewmats), rest)}


def painted_footage(video: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray) -> Footage:
    """`read_footage` of what a model has painted.

    Raises:
        InputError: nothing_painted, and what else `read_footage` raises.
    """
    try:
        return read_footage(video, viewmats, Ks)
    except InputError as error:
        if error.code != "no_mask":
            raise
        raise InputError("nothing_painted", "The video that the model painted shows no object before a plain background.",
                         "Try another seed or another sentence, or use the model that ships.") from error


def licence_warnings(licences: list[str]) -> list[dict[str, str]]:
    """What a user of downloaded weights has to know of them."""
    return [{"code": "model_licences", "message": f"Licences of the published weights: {' | '.join(licences)}.",
             "action": "See that they allow what you do with the result."}]


def describe() -> dict[str, str]:
    """What the server tells its clients of itself; loads the generators, so that the first job finds them warm."""
    for prompt in ("it spins", "it runs"):
        MotionGenerator.shipped(prompt)
    return {"device": f"CPU, {os.cpu_count()} cores", "model": MODEL_TITLES["motion"], "licence": "CC0 1.0"}


class Clock:
    """Seconds per stage, and the report that a stage has begun."""

    def __init__(self, report: Report) -> None:
        self.report = report
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str):
        self.report(stage, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


def canonical_mesh(request: Request) -> tuple[Mesh, Similarity]:
    """The request's mesh in canonical space, and the transform that took it there."""
    arrays = request.arrays
    check_mesh(arrays["vertices"], arrays["faces"])
    similarity = canonical_similarity(arrays["vertices"], request.settings.front)
    count = sum(name.startswith("texture_") for name in arrays)
    textures = [arrays[f"texture_{k}"].astype(np.float32) / 255 for k in range(count)]
    vertices = similarity.apply(arrays["vertices"])
    return Mesh(vertices, arrays["faces"], arrays.get("uvs"), arrays.get("materials"), textures), similarity


def word_warnings(generator: MotionGenerator, prompt: str) -> list[dict[str, str]]:
    """Warnings when the prompt's words mean nothing to the model, or are more than it reads."""
    warnings = length_warnings(count_tokens(in_manner(prompt)))
    unknown = generator.unknown_words(prompt)
    if not unknown:
        return warnings
    return [*warnings, {"code": "unknown_words", "message": f"The model does not know: {', '.join(unknown)}.",
             "action": f"It knows these motions: {', '.join(generator.known_verbs())}."}]


def check_memory(request: Request, quality: Preset) -> None:
    """Refuses a job that this machine has no room for, before it begins.

    Raises:
        InputError: too_little_memory.
    """
    settings, arrays = request.settings, request.arrays
    if settings.task == "fit":
        views, fitted, *sides = arrays["video"].shape[:4]
        side = max(sides)
        drawn, shown = 0, min(side, WORKING_SIZE)
    else:
        views, fitted, side = len(arrays["views"]), FITTED_FRAMES, arrays["views"].shape[1]
        drawn, shown = views * fitted * side**2 * DRAWN_BYTES, side
    pictures = views * fitted * min(side, WORKING_SIZE)**2 * PIXEL_BYTES
    frame = 3 * views * shown**2 + quality.gaussians * GAUSSIAN_BYTES + len(arrays["vertices"]) * VERTEX_BYTES
    needed, free = pictures + drawn + settings.frames * frame, psutil.virtual_memory().available
    if needed > free:
        raise InputError("too_little_memory", f"{views} views of {fitted} frames and a result of {settings.frames} frames need "
                         f"about {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB are free.",
                         "Close other programs, or use fewer frames, fewer views or smaller pictures.")


def check_stills(stills: np.ndarray, most: int) -> None:
    """Refuses pictures [V, H, W, 4] that the generator can't use; it looks at `most` views at once.

    Raises:
        InputError: too_many_views, empty_view.
    """
    if len(stills) > most:
        raise InputError("too_many_views", f"The request has {len(stills)} views; the motion generator looks at {most} at most.",
                         "Capture the object from four sides; a video of your own may have more.")
    if not stills[..., 3].any():
        raise InputError("empty_view", "None of the pictures shows the object.", "Capture it again while it is visible.")


def surface_gaussians(mesh: Mesh, captured: Sitting, shading: np.ndarray, quality: Preset, seed: int,
                      motion: np.ndarray | None = None) -> Cloud:
    """Gaussians on the mesh's vertices and triangles, their appearance fitted to the still pictures and to drawn ones.

    They start with the shaded texture, also where no picture shows them. With a motion [F, N, 3] they are made for its poses too.
    """
    cloud = seed_cloud(mesh, quality.gaussians, torch.Generator().manual_seed(seed), motion)
    corners = torch.from_numpy(np.asarray(shading, np.float32)[mesh.faces])[cloud.triangles]  # [G, 3, 3], corner then colour
    cloud.colors = (cloud.colors * (corners * cloud.barycentric[..., None]).sum(1)).clamp(0, 1)  # [G, 3]
    drawn = drawn_sittings(mesh, shading, captured.pictures.shape[1], motion)
    return refine_appearance(cloud, mesh.faces, captured, drawn, quality.appearance_steps, seed)


def still_sitting(mesh: Mesh, stills: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray) -> Sitting:
    """The captured pictures [V, H, H, 4] of the mesh at rest."""
    return Sitting(mesh.vertices, on_grey(stills), stills[..., 3].astype(np.float32) / 255, viewmats, Ks)


def diffusion_features(footage: Footage, prompt: str, seed: int) -> torch.Tensor | None:
    """What the feature network says of the video, for the motion field (Eq. 6 of Track4DGen); [V, F, C, h, w].

    None where the package was installed without that network.
    """
    from .video.features import WEIGHTS, video_features

    if not WEIGHTS.exists():
        return None
    alphas = footage.masks[..., None].astype(np.uint8) * 255
    return torch.from_numpy(video_features(np.concatenate([footage.colors, alphas], -1), prompt, footage.viewmats, seed=seed))


def on_grey(pictures: np.ndarray) -> np.ndarray:
    """Straight-alpha pictures [..., 4] uint8 on the capture's background; [..., 3] float32 in 0..1."""
    rgba = pictures.astype(np.float32) / 255
    return rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:]) * np.float32(BACKGROUND)


def stepped_back(viewmats: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """The cameras that looked at the unit sphere, moved back until all positions [F, N, 3] are in the picture; [V, 4, 4]."""
    back = viewmats.copy()
    back[:, :3, 3] *= max(1.0, float(np.linalg.norm(positions, axis=-1).max()))
    return back


def film(mesh: Mesh, vertices: np.ndarray, viewmats: np.ndarray, Ks: np.ndarray, size: int, shading: np.ndarray) -> np.ndarray:
    """The moving mesh from every view on grey; [V, F, H, W, 3] uint8."""
    out = np.empty((len(viewmats), len(vertices), size, size, 3), np.uint8)
    for start in range(0, len(vertices), FILMED):
        some = slice(start, start + FILMED)
        pictures = over(render(mesh, vertices[some], viewmats, Ks, size, shading=shading), BACKGROUND)  # [f, V, H, W, 3]
        out[:, some] = (pictures.swapaxes(0, 1) * 255 + 0.5).astype(np.uint8)
    return out


def grid(pictures: np.ndarray) -> np.ndarray:
    """Pictures [V, H, W, 3] in 0..1 side by side in two rows; [H', W', 3] uint8."""
    count = len(pictures) + len(pictures) % 2
    padded = np.full((count, *pictures.shape[1:]), BACKGROUND, np.float32)
    padded[:len(pictures)] = pictures
    rows = [np.concatenate(list(half), 1) for half in np.split(padded, 2)] if count > 1 else [padded[0]]
    return (np.concatenate(rows, 0).clip(0, 1) * 255 + 0.5).astype(np.uint8)


def moving_grid(video: np.ndarray) -> np.ndarray:
    """The views of a video [V, F, H, W, 4] side by side in every frame; a film [F, H', W', 3] uint8."""
    return np.stack([grid(on_grey(video[:, frame])) for frame in range(video.shape[1])])


def moved(vertices: np.ndarray) -> float:
    """Mean over vertices of the largest displacement from frame 0, in bounding-box diagonals; vertices [F, N, 3]."""
    diagonal = float(np.linalg.norm(np.ptp(vertices[0], axis=0)))
    return round(float(np.linalg.norm(vertices - vertices[0], axis=-1).max(0).mean()) / diagonal, 4)


def edge_change(mesh: Mesh, vertices: np.ndarray) -> float:
    """99th percentile over edges and frames of the length ratio to rest, longer or shorter; 1 is unchanged."""
    edges = mesh.edges()
    length = np.linalg.norm(vertices[:, edges[:, 0]] - vertices[:, edges[:, 1]], axis=-1)  # [F, E]
    rest = np.linalg.norm(mesh.vertices[edges[:, 0]] - mesh.vertices[edges[:, 1]], axis=-1)  # [E]
    real = rest > 1e-4
    if not real.any():
        return 1.0
    ratio = np.maximum(length[:, real], 1e-9) / rest[real]
    return round(float(np.quantile(np.maximum(ratio, 1 / ratio), 0.99)), 4)


def turned_back(quats: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """Orientations [..., 4] wxyz from canonical space to the user's space."""
    from scipy.spatial.transform import Rotation

    to_world = Rotation.from_matrix(similarity.rotation.T).as_quat()[[3, 0, 1, 2]]
    return quaternion_product(torch.from_numpy(to_world), quats).float()


def turned_sh(coefficients: torch.Tensor, similarity: Similarity) -> torch.Tensor:
    """4D SH [G, K, W, 3] from canonical space to the user's space."""
    return rotate_sh(coefficients, torch.from_numpy(similarity.rotation.T))
