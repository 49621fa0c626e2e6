"""CoTracker3: joint tracking of many points by a transformer (Karaev et al. 2024, "CoTracker3: Simpler and Better Point Tracking
by Pseudo-Labelling Real Videos"; the model of the offline and the online checkpoints).

Our own module: its state-dict keys are those of the published checkpoints, which the user brings. Positions are in pixels of the
video with centres at integers, as the model was trained; `track4d.tracking.track` converts from the project's convention.

Views are the batch axis B; T is frames, N points, L pyramid levels, C feature channels, P = 7 the side of a correlation patch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 4  # pixels per cell of the finest feature map
LEVELS = 4
RADIUS = 3
SIDE = 2 * RADIUS + 1
FREQUENCIES = 10  # octaves in the encoding of displacements
PER_HEAD = 48
RESOLUTION = (384, 512)  # height and width that the published weights were trained at
ONLINE_WINDOW = 16  # frames; checkpoints with this window are the online ones
CHUNK_BYTES = 2**23  # of gathered features at a time: what stays in the processor's cache
TOKENS = 512  # that go through a block of the transformer at a time, for the same reason


class Estimate(NamedTuple):
    """Where points are believed to be; all [B, T, N, ...].

    Attributes:
        coords: [B, T, N, 2] in cells of the finest feature map.
        vis, conf: [B, T, N] logits: seen, and within the training's 12 pixels of the truth.
    """

    coords: Tensor
    vis: Tensor
    conf: Tensor


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norm, and a strided 1x1 convolution beside them where the resolution changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(F.instance_norm(self.conv1(x)))
        y = F.relu_(F.instance_norm(self.conv2(y)))
        return F.relu_(y.add_(x if self.downsample is None else F.instance_norm(self.downsample(x))))


class Encoder(nn.Module):
    """Pictures to features at a quarter of the resolution, from four scales (CoTracker, section 3.2)."""

    def __init__(self, latent: int) -> None:
        super().__init__()
        widths = (latent // 2, latent * 3 // 4, latent, latent)
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3)
        for k, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths), start=1):
            self.add_module(f"layer{k}", nn.Sequential(ResidualBlock(inputs, outputs, 1 if k == 1 else 2),
                                                       ResidualBlock(outputs, outputs, 1)))
        self.conv2 = nn.Conv2d(sum(widths), latent * 2, 3, 1, 1)
        self.conv3 = nn.Conv2d(latent * 2, latent, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 to [B, C, H // 4, W // 4]."""
        size = (pictures.shape[-2] // STRIDE, pictures.shape[-1] // STRIDE)
        x, scales = F.relu_(F.instance_norm(self.conv1(pictures))), []
        for k in range(1, 5):
            x = self.get_submodule(f"layer{k}")(x)
            scales.append(F.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.conv3(F.relu_(F.instance_norm(self.conv2(torch.cat(scales, 1)))))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x [B, Q, D] attends to context [B, K, D]."""
        heads = (len(x), -1, x.shape[-1] // PER_HEAD, PER_HEAD)
        q = self.to_q(x).view(heads).transpose(1, 2)  # [B, heads, Q, 48]
        k, v = (part.reshape(heads).transpose(1, 2) for part in self.to_kv(context).chunk(2, -1))
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int, approximate: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class SelfBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = Attention(width)
        self.mlp = Mlp(width, 4 * width, width, "tanh")

    def forward(self, x: Tensor) -> Tensor:
        normed = _norm(x)
        x = x + self.attn(normed, normed)
        return x + self.mlp(_norm(x))


class CrossBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_context = nn.LayerNorm(width)
        self.cross_attn = Attention(width)
        self.mlp = Mlp(width, 4 * width, width, "tanh")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.cross_attn(_norm(x), self.norm_context(context))
        return x + self.mlp(_norm(x))


def _in_parts(block: nn.Module, *sequences: Tensor) -> Tensor:
    """A block of sequences [B, Q, D] that know nothing of each other; on a CPU not all at once.

    The perceptron's temporary array of all of them would leave the cache, and go back to the system after every call.
    """
    rows = len(sequences[0]) if sequences[0].is_cuda else max(1, TOKENS // sequences[0].shape[1])
    return torch.cat([block(*parts) for parts in zip(*(each.split(rows) for each in sequences))])


class UpdateFormer(nn.Module):
    """Attention along time and, through a few virtual tracks, among points (CoTracker, section 3.3)."""

    def __init__(self, inputs: int, width: int, virtual_tracks: int, depth: int) -> None:
        super().__init__()
        self.virual_tracks = nn.Parameter(torch.randn(1, virtual_tracks, 1, width))  # spelt as in the published checkpoints
        self.input_transform = nn.Linear(inputs, width)
        self.flow_head = nn.Linear(width, 2)
        self.vis_conf_head = nn.Linear(width, 2)
        self.time_blocks = nn.ModuleList(SelfBlock(width) for _ in range(depth))
        self.space_virtual_blocks = nn.ModuleList(SelfBlock(width) for _ in range(depth))
        self.space_point2virtual_blocks = nn.ModuleList(CrossBlock(width) for _ in range(depth))
        self.space_virtual2point_blocks = nn.ModuleList(CrossBlock(width) for _ in range(depth))

    def forward(self, x: Tensor, space: bool = True) -> Tensor:
        """Tokens [B, N, T, inputs] to updates [B, N, T, 4]."""
        batch, _, frames, _ = x.shape
        x = self.input_transform(x)  # [B, N, T, D]
        virtual: Tensor = self.virual_tracks  # [1, virtual, 1, D]: alike in every view and frame until they have looked at points
        for k, time_block in enumerate(self.time_blocks):
            x = _in_parts(time_block, x.flatten(0, 1)).view(x.shape)
            if space:
                virtual = _in_parts(time_block, virtual.flatten(0, 1)).view(virtual.shape).expand(batch, -1, frames, -1)
                x, virtual = (part.transpose(1, 2).flatten(0, 1) for part in (x, virtual))  # [B * T, ..., D]
                virtual = _in_parts(self.space_virtual2point_blocks[k], virtual, x)  # each name says who asks whom
                virtual = _in_parts(self.space_virtual_blocks[k], virtual)
                x = _in_parts(self.space_point2virtual_blocks[k], x, virtual)
                x, virtual = (part.unflatten(0, (batch, frames)).transpose(1, 2) for part in (x, virtual))
        return torch.cat([self.flow_head(x), self.vis_conf_head(x)], -1)


def _cells(maps: Tensor, frames: Tensor, coords: Tensor) -> tuple[Tensor, Tensor]:
    """The (P + 1)^2 cells that a P x P patch around each position falls between, x outer, y inner, the border repeated.

    Args:
        maps: [B, T, h, w, C].
        frames: [B, N, S] long; coords: [B, N, S, 2] in cells of these maps.

    Returns:
        [B, N, S * 64, C] features, and [B, N, S, 1, 1, 2] how far the positions lie beyond their cell.
    """
    batch, count, height, width, channels = maps.shape
    whole = coords.floor()
    steps = torch.arange(-RADIUS, RADIUS + 2, device=maps.device)
    # Far outside, a float is too large for an integer; the border is the same everywhere there.
    low = whole.clamp(-2 * SIDE, max(height, width) + 2 * SIDE).long()
    x = (low[..., :1] + steps).clamp(0, width - 1)  # [B, N, S, 8]
    y = (low[..., 1:] + steps).clamp(0, height - 1)
    first = (torch.arange(batch, device=maps.device)[:, None, None] * count + frames) * height  # [B, N, S]
    index = (first[..., None, None] + y[..., None, :]) * width + x[..., :, None]  # [B, N, S, 8, 8]
    cells = maps.reshape(-1, channels).index_select(0, index.flatten())
    return cells.view(batch, coords.shape[1], -1, channels), (coords - whole)[..., None, None, :]


def _between(cells: Tensor, beyond: Tensor) -> Tensor:
    """Bilinear: [..., 8, 8, K] with shares [..., 1, 1, 2] to [..., 7, 7, K]."""
    cells = torch.lerp(cells[..., :-1, :, :], cells[..., 1:, :, :], beyond[..., :1])
    return torch.lerp(cells[..., :-1, :], cells[..., 1:, :], beyond[..., 1:])


def _sinusoids(length: int, width: int) -> Tensor:
    """The sine-cosine embedding [1, length, width] of 0..length-1 (Vaswani et al. 2017)."""
    rates = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[None].float()


class CoTracker3(nn.Module):
    """The network; the defaults are the published sizes.

    Args:
        latent: feature channels; hidden: transformer width, 48 per head; virtual_tracks, depth: of the transformer;
        corr_hidden, corr_out: of the correlation's perceptron; window: frames of the time embedding (16 in the online
        checkpoints, 60 in the offline ones); resolution: height and width that displacements are relative to.
    """

    time_emb: Tensor

    def __init__(self, latent: int = 128, hidden: int = 384, virtual_tracks: int = 64, depth: int = 3, corr_hidden: int = 384,
                 corr_out: int = 256, window: int = 60, resolution: tuple[int, int] = RESOLUTION) -> None:
        super().__init__()
        self.resolution = resolution
        self.online = window == ONLINE_WINDOW  # trained to slide over the clip rather than to see it whole
        width = 2 + LEVELS * corr_out + 4 * (1 + 2 * FREQUENCIES)
        self.register_buffer("time_emb", _sinusoids(window, width))
        self.fnet = Encoder(latent)
        self.updateformer = UpdateFormer(width, hidden, virtual_tracks, depth)
        self.corr_mlp = Mlp(SIDE**4, corr_hidden, corr_out, "none")

    @property
    def window(self) -> int:
        return self.time_emb.shape[1]

    def encode(self, video: Tensor) -> list[Tensor]:
        """Feature pyramid of a video [B, T, 3, H, W] in 0..255: per level [B, T, h, w, C], of unit length on the finest."""
        maps = [self.fnet(frame[None] / 127.5 - 1) for frame in video.flatten(0, 1)]  # one picture at a time stays in the cache
        finest = F.normalize(torch.cat(maps), dim=1, eps=1e-6)  # [B * T, C, h, w]
        pyramid = [finest]
        for _ in range(1, LEVELS):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        return [level.permute(0, 2, 3, 1).contiguous().unflatten(0, video.shape[:2]) for level in pyramid]

    def templates(self, pyramid: list[Tensor], queries: Tensor) -> list[Tensor]:
        """What the points look like at their queries [B, N, 3] (frame, x, y in cells); per level [B, N, C, 49]."""
        found = []
        for k, maps in enumerate(pyramid):
            cells, beyond = _cells(maps, queries[..., :1].long(), queries[..., None, 1:] / 2**k)
            patch = _between(cells.unflatten(2, (1, SIDE + 1, SIDE + 1)), beyond)  # [B, N, 1, 7, 7, C]
            found.append(patch.flatten(2, 4).transpose(2, 3).contiguous())
        return found

    def correlate(self, pyramid: list[Tensor], templates: list[Tensor], coords: Tensor) -> Tensor:
        """4D correlation around `coords` [B, T, N, 2] in cells, encoded; [B, N, T, L * corr_out] (CoTracker3, section 3.2).

        Correlation is linear, so it is taken with the whole cells around a patch and interpolated afterwards: 49 numbers per
        cell instead of C, and the template is never repeated over the frames.
        """
        coords = coords.transpose(1, 2)  # [B, N, T, 2]
        batch, points, count, _ = coords.shape
        frames = torch.arange(count, device=coords.device)[None, None]  # [1, 1, T]
        size = max(1, CHUNK_BYTES // (count * (SIDE + 1) ** 2 * pyramid[0].shape[-1] * 4))
        rows = []
        for v in range(batch):  # the maps of one view are what the cache has room for
            for start in range(0, points, size):
                some, levels = (slice(v, v + 1), slice(start, start + size)), []
                for k, (maps, template) in enumerate(zip(pyramid, templates)):
                    cells, beyond = _cells(maps[v:v + 1], frames, coords[some] / 2**k)
                    dots = cells @ template[some]  # [1, n, T * 64, 49]
                    dots = _between(dots.unflatten(2, (count, SIDE + 1, SIDE + 1)), beyond)
                    levels.append(self.corr_mlp(dots.flatten(3)))
                rows.append(torch.cat(levels, -1)[0])
        return torch.cat(rows).unflatten(0, (batch, points))

    def tokens(self, estimate: Estimate, correlation: Tensor) -> Tensor:
        """The transformer's input [B, N, T, 1110]: visibility, confidence, correlation, displacements, time."""
        coords = estimate.coords.transpose(1, 2)  # [B, N, T, 2]
        step = coords[:, :, 1:] - coords[:, :, :-1]
        moved = torch.cat([F.pad(-step, (0, 0, 0, 1)), F.pad(step, (0, 0, 1, 0))], -1)  # [B, N, T, 4]
        moved = moved / (moved.new_tensor(self.resolution[::-1]).repeat(2) / STRIDE)
        octaves = 2.0 ** torch.arange(FREQUENCIES, device=moved.device)
        angles = (moved[..., None, :] * octaves[:, None]).flatten(-2)  # [B, N, T, 40]
        seen = torch.stack([estimate.vis, estimate.conf], -1).transpose(1, 2)
        time = self.time_emb
        if coords.shape[2] != self.window:
            time = F.interpolate(time.transpose(1, 2), coords.shape[2], mode="linear").transpose(1, 2)
        return torch.cat([seen, correlation, moved, angles.sin(), (angles + math.pi / 2).sin()], -1) + time[:, None]

    def refine(self, pyramid: list[Tensor], templates: list[Tensor], estimate: Estimate, iterations: int,
               space: bool = True) -> Estimate:
        """Improves an estimate."""
        for _ in range(iterations):
            correlation = self.correlate(pyramid, templates, estimate.coords)
            delta = self.updateformer(self.tokens(estimate, correlation), space).transpose(1, 2)  # [B, T, N, 4]
            estimate = Estimate(estimate.coords + delta[..., :2], estimate.vis + delta[..., 2], estimate.conf + delta[..., 3])
        return estimate

    def locate(self, pyramid: list[Tensor], queries: Tensor, iterations: int = 6, space: bool = True) -> Estimate:
        """Tracks queries [B, N, 3] (frame, x, y in cells) through a whole clip that has been encoded."""
        coords = queries[:, None, :, 1:].expand(-1, pyramid[0].shape[1], -1, -1)  # [B, T, N, 2]
        zeros = torch.zeros_like(coords[..., 0])
        return self.refine(pyramid, self.templates(pyramid, queries), Estimate(coords, zeros, zeros), iterations, space)

    def forward(self, video: Tensor, queries: Tensor, iterations: int = 6, space: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Tracks points through a whole clip.

        Args:
            video: [B, T, 3, H, W] in 0..255.
            queries: [B, N, 3] frame and pixel position (x, y).

        Returns:
            tracks [B, T, N, 2] pixels, visibility and confidence [B, T, N] in 0..1.
        """
        found = self.locate(self.encode(video), to_cells(queries), iterations, space)
        return found.coords * STRIDE, found.vis.sigmoid(), found.conf.sigmoid()


def to_cells(queries: Tensor) -> Tensor:
    """Queries [..., 3] (frame, x, y) from pixels to cells of the finest feature map."""
    return queries * queries.new_tensor([1, 1 / STRIDE, 1 / STRIDE])
