"""Diffusion features of a multi-view video, for probing and for Stage Two's hybrid motion field (Track4DGen, section 3.3).

The shipped small network exists for them: it was trained with the tracking losses, so that one surface point has nearly the
same descriptor in every frame.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from track4d_protocol.errors import InputError

from .multiview_video import MultiViewVideo, fitted
from .sampling import ALPHA_BARS, add_noise
from .unet import MultiViewUNet, UNetConfig

WEIGHTS = Path(__file__).parent / "weights" / "features.safetensors"
# Of the shipped network: 16 x 16 cells in the second up block, a fifth of the cost of `UNetConfig.small`'s widths.
FEATURE_UNET = UNetConfig(
    channels=(32, 64),
    attention=(False, True),
    spatial_motion=(False, True),
    layers=1,
    heads=4,
    motion_heads=4,
    groups=8,
    patch=4,
    text_dim=64,
    vocabulary=128,
    text_tokens=16,
    image_dim=0,
)
SLIGHT_NOISE = 20  # training step at which features are taken


def video_features(
    video: np.ndarray, prompt: str, viewmats: np.ndarray, *, network: MultiViewVideo | None = None, seed: int = 0
) -> np.ndarray:
    """The second up block's temporal features of a multi-view video that is slightly noised (Track4DGen, section 3.2).

    Args:
        video: [V, F, H, W, 4] uint8 sRGB, straight alpha; or pictures [V, H, W, 4], one frame. More frames than the network takes
            at once (32) go through it in parts of equal length.
        prompt: what happens; "" where it is unknown.
        viewmats: [V, 4, 4] world-to-camera, canonical space.
        network: of either size; the shipped small one by default.
        seed: of the slight noise.

    Returns:
        [V, F, C, h, w] float32. A map covers the whole picture: the centre of cell (i, j) is the place
        ((j + 0.5) / w, (i + 0.5) / h) of it. Cosine is the measure of likeness (Eqs. 4 and 5).
    """
    network = network or shipped_small()
    name = network.unet.config.temporal_feature
    clip = video[:, None] if video.ndim == 4 else video
    parts = np.array_split(clip, -(-clip.shape[1] // network.unet.config.max_frames), 1)
    return np.concatenate([all_features(network, part, prompt, viewmats, [name], seed=seed)[name].numpy() for part in parts], 1)


@torch.no_grad()
def all_features(
    network: MultiViewVideo,
    video: np.ndarray,
    prompt: str,
    viewmats: np.ndarray,
    names: Sequence[str],
    step: int = SLIGHT_NOISE,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Features by name out of `unet.feature_names()`, each [V, F, C, h, w] float32; arguments as in `video_features`.

    Args:
        step: training step, 0..999, of the noise on frames 2..f.
    """
    views, frames = video.shape[:2]
    pictures, (height, width) = fitted(video.reshape(-1, *video.shape[2:]), network.size, network.cell)
    clip = pictures.unflatten(0, (views, frames))  # [V, F, 4, H', W']
    conditions = network.conditions(prompt, torch.from_numpy(np.asarray(viewmats, np.float32)), clip[:, 0])
    latents = network.encode(pictures).unflatten(0, (views, frames))  # [V, F, C, h, w]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    noisy = torch.cat([latents[:, :1], add_noise(latents, noise, ALPHA_BARS[step])[:, 1:]], 1)
    image = None if conditions.image is None else conditions.image[None]
    steps = torch.tensor([step], device=network.device)
    answer = network.unet(noisy[None], steps, conditions.text[None], conditions.cameras[None], image, features=names)
    return {name: _of_picture(answer.features[name][0], clip.shape[-2:], (height, width)).float().cpu() for name in names}


def _of_picture(maps: Tensor, filled: Sequence[int], picture: tuple[int, int]) -> Tensor:
    """Feature maps [V, F, C, h, w] of filled-up pictures without the cells that lie wholly outside of the picture itself."""
    rows, columns = (max(1, round(cells * side / whole)) for cells, side, whole in zip(maps.shape[-2:], picture, filled))
    return maps[..., :rows, :columns]


@lru_cache(maxsize=1)
def shipped_small() -> MultiViewVideo:
    """The small network that comes with the package; loaded once per process."""
    return load_small()


def load_small(path: Path | None = None) -> MultiViewVideo:
    """A small network from a file of `save_small`; the shipped one by default.

    Raises:
        InputError: the file is damaged or another one.
    """
    path = path or WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            config = UNetConfig.from_dict(json.loads(file.metadata()["config"]))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        unet = MultiViewUNet(config)
        unet.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError("bad_network_file", f"'{path}' holds no weights of the small video network: {error}",
                         "Use a file written by track4d train video, or install Track4D again.") from error
    return MultiViewVideo(unet.requires_grad_(False).eval())


def save_small(path: Path, tensors: dict[str, Tensor], config: UNetConfig, trained: dict) -> None:
    """Writes half-precision weights with their configuration and history in the header."""
    half = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(half, path, {"config": json.dumps(config.to_dict()), "trained": json.dumps(trained)})
