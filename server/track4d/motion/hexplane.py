"""Hex-planes: six feature planes over the pairs of (x, y, z, t) whose product is a feature of a place at a time.

After HexPlane (Cao and Johnson 2023) as 4D-GS and Animate3D use it. Places are those of the still object, so what depends on
them alone is looked up once for all times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

SPACE_PAIRS = ((0, 1), (0, 2), (1, 2))  # xy, xz, yz


@dataclass(frozen=True)
class HexPlaneSize:
    """How fine the planes are.

    Attributes:
        levels: cells along x, y, z and t of each level.
        width: features per level.
    """

    levels: tuple[tuple[int, int, int, int], ...]
    width: int = 16

    @property
    def features(self) -> int:
        return self.width * len(self.levels)


PAPER_PLANES = HexPlaneSize(((100, 100, 100, 8),))  # Track4DGen, section 6
TWO_LEVEL_PLANES = HexPlaneSize(((50, 50, 50, 8), (100, 100, 100, 16)))  # Animate3D


class HexPlane(nn.Module):
    """Features of places and times.

    Space planes start uniform in 0.1..0.5, time planes at one: at first a feature doesn't depend on time.

    Args:
        size: resolution and width.
        periodic: the time -1 is also the time 1, and the features go on smoothly from one to the other.
        generator: source of the start; the global one where not given.
    """

    def __init__(self, size: HexPlaneSize = PAPER_PLANES, periodic: bool = False,
                 generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.size, self.periodic = size, periodic
        self.space, self.time = nn.ParameterList(), nn.ParameterList()  # three of each per level
        for level in size.levels:
            for a, b in SPACE_PAIRS:
                start = torch.rand(1, size.width, level[b], level[a], generator=generator)
                self.space.append(nn.Parameter(0.1 + 0.4 * start))  # [1, C, cells of b, cells of a]
            for a in range(3):
                self.time.append(nn.Parameter(torch.ones(1, size.width, level[3], level[a])))  # [1, C, cells of t, cells of a]

    def forward(self, points: Tensor, times: Tensor) -> Tensor:
        """Looks the planes up: bilinear, ends of the range repeated outside of it.

        Args:
            points: [N, 3] canonical places in about [-1, 1].
            times: [F] in [-1, 1].

        Returns:
            [F, N, levels * width].
        """
        return torch.cat([self._level(k, points, times) for k in range(len(self.size.levels))], -1)

    def _level(self, level: int, points: Tensor, times: Tensor) -> Tensor:
        features = points.new_ones(len(points), 1, self.size.width)  # [N, 1, C], the same at all times
        for plane, pair in zip(self.space[3 * level:3 * level + 3], SPACE_PAIRS):
            looked_up = functional.grid_sample(plane, points[None, None, :, pair], padding_mode="border", align_corners=True)
            features = features * looked_up[0, :, 0].T[:, None]
        for axis, plane in enumerate(self.time[3 * level:3 * level + 3]):
            rows = plane[0].permute(1, 2, 0)  # [cells of t, cells of a, C]
            if self.periodic:
                rows = torch.cat([rows, rows[:1]])  # the start again, one cell after the end
                at_times = interpolate(rows, torch.remainder(times + 1, 2) - 1)  # [F, cells of a, C]
            else:
                at_times = interpolate(rows, times)  # [F, cells of a, C]
            features = features * interpolate(at_times.transpose(0, 1).contiguous(), points[:, axis])  # [N, F, C]
        return features.transpose(0, 1)


def interpolate(rows: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation between rows that are spread over [-1, 1].

    Args:
        rows: [R, ...].
        values: [N]; outside of [-1, 1] the last row's value goes on.

    Returns:
        [N, ...].
    """
    at = (values.clamp(-1, 1) + 1) / 2 * (len(rows) - 1)  # [N]
    before = at.floor().long().clamp(max=max(len(rows) - 2, 0))
    after = (before + 1).clamp(max=len(rows) - 1)
    share = (at - before).reshape(-1, *[1] * (rows.ndim - 1))
    return torch.lerp(rows.index_select(0, before), rows.index_select(0, after), share)
