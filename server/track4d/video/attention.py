"""The attention of the multi-view video U-Net, as processors that diffusers' `Attention` modules carry.

Every processor sees tokens as [B * V * F, h * w, C] and regroups them itself, so that the rest of a block neither knows nor
cares how many views and frames there are. Source: Track4DGen section 3.2, Animate3D section 3.1.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK = 1 << 30  # scores per call: a backend that stores them needs 2 GiB of half precision then
GRID_LIMIT = 65535  # sequences per call: CUDA kernels start one block for each, and a grid has no more


class Layout(NamedTuple):
    """What the leading axis of [B * V * F, h * w, C] means, and what the whole video is conditioned on.

    Attributes:
        views, frames, height, width: V, F, h, w.
        image: [B * V, T, text_dim] tokens of each view's first picture for the IP-Adapter, or None.
    """

    views: int
    frames: int
    height: int
    width: int
    image: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Multi-head attention in slices that keep the memory bounded on every backend.

    Args:
        query: [N, Q, C].
        key, value: [N, K, C].
        heads: how many parts C is cut into.

    Returns:
        [N, Q, C].
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # [N, heads, Q or K, C / heads]
    scores = heads * q.shape[2] * k.shape[2]  # of one sequence
    sequences = max(1, min(GRID_LIMIT, CHUNK // scores))
    rows = max(1, q.shape[2] * CHUNK // scores)
    result = [torch.cat([F.scaled_dot_product_attention(part, k_, v_) for part in q_.split(rows, 2)], 2)
              if rows < q.shape[2] else F.scaled_dot_product_attention(q_, k_, v_)
              for q_, k_, v_ in zip(q.split(sequences), k.split(sequences), v.split(sequences))]
    joined = result[0] if len(result) == 1 else torch.cat(result)  # [N, heads, Q, C / heads]
    return joined.transpose(1, 2).flatten(2)


def views_together(tokens: Tensor, layout: Layout) -> Tensor:
    """[B * V * F, L, C] -> [B * F, V * L, C]: one sequence for each moment, over all views."""
    return tokens.unflatten(0, (-1, layout.views, layout.frames)).transpose(1, 2).flatten(0, 1).flatten(1, 2)


def views_apart(tokens: Tensor, layout: Layout) -> Tensor:
    """The inverse of `views_together`."""
    return (tokens.unflatten(1, (layout.views, -1)).unflatten(0, (-1, layout.frames)).transpose(1, 2).flatten(0, 2))


def place_encoding(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """2-D sine code of a grid's cells [h * w, C]: rows in the first half, columns in the second, scaled to (0, 2 pi].

    Source: Carion et al. 2020, appendix A.4, normalised. Needs C divisible by 4.
    """
    waves = 10_000 ** (torch.arange(0, channels // 2, 2, device=device, dtype=torch.float32) / (channels // 2))  # [C / 4]

    def axis(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, device=device, dtype=torch.float32) * (2 * math.pi / (count + 1e-6))
        angles = steps[:, None] / waves  # [count, C / 4]
        return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)  # [count, C / 2]

    rows = axis(height)[:, None].expand(-1, width, -1)  # [h, w, C / 2]
    columns = axis(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


class MultiViewAttention(nn.Module):
    """Self-attention over all views of one moment, and the MV2V adapter, in which every frame asks the first one.

    The adapter has its own queries; keys and values are the shared ones of frame 0, of all views. Its result is added
    before the shared output projection. It starts as a copy of the shared queries with a silent output.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        channels = attention.to_q.in_features
        self.to_q_i2v = nn.Linear(channels, channels, bias=False)
        self.to_out_i2v = nn.Linear(channels, channels)
        with torch.no_grad():
            self.to_q_i2v.weight.copy_(attention.to_q.weight)
        nn.init.zeros_(self.to_out_i2v.weight)
        nn.init.zeros_(self.to_out_i2v.bias)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        assert layout is not None and encoder_hidden_states is None and attention_mask is None
        x = views_together(hidden_states, layout)  # [B * F, V * L, C]
        key, value = attn.to_k(x), attn.to_v(x)
        views = attend(attn.to_q(x), key, value, attn.heads)
        first_key, first_value = (y.unflatten(0, (-1, layout.frames))[:, 0] for y in (key, value))  # [B, V * L, C]
        query = self.to_q_i2v(x).unflatten(0, (-1, layout.frames)).flatten(1, 2)  # [B, F * V * L, C]
        first = attend(query, first_key, first_value, attn.heads).view_as(x)
        return views_apart(attn.to_out[0](views + self.to_out_i2v(first)), layout)


class PromptAttention(nn.Module):
    """Cross-attention to the text, and to the tokens of each view's first picture where there is an IP-Adapter."""

    def __init__(self, attention: Any, image: bool) -> None:
        super().__init__()
        if image:
            text_dim, channels = attention.to_k.in_features, attention.to_k.out_features
            self.to_k_ip = nn.ModuleList([nn.Linear(text_dim, channels, bias=False)])
            self.to_v_ip = nn.ModuleList([nn.Linear(text_dim, channels, bias=False)])

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        """encoder_hidden_states [B * V, T, text_dim]: the frames of a view share their keys and values."""
        assert layout is not None and encoder_hidden_states is not None and attention_mask is None
        query = attn.to_q(hidden_states).unflatten(0, (-1, layout.frames)).flatten(1, 2)  # [B * V, F * L, C]
        result = attend(query, attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states), attn.heads)
        if layout.image is not None:
            result = result + attend(query, self.to_k_ip[0](layout.image), self.to_v_ip[0](layout.image), attn.heads)
        return attn.to_out[0](result.view_as(hidden_states))


class SpatioTemporalAttention(nn.Module):
    """Attention over time in each cell, blended with attention over all views and cells of each moment.

    Args:
        attention: the diffusers module that carries the temporal projections.
        max_frames: length of the time code.
        spatial: False leaves the branch over the views out, for levels of many cells in a small network.
    """

    def __init__(self, attention: Any, max_frames: int, spatial: bool) -> None:
        from diffusers.models.embeddings import SinusoidalPositionalEmbedding

        super().__init__()
        channels = attention.to_q.in_features
        self.time_pos_embed = SinusoidalPositionalEmbedding(channels, max_frames)
        self.spatial = spatial
        if spatial:
            self.to_q_sp = nn.Linear(channels, channels, bias=False)
            self.to_k_sp = nn.Linear(channels, channels, bias=False)
            self.to_v_sp = nn.Linear(channels, channels, bias=False)
            self.to_out_sp = nn.Linear(channels, channels)
            self.alpha_blender = nn.ParameterDict({"mix_factor": nn.Parameter(torch.zeros(1))})

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, layout: Layout | None = None) -> Tensor:
        assert layout is not None and encoder_hidden_states is None and attention_mask is None
        temporal = self._over_time(attn, hidden_states, layout)
        if not self.spatial:
            return temporal
        spatial = self._over_views(attn, hidden_states, layout)
        return torch.lerp(temporal, spatial, self.alpha_blender["mix_factor"].sigmoid().to(temporal.dtype))

    def _over_time(self, attn: Any, tokens: Tensor, layout: Layout) -> Tensor:
        x = tokens.unflatten(0, (-1, layout.frames)).transpose(1, 2).flatten(0, 1)  # [B * V * L, F, C]
        x = self.time_pos_embed(x)
        x = attn.to_out[0](attend(attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.heads))
        return x.unflatten(0, (-1, tokens.shape[1])).transpose(1, 2).flatten(0, 1)

    def _over_views(self, attn: Any, tokens: Tensor, layout: Layout) -> Tensor:
        code = place_encoding(layout.height, layout.width, tokens.shape[-1], tokens.device).to(tokens.dtype)  # [L, C]
        x = views_together(tokens + code, layout)  # [B * F, V * L, C]
        x = self.to_out_sp(attend(self.to_q_sp(x), self.to_k_sp(x), self.to_v_sp(x), attn.heads))
        return views_apart(x, layout)
