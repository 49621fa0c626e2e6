"""The multi-view U-Net that denoises motion latents.

A small relative of MV-VDM's (Track4DGen, section 3): the four static views are denoised together, and attention over
all their tokens at the two coarse levels keeps them consistent. Tokens say how their pixels move as matrices, too, and so do
the whole object and its parts (parts.py), since limbs and whole bodies mostly turn. Position comes from the rest-position map
alone, so that tokens of different views that see the same place know it, and so that no parameter is bound to a resolution. The
last stage works on quarters of a token, so that a thin limb needn't move as the body beside it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .diffusion import BASE_GRID, LATENT_CHANNELS, log_snr
from .parts import PartMotion, zero
from .text import MAX_TOKENS, VOCABULARY_SIZE

CONDITION_CHANNELS = 8  # premultiplied RGBA, rest position, mask


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of the network; stored with its weights.

    Attributes:
        channels: of the three levels of tokens, fine to coarse.
        detail: channels of the last stage, on cells of half a token's side.
        grid: pixels along each side of the motion latent.
        patch: pixels along each side of a token of the finest level; even.
        parts: of an object that move as one piece, at most.
        gist: features of the whole object, by which a sentence asks other things of other bodies.
    """

    channels: tuple[int, int, int] = (64, 96, 128)
    detail: int = 32
    embedding: int = 160
    text_width: int = 64
    grid: int = BASE_GRID
    patch: int = 2
    parts: int = 14
    gist: int = 128
    vocabulary: int = VOCABULARY_SIZE
    latent: int = LATENT_CHANNELS

    def to_dict(self) -> dict:
        return asdict(self)


def position_features(position: Tensor, mask: Tensor) -> Tensor:
    """Rest positions [B, 3, H, W] as smooth codes, 0 outside the mask [B, 1, H, W]; [B, 15, H, W]."""
    waves = [position * (math.pi * octave) for octave in (1.0, 2.5)]
    return torch.cat([position, *[f(wave) for wave in waves for f in (torch.sin, torch.cos)]], 1) * mask


def patches(picture: Tensor, layer: nn.Conv2d, side: int) -> Tensor:
    """`layer` on patches of pixels: [B, C, H, W] to [B, out, H / side, W / side].

    A strided convolution, the same as `layer(pixel_unshuffle(picture, side))`. Channels last in memory it takes a third of the
    time; as the picture lies, so does the answer.
    """
    out, _, kernel, _ = layer.weight.shape
    weight = layer.weight.view(out, -1, side, side, kernel, kernel).permute(0, 1, 4, 2, 5, 3)
    weight = weight.reshape(out, -1, kernel * side, kernel * side)
    return F.conv2d(picture, weight, layer.bias, side, kernel // 2 * side)


def pixels(tokens: Tensor, layer: nn.Conv2d, side: int) -> Tensor:
    """The way back, channels last in memory: `pixel_shuffle(layer(tokens), side)` of a layer of width 1.

    Args:
        tokens: [B, in, h, w].

    Returns:
        [B, C, h * side, w * side].
    """
    # The bias differs from pixel to pixel of a patch: it is the weight of a channel of ones.
    weight = torch.cat([layer.weight[:, :, 0, 0], layer.bias[:, None]], 1)  # type: ignore[index]
    weight = weight.view(-1, side, side, weight.shape[1]).permute(3, 0, 1, 2)
    tokens = torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1).contiguous(memory_format=torch.channels_last)
    return F.conv_transpose2d(tokens, weight.contiguous(), stride=side)


def turned(tokens: Tensor, position: Tensor) -> Tensor:
    """Every token's matrices times the positions of its pixels: what moves as one piece is said by one matrix for all its tokens.

    Args:
        tokens: [B, C * 3, h, w].
        position: [B, 3, H, W].

    Returns:
        [B, C, H, W], channels last in memory.
    """
    count, _, height, width = tokens.shape
    side = position.shape[-1] // width
    matrices = tokens.reshape(count, -1, 3, height * width).permute(0, 3, 2, 1).reshape(-1, 3, tokens.shape[1] // 3)
    places = position.reshape(count, 3, height, side, width, side).permute(0, 2, 4, 3, 5, 1).reshape(-1, side * side, 3)
    moved = torch.bmm(places.to(tokens.dtype), matrices).view(count, height, width, side, side, -1).transpose(2, 3)
    return moved.reshape(count, height * side, width * side, -1).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions, the second modulated by the embedding (FiLM, Perez et al. 2018)."""

    def __init__(self, channels: int, embedding: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.modulation = nn.Linear(embedding, 2 * channels)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(x)))) * (1 + scale) + shift
        return x + self.conv_out(F.silu(h))


class MultiViewAttention(nn.Module):
    """Self-attention over the tokens of all views of one object, then a feed-forward layer.

    Queries and keys are compared by their angle (Henry et al. 2020), or training makes them longer and longer until every
    token sees one other alone and nothing is learnt any more.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // 32
        self.norm, self.norm_feed = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.place = nn.Linear(16, channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))
        self.sharpness = nn.Parameter(torch.full((self.heads,), math.log(10.0)))
        self.feed = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), zero(nn.Linear(2 * channels, channels)))

    def forward(self, x: Tensor, places: Tensor, views: int) -> Tensor:
        """x [B * V, C, H, W]; places [B * V, 16, H, W] of the same size."""
        count, channels, height, width = x.shape
        tokens = x.reshape(-1, views, channels, height * width).transpose(2, 3).reshape(-1, views * height * width, channels)
        codes = places.reshape(-1, views, 16, height * width).transpose(2, 3).reshape(-1, views * height * width, 16)
        batch, length, _ = tokens.shape
        # In full precision: half of it rounds large logits by more than their differences, and what comes back is noise.
        with torch.autocast(x.device.type, enabled=False):
            qkv = self.qkv(self.norm(tokens.float()) + self.place(codes.float()))
            q, k, v = qkv.view(batch, length, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4)
            q, k = F.normalize(q, dim=-1) * self.sharpness.exp()[:, None, None], F.normalize(k, dim=-1)
            # Written out: on CPUs twice as fast as the fused kernel at a few hundred tokens, backward pass included.
            weights = torch.softmax(q @ k.transpose(-1, -2), -1)
            attended = (weights @ v).transpose(1, 2).reshape(batch, length, channels)
            tokens = tokens + self.out(attended)
        tokens = tokens + self.feed(self.norm_feed(tokens))
        return tokens.view(batch, views, height * width, channels).transpose(2, 3).reshape(count, channels, height, width)


class TextEncoder(nn.Module):
    """Token embeddings, one transformer layer, mean; a learnt vector stands for no sentence."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.position = nn.Parameter(torch.randn(MAX_TOKENS, width) * 0.1)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.null = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, tokens: Tensor, drop: Tensor) -> Tensor:
        """tokens [B, MAX_TOKENS]; drop [B] bool; [B, width]."""
        drop = drop | (tokens == 0).all(1)
        real = tokens > 0
        padding = ~real & ~drop[:, None]
        h = self.layer(self.embedding(tokens) + self.position, src_key_padding_mask=padding)
        mean = (h * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)
        return torch.where(drop[:, None], self.null.to(mean.dtype), mean)


class Gist(nn.Module):
    """What the pictures show as a whole, and what that makes of a sentence: a crab doesn't walk as a fox does."""

    VIEWS = 4
    SIDE = 4  # places along each side of a view that are told apart

    def __init__(self, width: int, fine: int, text_width: int, embedding: int) -> None:
        """Args: channels of the whole's features, of the pictures', of the sentence's and of the embedding."""
        super().__init__()
        self.first, self.second = nn.Conv2d(fine, fine, 3, 2, 1), nn.Conv2d(fine, fine, 3, 2, 1)
        self.whole = nn.Linear(self.VIEWS * fine * self.SIDE**2, width)
        self.inside = nn.Linear(width + text_width, 2 * width)
        self.out = zero(nn.Linear(2 * width, embedding))

    def look(self, fine: Tensor, views: int) -> Tensor:
        """[B * V, channels, h, w] of at most four views to [B, width]."""
        h = self.second(F.silu(self.first(F.silu(fine))))
        h = F.adaptive_avg_pool2d(F.silu(h), self.SIDE).reshape(len(fine) // views, -1)
        whole = self.whole(F.pad(h, (0, self.whole.in_features - h.shape[1])))
        return F.rms_norm(whole, whole.shape[-1:])

    def forward(self, gist: Tensor, text: Tensor) -> Tensor:
        """[B, width] of `look` and [B, text_width] to a share of the embedding, [B, E]."""
        return self.out(F.silu(self.inside(torch.cat([gist, text], 1))))


class Observed(NamedTuple):
    """What the network makes of an object before it looks at any motion; the same at every step of the sampler.

    Attributes:
        position: [B, V, 3, H, W]; mask: [B, V, 1, H, W].
        fine: [B * V, channels, h, w] and detail: [B * V, channels, 2 h, 2 w], features of the pictures.
        places: [B * V, 16, h / 2, w / 2] and coarse_places: [B * V, 16, h / 4, w / 4], where tokens lie.
        gist: [B, `config.gist`] of `Gist.look`.
    """

    position: Tensor
    mask: Tensor
    fine: Tensor
    detail: Tensor
    places: Tensor
    coarse_places: Tensor
    gist: Tensor

    def repeated(self, count: int) -> Observed:
        """One object, before so many motions of it."""
        return Observed(*(part.repeat(count, *[1] * (part.ndim - 1)) for part in self))


class MotionUNet(nn.Module):
    """Predicts the clean motion latent of all views from a noisy one."""

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        fine, middle, coarse = config.channels
        area, quarter, width = config.patch**2, (config.patch // 2) ** 2, config.embedding
        self.latent_in = nn.Conv2d(config.latent * area, fine, 1)
        self.condition_in = nn.Conv2d((CONDITION_CHANNELS - 3 + 15) * area, fine, 3, padding=1)
        self.text = TextEncoder(config.vocabulary, config.text_width)
        self.text_in = nn.Linear(config.text_width, width)
        self.level_in = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.view = nn.Parameter(torch.randn(4, width) * 0.1)
        self.embedding_out = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.parts = PartMotion(config.parts, config.latent, config.embedding, config.detail, fine, coarse)
        self.gist = Gist(config.gist, fine, config.text_width, width)
        self.fine_down = ResidualBlock(fine, width)
        self.to_middle = nn.Conv2d(fine, middle, 3, 2, 1)
        self.middle_down = ResidualBlock(middle, width)
        self.to_coarse = nn.Conv2d(middle, coarse, 3, 2, 1)
        self.coarse_blocks = nn.ModuleList(ResidualBlock(coarse, width) for _ in range(3))
        self.coarse_attention = nn.ModuleList(MultiViewAttention(coarse) for _ in range(2))
        self.from_coarse = nn.Conv2d(coarse, middle, 1)
        self.middle_up = ResidualBlock(middle, width)
        self.middle_attention = MultiViewAttention(middle)
        self.from_middle = nn.Conv2d(middle, fine, 1)
        self.fine_up = nn.ModuleList(ResidualBlock(fine, width) for _ in range(2))
        self.norm = nn.GroupNorm(8, fine)
        self.out = zero(nn.Conv2d(fine, config.latent * area, 1))
        self.affine = zero(nn.Conv2d(fine, config.latent * 3, 1))
        self.from_fine = nn.Conv2d(fine, 4 * config.detail, 1)
        self.latent_in_detail = nn.Conv2d(config.latent * quarter, config.detail, 1)
        self.condition_in_detail = nn.Conv2d((CONDITION_CHANNELS - 3 + 15) * quarter, config.detail, 3, padding=1)
        self.detail = ResidualBlock(config.detail, width)
        self.norm_detail = nn.GroupNorm(8, config.detail)
        self.out_detail = zero(nn.Conv2d(config.detail, config.latent * quarter, 1))

    def observe(self, condition: Tensor) -> Observed:
        """[B, V, 8, H, W] from `maps.condition`; H = W = `config.grid`, which divides by 4 * `config.patch`."""
        patch = self.config.patch
        position, mask = condition[:, :, 4:7], condition[:, :, 7:]
        codes = position_features(position.flatten(0, 1), mask.flatten(0, 1))
        inputs = torch.cat([condition[:, :, :4].flatten(0, 1), codes, mask.flatten(0, 1)], 1)
        places = F.avg_pool2d(inputs[:, 4:], 2 * patch)
        places = torch.cat([places[:, :15] / places[:, 15:].clamp(min=0.05), places[:, 15:]], 1)
        kind = torch.get_autocast_dtype(inputs.device.type) if torch.is_autocast_enabled(inputs.device.type) else inputs.dtype
        inputs = inputs.to(kind, memory_format=torch.channels_last)
        fine, detail = patches(inputs, self.condition_in, patch), patches(inputs, self.condition_in_detail, patch // 2)
        return Observed(position, mask, fine, detail, places, F.avg_pool2d(places, 2), self.gist.look(fine, condition.shape[1]))

    def forward(
        self, noisy: Tensor, condition: Tensor | Observed, noise_level: Tensor, tokens: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            noisy: [B, V, latent, H, W].
            condition: of `observe`, or what `observe` made of it.
            noise_level: [B] in 0..1.
            tokens: [B, MAX_TOKENS] int64.
            drop: [B] bool, samples to be denoised without their sentence.

        Returns:
            the clean latent, [B, V, latent, H, W]; meaningless where the mask is 0.
        """
        observed = self.observe(condition) if isinstance(condition, Tensor) else condition
        places, coarse_places = observed.places, observed.coarse_places
        batch, views, _, height, width = noisy.shape
        patch = self.config.patch
        drop = torch.zeros(batch, dtype=torch.bool) if drop is None else drop
        frequencies = torch.exp(torch.arange(32) * (-math.log(1000) / 31)).to(noisy.device)
        angles = noise_level[:, None] * 1000 * frequencies
        snr = log_snr(noise_level, width)
        look, about = self.parts.look(noisy, observed.position, observed.mask, snr, patch // 2)
        sentence = self.text(tokens, drop)
        embedding = self.level_in(torch.cat([angles.sin(), angles.cos()], -1)) + self.text_in(sentence) + about
        embedding = embedding + self.gist(observed.gist, sentence)
        embedding = self.embedding_out(embedding[:, None] + self.view[None, :views])
        embedding = F.rms_norm(embedding, embedding.shape[-1:])
        mean_embedding, embedding = embedding.mean(1), embedding.flatten(0, 1)
        scale = (torch.sigmoid(snr) + torch.sigmoid(-snr) * (BASE_GRID / width) ** 2) ** -0.5  # 1 at the base grid
        scale = observed.mask.flatten(0, 1) * scale.repeat_interleave(views)[:, None, None, None]
        kind = torch.get_autocast_dtype(noisy.device.type) if torch.is_autocast_enabled(noisy.device.type) else noisy.dtype
        # Of unit variance after averaging to the base grid; noise where nothing is seen would only distract.
        noisy = noisy.flatten(0, 1).to(kind, memory_format=torch.channels_last) * scale.to(kind)
        h = (patches(noisy, self.latent_in, patch) + observed.fine).contiguous()
        fine = h = self.fine_down(h, embedding)
        middle = h = self.middle_down(self.to_middle(h), embedding)
        h = self.coarse_blocks[0](self.to_coarse(h), embedding)
        skip = h = self.coarse_attention[0](h, coarse_places, views)
        h = self.coarse_blocks[1](h, embedding)
        h = self.coarse_attention[1](self.coarse_blocks[2](h + skip, embedding), coarse_places, views)
        pooled = h.mean((2, 3)).view(batch, views, -1).mean(1)
        h = self.middle_up(F.interpolate(self.from_coarse(h), scale_factor=2.0, mode="nearest") + middle, embedding)
        h = self.middle_attention(h, places, views)
        h = F.interpolate(self.from_middle(h), scale_factor=2.0, mode="nearest") + fine
        for block in self.fine_up:
            h = block(h, embedding)
        h = F.silu(self.norm(h))
        cell = patch // 2
        seen = (patches(noisy, self.latent_in_detail, cell) + observed.detail).contiguous()
        detail = F.pixel_shuffle(self.from_fine(h), 2) + seen
        detail = F.silu(self.norm_detail(self.detail(detail, embedding)))
        out = pixels(h, self.out, patch) + turned(self.affine(h), (observed.position * observed.mask).flatten(0, 1))
        out = out + pixels(detail, self.out_detail, cell)
        return out.unflatten(0, (batch, views)) + self.parts(look, mean_embedding, detail, h, pooled)

    @torch.no_grad()
    def refined(self) -> MotionUNet:
        """The same network on a grid twice as fine: every pixel is answered as its coarse one was, until trained further."""
        config = replace(self.config, grid=2 * self.config.grid, patch=2 * self.config.patch)
        fine, state = MotionUNet(config), self.state_dict()

        def spread(weight: Tensor, dimension: int, side: int) -> Tensor:
            """Channels (c, y, x) of a patch, each repeated for the 2 x 2 finer pixels it becomes."""
            before, after = weight.shape[:dimension], weight.shape[dimension + 1 :]
            patches = weight.reshape(*before, -1, side, side, *after)
            patches = patches.repeat_interleave(2, dimension + 1).repeat_interleave(2, dimension + 2)
            return patches.reshape(*before, -1, *after)

        for stage, side in (("", self.config.patch), ("_detail", self.config.patch // 2)):
            for name in (f"latent_in{stage}.weight", f"condition_in{stage}.weight"):
                state[name] = spread(state[name], 1, side) / 4
            for name in (f"out{stage}.weight", f"out{stage}.bias"):
                state[name] = spread(state[name], 0, side)
        fine.load_state_dict(state)
        return fine
