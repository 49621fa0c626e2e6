"""The multi-view video diffusion model with all its parts: pictures and a sentence in, a multi-view video out.

The published size works on latents of a VAE and reads text and pictures through CLIP. The small size, without these, works
on the pictures themselves and has its own words. Everything else is the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from track4d_protocol.errors import InputError
from track4d_protocol.space import BACKGROUND

from ..progress import Report, silent
from . import text
from .sampling import ALPHA_BARS, GUIDANCE, STEPS, WINDOW, clean_from_noise, guided, sample_video
from .unet import MultiViewUNet, camera_condition

SIZE, SMALL_SIZE = 256, 64  # pixels along the longer side of the pictures that each size was trained on
AT_ONCE = 8  # pictures that the VAE takes at once
PREVIEW_EVERY = 5  # steps


@dataclass(frozen=True)
class Encoders:
    """What the published U-Net sees pictures and text through: diffusers' and transformers' own objects."""

    vae: Any  # AutoencoderKL
    tokenizer: Any  # CLIPTokenizer
    text_encoder: Any  # CLIPTextModel
    image_encoder: Any  # CLIPVisionModelWithProjection

    def to(self, device: str | torch.device, dtype: torch.dtype) -> Encoders:
        """Frozen and in their places; the VAE stays float32."""
        for model in (self.vae, self.text_encoder, self.image_encoder):
            model.requires_grad_(False).eval()
        return Encoders(self.vae.to(device), self.tokenizer, self.text_encoder.to(device, dtype),
                        self.image_encoder.to(device, dtype))


@dataclass(frozen=True)
class Conditions:
    """What the network is told besides the first frames.

    Attributes:
        text: [T, D] of the prompt, or [T] int64 token ids for a network with its own words; no_text: of an empty one.
        cameras: [V, 16].
        image: [V, E] of each view's first frame; None for a network without IP-Adapter.
    """

    text: Tensor
    no_text: Tensor
    cameras: Tensor
    image: Tensor | None


class MultiViewVideo:
    """Text-conditioned multi-view video diffusion (Track4DGen, section 3.2). Load once, use often; one thread at a time.

    Args:
        unet: of either size.
        encoders: for the published size, None for the small one.
    """

    def __init__(self, unet: MultiViewUNet, encoders: Encoders | None = None) -> None:
        assert (encoders is None) == bool(unet.config.vocabulary), "a network has encoders or words of its own"
        self.unet, self.encoders = unet, encoders
        self.size = SIZE if encoders else SMALL_SIZE

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def cell(self) -> int:
        """Pixels along the edge of what becomes one cell of the network's input; pictures are multiples of it."""
        factor = 2 ** (len(self.encoders.vae.config.block_out_channels) - 1) if self.encoders else 1
        return factor * self.unet.config.patch

    def prompt_warnings(self, prompt: str) -> list[dict[str, str]]:
        """A warning when the prompt is longer than what the network reads; the rest of it is left out."""
        if self.encoders:
            tokenizer = self.encoders.tokenizer
            return text.length_warnings(len(tokenizer(prompt, truncation=False, verbose=False).input_ids),
                                        tokenizer.model_max_length)
        return text.length_warnings(text.count_tokens(prompt), min(self.unet.config.text_tokens, text.MAX_TOKENS))

    def conditions(self, prompt: str, viewmats: Tensor, first_frames: Tensor) -> Conditions:
        """Encodes what stays the same through a whole sampling; no gradient.

        Args:
            prompt: a sentence; what is too long for the network is cut off (`prompt_warnings`).
            viewmats: [V, 4, 4] world-to-camera, canonical space.
            first_frames: [V, 4, H, W] premultiplied RGBA in 0..1.
        """
        with torch.no_grad():
            cameras = camera_condition(viewmats.to(self.device, torch.float32))
            return Conditions(self._text(prompt), self._text(""), cameras, self._image(first_frames))

    def _text(self, prompt: str) -> Tensor:
        if self.encoders is None:
            tokens = text.tokenise(prompt)[:self.unet.config.text_tokens]
            return torch.tensor(tokens, device=self.device)
        tokenizer = self.encoders.tokenizer
        ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return self.encoders.text_encoder(ids.to(self.device)).last_hidden_state[0]  # [T, D]

    def _image(self, first_frames: Tensor) -> Tensor | None:
        if self.encoders is None:
            return None
        from transformers import CLIPImageProcessor

        encoder = self.encoders.image_encoder
        size = encoder.config.image_size
        processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pictures = (on_background(first_frames).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pixels = processor(list(pictures), return_tensors="pt").pixel_values
        return encoder(pixels.to(encoder.device, encoder.dtype)).image_embeds  # [V, E]

    def encode(self, pictures: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures to latents, with gradient.

        Args:
            pictures: [N, 4, H, W] premultiplied RGBA in 0..1; sides are multiples of `cell`.
            generator: draws from the VAE's distribution, as Animate3D does; None takes its mean.

        Returns:
            [N, C, h, w] float32.
        """
        if self.encoders is None:
            return 2 * pictures.to(self.device) - 1
        vae = self.encoders.vae
        latents = []
        for part in (2 * on_background(pictures.to(self.device)) - 1).split(AT_ONCE):
            posterior = vae.encode(part).latent_dist
            latents.append(posterior.mean if generator is None else posterior.sample(generator))
        return torch.cat(latents) * vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, C, h, w] to premultiplied RGBA [N, 4, H, W], about 0..1; the published size has no alpha: it is 1."""
        if self.encoders is None:
            return (latents + 1) / 2
        vae = self.encoders.vae
        pictures = torch.cat([vae.decode(part / vae.config.scaling_factor).sample for part in latents.split(AT_ONCE)])
        return torch.cat([(pictures + 1) / 2, torch.ones_like(pictures[:, :1])], 1)

    def predictions(self, latents: Tensor, first: Tensor, t: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
        """Clean moving frames as the network believes them, with the prompt and without; gradients where wanted.

        Without the prompt there is no image embedding either, but the same cameras and first frames, as in Animate3D. The
        two are computed one after the other: 64 pictures fill any device, and it takes half the memory.

        Args:
            latents: [V, M, C, h, w] noisy moving frames.
            first: [V, C, h, w] first frames, clean.
            t: training step, 0..999.

        Returns:
            two of [V, M, C, h, w] float32, z0_hat of Eq. 11 of Track4DGen.
        """
        free = self._clean(latents, first, t, conditions.no_text, conditions.cameras,
                           None if conditions.image is None else torch.zeros_like(conditions.image))
        return self._clean(latents, first, t, conditions.text, conditions.cameras, conditions.image), free

    def _clean(self, latents: Tensor, first: Tensor, t: int, words: Tensor, cameras: Tensor, image: Tensor | None) -> Tensor:
        sample = torch.cat([first[:, None], latents], 1)[None]  # [1, V, F, C, h, w]
        noise = self.unet(sample, torch.tensor([t], device=self.device), words[None], cameras[None],
                          None if image is None else image[None]).sample[0, :, 1:]
        return clean_from_noise(latents, noise.float(), ALPHA_BARS[t])

    def denoise(self, latents: Tensor, t: int, prompt: str, viewmats: Tensor, first_frames: Tensor,
                guidance: float = GUIDANCE) -> Tensor:
        """What 4D-SDS asks for in one call: noisy latents to clean ones; gradients where wanted.

        A loop encodes its conditions once instead: `conditions`, `encode`, and then `predictions` in every step.

        Args:
            latents: [V, M, C, h, w] noisy moving frames at training step `t`.
            viewmats: [V, 4, 4]; first_frames: [V, 4, H, W] premultiplied RGBA in 0..1.
            guidance: classifier-free guidance scale; 1 is without.

        Returns:
            [V, M, C, h, w] float32, z0_hat.
        """
        conditions = self.conditions(prompt, viewmats, first_frames)
        return guided(*self.predictions(latents, self.encode(first_frames), t, conditions), guidance)

    @torch.no_grad()
    def generate(self, pictures: np.ndarray, viewmats: np.ndarray, prompt: str, frames: int = WINDOW, steps: int = STEPS,
                 guidance: float = GUIDANCE, freeinit: int = 1, loop: bool = False, seed: int = 0,
                 report: Report = silent) -> np.ndarray:
        """Makes a multi-view video; the same seed gives the same one.

        Pictures of any size are brought to what the model was trained on, their longer side to `size` pixels; they need
        not be square. Any number of views and frames can be given: the published model has seen four views of one object,
        elevation 15, at right angles, and 16 frames; longer videos are made in windows (`sampling.sample_video`).

        Args:
            pictures: [V, H, W, 3 or 4] uint8 sRGB, straight alpha; the object at rest, one picture per view.
            viewmats: [V, 4, 4] world-to-camera, canonical space.
            prompt: a sentence, what the object does.
            frames: of the video, at least 2, or 4 for a loop.
            steps: of the sampler, 1 to 999.
            guidance: classifier-free guidance scale; 1 is without and takes half the time.
            freeinit: 3 as in Animate3D steadies the video and weakens its motion, for three times the work; 1 is without.
            loop: whether the first frame follows on the last one; costs one window of 16 frames more.
            seed: of the noise.
            report: stage "generate", after each step, with a preview now and then; may raise `Cancelled`.

        Returns:
            [V, frames, H', W', 4] uint8 sRGB, straight alpha; opaque from the published model, on the grey it was
            trained with. Frame 0 is the picture as it comes back from the latents.

        Raises:
            InputError: pictures, cameras or settings that can't be used, or too little memory.
        """
        check_pictures(pictures, viewmats)
        check_settings(frames, steps, freeinit, loop)
        rest, (height, width) = fitted(pictures, self.size, self.cell)
        conditions = self.conditions(prompt, torch.from_numpy(np.asarray(viewmats, np.float32)), rest)
        generator = torch.Generator().manual_seed(seed)
        first = self.encode(rest, generator)  # [V, C, h, w]

        def denoise(latents: Tensor, start: Tensor, t: int) -> Tensor:
            if guidance == 1:
                return self._clean(latents, start, t, conditions.text, conditions.cameras, conditions.image)
            return guided(*self.predictions(latents, start, t, conditions), guidance)

        def tell(step: int, total: int, clean: Tensor | None) -> None:
            glimpse = None
            if clean is not None and step % PREVIEW_EVERY == 0 and report is not silent:
                glimpse = side_by_side(self.decode(clean[:, clean.shape[1] // 2])[..., :height, :width])
            report("generate", step, total, glimpse)

        latents = sample_video(denoise, first, frames, steps, freeinit, loop, generator, on_step=tell)  # [V, F, C, h, w]
        return np.stack([straight_bytes(self.decode(view)[..., :height, :width]) for view in latents])


def check_pictures(pictures: np.ndarray, viewmats: np.ndarray) -> None:
    """Refuses pictures and cameras that don't belong together.

    Raises:
        InputError: bad_pictures, bad_cameras.
    """
    if pictures.ndim != 4 or pictures.shape[-1] not in (3, 4) or pictures.dtype != np.uint8 or 0 in pictures.shape:
        raise InputError("bad_pictures", f"The pictures are {pictures.dtype} {list(pictures.shape)}.",
                         "Give uint8 pictures [views, height, width, 3 or 4], all of one size.")
    if np.shape(viewmats) != (len(pictures), 4, 4) or not np.isfinite(viewmats).all():
        raise InputError("bad_cameras", f"There are {len(pictures)} pictures and cameras of shape {list(np.shape(viewmats))}.",
                         "Give one finite 4x4 world-to-camera matrix per picture.")


def check_settings(frames: int, steps: int, freeinit: int = 1, loop: bool = False) -> None:
    """Refuses what no sampler can do.

    Raises:
        InputError: bad_settings.
    """
    fewest = 4 if loop else 2
    if frames < fewest:
        raise InputError("bad_settings", f"{frames} frames were asked for.", f"Ask for at least {fewest}.")
    if not 1 <= steps <= 999 or freeinit < 1:
        raise InputError("bad_settings", f"{steps} steps and {freeinit} FreeInit iterations were asked for.",
                         "Ask for 1 to 999 steps and at least 1 iteration.")


def fitted(pictures: np.ndarray, size: int, cell: int) -> tuple[Tensor, tuple[int, int]]:
    """Pictures reduced or enlarged to the network's size, and filled up to whole cells with nothing at the right and below.

    Args:
        pictures: [V, H, W, 3 or 4] uint8 sRGB, straight alpha.
        size: of the longer side.
        cell: that both sides become multiples of.

    Returns:
        [V, 4, H', W'] float32 premultiplied RGBA in 0..1; the height and width that the picture takes of it.
    """
    scale = size / max(pictures.shape[1:3])
    height, width = (max(1, round(side * scale)) for side in pictures.shape[1:3])
    shrinks = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    scaled = np.ones((len(pictures), height, width, 4), np.float32)
    for picture, small in zip(pictures, scaled):  # one at a time: all of a long video's in float32 would be gigabytes
        rgba = picture.astype(np.float32) / 255
        if rgba.shape[-1] == 4:
            rgba[..., :3] *= rgba[..., 3:]
        small[..., :rgba.shape[-1]] = cv2.resize(rgba, (width, height), interpolation=shrinks).clip(0, 1)
    filled = np.pad(scaled, ((0, 0), (0, -height % cell), (0, -width % cell), (0, 0)))
    return torch.from_numpy(np.ascontiguousarray(filled.transpose(0, 3, 1, 2))), (height, width)


def on_background(pictures: Tensor) -> Tensor:
    """Premultiplied RGBA [N, 4, H, W] on the grey that the published model knows; [N, 3, H, W]."""
    return pictures[:, :3] + (1 - pictures[:, 3:]) * BACKGROUND


def straight_bytes(pictures: Tensor) -> np.ndarray:
    """Premultiplied RGBA [N, 4, H, W] as it is stored: [N, H, W, 4] uint8 with straight alpha."""
    alpha = pictures[:, 3:].clamp(0, 1)
    color = torch.where(alpha > 1 / 512, pictures[:, :3] / alpha.clamp_min(1 / 512), torch.zeros_like(alpha))
    return (torch.cat([color, alpha], 1).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def side_by_side(pictures: Tensor) -> np.ndarray:
    """Premultiplied RGBA [V, 4, H, W] in one row on grey; [H, V W, 3] uint8."""
    colors = (on_background(pictures).clamp(0, 1) * 255).round().byte()
    return colors.permute(2, 0, 3, 1).flatten(1, 2).cpu().numpy()
