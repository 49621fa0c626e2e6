"""MV-VDM's U-Net, which predicts the noise in a multi-view video: one code path for the published size and for a small one.

Built from diffusers' residual and transformer blocks with the attention of `attention.py`. The parameters carry the names
of the published checkpoints. Nothing depends on the number of views or frames or on the resolution, so one network serves
all of them. Source: Track4DGen section 3.2; Animate3D section 3.1; AnimateDiff, MVDream and IP-Adapter for the parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from track4d_protocol.errors import InputError

from .attention import Layout, MultiViewAttention, PromptAttention, SpatioTemporalAttention


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network; stored with its weights.

    Attributes:
        channels: of each level, finest first; each divisible by `groups`, 4, `heads` and `motion_heads`.
        attention: for each level, whether it has multi-view attention and cross-attention; the coarsest level of the
            published network has none, though its middle block, at the same resolution, has.
        spatial_motion: for each level, whether the motion modules attend over the views too, not over time alone.
        layers: residual blocks of a level on the way down; one more on the way up.
        heads, motion_heads: attention heads of the transformers and of the motion modules.
        groups: of the group norms.
        patch: pixels along the edge of the square that becomes one cell before the first level.
        in_channels, out_channels: of the video: 4 latent channels, or premultiplied RGBA.
        text_dim: width of the text's tokens.
        vocabulary, text_tokens: > 0 gives the network its own word embedding, with a code for each of at most
            text_tokens places; the text is then token ids and not vectors; 0 expects vectors of another text encoder.
        image_dim: width of the image embedding that the IP-Adapter reads, 0 for no IP-Adapter.
        image_tokens: tokens that the IP-Adapter makes of it.
        max_frames: length of the motion modules' time code; the most frames in one call.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    spatial_motion: tuple[bool, ...]
    layers: int = 2
    heads: int = 8
    motion_heads: int = 8
    groups: int = 32
    patch: int = 1
    in_channels: int = 4
    out_channels: int = 4
    text_dim: int = 768
    vocabulary: int = 0
    text_tokens: int = 77
    image_dim: int = 1024
    image_tokens: int = 4
    max_frames: int = 32

    @classmethod
    def published(cls) -> UNetConfig:
        """The size of the checkpoints that can be downloaded: latents of pictures an eighth as wide, 1.5e9 parameters."""
        return cls(channels=(320, 640, 1280, 1280), attention=(True, True, True, False), spatial_motion=(True,) * 4)

    @classmethod
    def small(cls) -> UNetConfig:
        """The size that is trained on a CPU: 64 x 64 premultiplied RGBA pictures, no VAE, no image encoder, 3.9e6 parameters.

        As in the published size at 256 x 256, there are four levels and the second up block works on 8 x 8 cells.
        Attention over the views is left to the two coarse levels: at 16 x 16 cells it would take most of the time.
        """
        return cls(channels=(32, 48, 64, 80), attention=(False, False, True, True), spatial_motion=(False, False, True, True),
                   layers=1, heads=2, motion_heads=2, groups=8, patch=2, text_dim=64, vocabulary=128, text_tokens=16,
                   image_dim=0)

    @property
    def spatial_feature(self) -> str:
        """Name of the second up block's spatial feature: after its last multi-view transformer."""
        return f"up_blocks.1.attentions.{self.layers}"

    @property
    def temporal_feature(self) -> str:
        """Name of the second up block's temporal feature: after its last motion module (Track4DGen section 3.2)."""
        return f"up_blocks.1.motion_modules.{self.layers}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UNetConfig:
        """The inverse of `to_dict`, also after a way through JSON."""
        fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
        return cls(**fields)


class Prediction(NamedTuple):
    """What the network answers.

    Attributes:
        sample: [B, V, F, out_channels, H, W], the predicted noise; frame 0, the condition, is predicted too and means nothing.
        features: by name, as asked for, each [B, V, F, C, h, w] with gradients.
    """

    sample: Tensor
    features: dict[str, Tensor]


def camera_condition(viewmats: Tensor) -> Tensor:
    """What the network is told of the cameras.

    Args:
        viewmats: [..., 4, 4] world-to-camera, OpenCV axes.

    Returns:
        [..., 16] camera-to-world with OpenGL axes and the position moved onto the unit sphere, row by row. Neither
        distance nor focal length is told. Source: MVDream section 3.1.
    """
    to_world = torch.linalg.inv(viewmats.double())
    axes = to_world[..., :3] * to_world.new_tensor([1.0, -1.0, -1.0])
    place = F.normalize(to_world[..., :3, 3], dim=-1)
    place = torch.cat([place, torch.ones_like(place[..., :1])], -1)[..., None]
    return torch.cat([axes, place], -1).flatten(-2).to(viewmats.dtype)


class MultiViewUNet(nn.Module):
    """Predicts the noise in B multi-view videos of V views and F frames.

    Attributes:
        gradient_checkpointing: True recomputes each layer in the backward pass instead of storing it.
    """

    def __init__(self, config: UNetConfig) -> None:
        from diffusers.models.embeddings import ImageProjection, TimestepEmbedding, Timesteps

        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        channels, embedding = config.channels, 4 * config.channels[0]
        self.time_proj = Timesteps(channels[0], flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(channels[0], embedding)
        self.camera_embedding = TimestepEmbedding(16, embedding)
        if config.vocabulary:
            self.token_embedding = nn.Embedding(config.vocabulary, config.text_dim)
            self.place_embedding = nn.Embedding(config.text_tokens, config.text_dim)
        if config.image_dim:
            projection = ImageProjection(config.image_dim, config.text_dim, config.image_tokens)
            self.encoder_hid_proj: Any = nn.ModuleDict({"image_projection_layers": nn.ModuleList([projection])})

        cells = config.patch ** 2
        self.conv_in = nn.Conv2d(config.in_channels * cells, channels[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = [channels[0]]
        last = len(channels) - 1
        for level, width in enumerate(channels):
            inputs = [channels[max(0, level - 1)], *[width] * (config.layers - 1)]
            self.down_blocks.append(Block(config, f"down_blocks.{level}", level, inputs, "down" if level < last else None))
            skips += [width] * (config.layers + (level < last))
        self.mid_block = Block(config, "mid_block", last, [channels[-1]] * 2, None, middle=True)
        below = channels[-1]
        for index, level in enumerate(range(last, -1, -1)):
            inputs = [(below if layer == 0 else channels[level]) + skips.pop() for layer in range(config.layers + 1)]
            self.up_blocks.append(Block(config, f"up_blocks.{index}", level, inputs, "up" if level else None))
            below = channels[level]
        self.conv_norm_out = nn.GroupNorm(config.groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels * cells, 3, padding=1)

    def feature_names(self) -> list[str]:
        """Every name that `features` may ask for: blocks, and their transformers and motion modules, in order of work."""
        blocks = [*self.down_blocks, self.mid_block, *self.up_blocks]
        return [name for block in blocks for name in block.feature_names()]

    def forward(self, sample: Tensor, timesteps: Tensor, text: Tensor, cameras: Tensor, image: Tensor | None = None,
                features: Collection[str] = ()) -> Prediction:
        """Predicts the noise.

        Views and frames may be any number from 1, also another one than in training; a network of the published size
        has seen 4 views and 16 frames. With one frame there is only the condition. Pictures need not be square.

        Args:
            sample: [B, V, F, in_channels, H, W], noisy frames after the first, which is the condition; H and W are
                any multiple of `config.patch`.
            timesteps: [B], or [B, F] for a noise level of each frame's own, in 0..999.
            text: [B, T, text_dim] or [B, V, T, text_dim] from a text encoder; or [B, T] int64 token ids, T at most
                text_tokens, where the network has its own vocabulary.
            cameras: [B, V, 16] from `camera_condition`.
            image: [B, V, image_dim], embedding of each view's first picture, zeros for none; only with an IP-Adapter.
            features: names out of `feature_names`.

        Raises:
            InputError: too many frames, a size that patches don't fill, or not enough memory.
        """
        batch, views, frames, _, height, width = sample.shape
        config = self.config
        if frames > config.max_frames:
            raise InputError("too_many_frames", f"The network takes up to {config.max_frames} frames at once, not {frames}.",
                             "Generate in overlapping windows, or ask for fewer frames.")
        if height % config.patch or width % config.patch:
            raise InputError("bad_video_size", f"The video is {width} x {height}, which squares of {config.patch} don't fill.",
                             f"Use a width and a height that {config.patch} divides.")
        unknown = set(features) - set(self.feature_names())
        assert not unknown, f"no such feature: {sorted(unknown)}"
        with _explained(sample):
            return self._forward(sample, timesteps, text, cameras, image, set(features))

    def _forward(self, sample: Tensor, timesteps: Tensor, text: Tensor, cameras: Tensor, image: Tensor | None,
                 wanted: set[str]) -> Prediction:
        batch, views, frames = sample.shape[:3]
        dtype = self.conv_in.weight.dtype
        emb = self._embedding(timesteps, cameras, frames, dtype)  # [B * V * F, embedding]
        state = State(views, frames, emb, self._text(text, views, dtype), self._image(image, dtype), wanted, {},
                      self.gradient_checkpointing and torch.is_grad_enabled())

        x = sample.flatten(0, 2).to(dtype)  # [B * V * F, C, H, W]
        x = self.conv_in(F.pixel_unshuffle(x, self.config.patch))
        skips = [x]
        for block in self.down_blocks:
            x = block(x, state, skips)
        x = self.mid_block(x, state, [])
        for block in self.up_blocks:
            x = block(x, state, skips)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        x = F.pixel_shuffle(x, self.config.patch)
        return Prediction(x.unflatten(0, (batch, views, frames)), state.features)

    def _embedding(self, timesteps: Tensor, cameras: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
        """Time and camera as [B * V * F, embedding]."""
        times = timesteps[:, None] if timesteps.ndim == 1 else timesteps  # [B, 1 or F]
        time = self.time_embedding(self.time_proj(times.flatten()).to(dtype)).unflatten(0, times.shape)
        camera = self.camera_embedding(cameras.to(dtype))  # [B, V, embedding]
        return (camera[:, :, None] + time[:, None]).expand(-1, -1, frames, -1).flatten(0, 2)

    def _text(self, text: Tensor, views: int, dtype: torch.dtype) -> Tensor:
        """[B * V, T, text_dim]"""
        if self.config.vocabulary:
            text = self.token_embedding(text) + self.place_embedding.weight[: text.shape[1]]
        if text.ndim == 3:
            text = text[:, None].expand(-1, views, -1, -1)
        return text.flatten(0, 1).to(dtype)

    def _image(self, image: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """[B * V, image_tokens, text_dim]"""
        assert (image is not None) == bool(self.config.image_dim), "image embeddings go with an IP-Adapter, and only with it"
        return None if image is None else self.encoder_hid_proj["image_projection_layers"][0](image.flatten(0, 1).to(dtype))


class State(NamedTuple):
    """What every block of one forward pass shares."""

    views: int
    frames: int
    embedding: Tensor  # [B * V * F, embedding]
    text: Tensor  # [B * V, T, text_dim]
    image: Tensor | None  # [B * V, image_tokens, text_dim]
    wanted: set[str]
    features: dict[str, Tensor]
    checkpointing: bool

    def keep(self, name: str, x: Tensor) -> None:
        if name in self.wanted:
            self.features[name] = x.unflatten(0, (-1, self.views, self.frames))


class Block(nn.Module):
    """One level on the way down or up, or the middle: residual blocks, each followed by a transformer and a motion module.

    Args:
        inputs: input channels of each residual block; on the way up these contain the skip connection's.
        resample: "down", "up" or None.
        middle: the middle block has attention always, and one more residual block after its motion module.
    """

    def __init__(self, config: UNetConfig, name: str, level: int, inputs: list[int], resample: str | None,
                 middle: bool = False) -> None:
        from diffusers.models.downsampling import Downsample2D
        from diffusers.models.resnet import ResnetBlock2D
        from diffusers.models.upsampling import Upsample2D

        super().__init__()
        self.name, self.up = name, name.startswith("up")
        width, embedding = config.channels[level], 4 * config.channels[0]
        count = 1 if middle else len(inputs)
        self.resnets = nn.ModuleList(ResnetBlock2D(in_channels=c, out_channels=width, temb_channels=embedding, eps=1e-5,
                                                   groups=config.groups) for c in inputs)
        self.attentions = nn.ModuleList(_transformer(config, width)
                                        for _ in range(count if middle or config.attention[level] else 0))
        self.motion_modules = nn.ModuleList(MotionModule(config, width, config.spatial_motion[level]) for _ in range(count))
        self.downsamplers = nn.ModuleList([Downsample2D(width, use_conv=True, name="op")] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample2D(width, use_conv=True)] if resample == "up" else [])

    def feature_names(self) -> list[str]:
        layers = [f"{self.name}.{kind}.{i}" for i in range(len(self.motion_modules))
                  for kind, modules in (("attentions", self.attentions), ("motion_modules", self.motion_modules)) if len(modules)]
        return [*layers, self.name]

    def forward(self, x: Tensor, state: State, skips: list[Tensor]) -> Tensor:
        """x [B * V * F, C, h, w]; on the way down the results are pushed onto skips, on the way up taken from it."""
        layers = zip_longest(self.resnets, self.attentions, self.motion_modules)
        for i, (resnet, attention, motion) in enumerate(layers):
            if self.up:
                x = torch.cat([x, skips.pop()], 1)
            x = _run(state, resnet, x, state.embedding)
            layout = Layout(state.views, state.frames, x.shape[-2], x.shape[-1], state.image)
            if attention is not None:
                x = _run(state, attention, x, state.text, cross_attention_kwargs={"layout": layout}, return_dict=False)
                x = x[0] if isinstance(x, tuple) else x
                state.keep(f"{self.name}.attentions.{i}", x)
            if motion is not None:
                x = _run(state, motion, x, layout)
                state.keep(f"{self.name}.motion_modules.{i}", x)
            if self.name.startswith("down"):
                skips.append(x)
        for sampler in self.downsamplers:
            x = sampler(x)
            skips.append(x)
        for sampler in self.upsamplers:
            x = sampler(x, skips[-1].shape[-2:])  # the level above may have an odd size
        state.keep(self.name, x)
        return x


class MotionModule(nn.Module):
    """AnimateDiff's temporal transformer with spatio-temporal attention; starts as the identity.

    Source: AnimateDiff section 4.2; Track4DGen section 3.2 for the attention over the views.
    """

    def __init__(self, config: UNetConfig, channels: int, spatial: bool) -> None:
        from diffusers.models.attention import BasicTransformerBlock

        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        heads = config.motion_heads
        block: Any = BasicTransformerBlock(channels, heads, channels // heads, double_self_attention=True)
        for attention in (block.attn1, block.attn2):
            attention.set_processor(SpatioTemporalAttention(attention, config.max_frames, spatial))
        self.transformer_blocks = nn.ModuleList([block])
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x [B * V * F, C, h, w]; the norm's statistics are taken over all frames of a view."""
        video = x.unflatten(0, (-1, layout.frames)).transpose(1, 2)  # [B * V, C, F, h, w]
        h = self.norm(video).flatten(3).permute(0, 2, 3, 1).flatten(0, 1)  # [B * V * F, h * w, C]
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, cross_attention_kwargs={"layout": layout})
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, x.shape[-2:])


def _transformer(config: UNetConfig, channels: int) -> nn.Module:
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    module = Transformer2DModel(config.heads, channels // config.heads, in_channels=channels, norm_num_groups=config.groups,
                                cross_attention_dim=config.text_dim)
    for block in module.transformer_blocks:
        block.attn1.set_processor(MultiViewAttention(block.attn1))
        block.attn2.set_processor(PromptAttention(block.attn2, bool(config.image_dim)))
    return module


def _run(state: State, module: nn.Module, *inputs: Any, **options: Any) -> Any:
    if state.checkpointing:
        return checkpoint(module, *inputs, use_reentrant=False, **options)
    return module(*inputs, **options)


@contextmanager
def _explained(sample: Tensor) -> Iterator[None]:
    """Turns an allocator's failure into a sentence about the video that was too large."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError, the CPU's has no class of its own
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        batch, views, frames, _, height, width = sample.shape
        raise InputError("out_of_memory", f"{batch} x {views} views x {frames} frames of {width} x {height} don't fit into "
                         f"the memory of {sample.device}.",
                         "Use fewer frames or a smaller picture; `track4d doctor --plan` says what a size needs.") from error
