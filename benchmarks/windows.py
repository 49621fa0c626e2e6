"""Seams of long and looping videos: how much faster they move where windows meet than elsewhere.

The latents are a smooth Gaussian process over frames, whose perfect denoiser is known in closed form, so that every jump
comes from the windows and none from a network. "plain" imposes the known frames alone; "spread" also hands on what the
denoiser gets wrong on them (`sampling.correction`). 1 is seamless; the second column of each pair is the acceleration.

python benchmarks/windows.py
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from track4d.video import sampling

LONG = 40


def denoise(latents: Tensor, first: Tensor, t: int, length: float) -> Tensor:
    """Clean moving frames [V, M, C, h, w] by their exact posterior mean; correlation exp(-(distance / length)^2 / 2)."""
    alpha = sampling.ALPHA_BARS[t].double()
    frames = torch.arange(latents.shape[1] + 1, dtype=torch.float64)
    covariance = torch.exp(-0.5 * ((frames[:, None] - frames) / length) ** 2) + 1e-4 * torch.eye(len(frames), dtype=torch.float64)
    gain = covariance[1:, :1] / covariance[0, 0]
    inner = covariance[1:, 1:] - gain @ covariance[:1, 1:]
    prior = first.double().flatten()[None] * gain  # [M, P]
    noisy = latents.double().transpose(0, 1).flatten(1)  # [M, P]
    system = alpha * inner + (1 - alpha) * torch.eye(len(inner), dtype=torch.float64)
    clean = prior + alpha.sqrt() * inner @ torch.linalg.solve(system, noisy - alpha.sqrt() * prior)
    return clean.unflatten(1, first.shape).transpose(0, 1).float()


def seam(video: Tensor, order: int) -> float:
    """Largest over median root mean square of the difference over frames."""
    sizes = torch.diff(video, n=order, dim=1).square().mean((0, 2, 3, 4)).sqrt().numpy()
    return float(sizes.max() / np.median(sizes))


def main() -> None:
    torch.set_num_threads(1)
    spread = sampling.correction
    first = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    print(f"{'correlation':>12} {'windows':>8} {f'{LONG} frames':>14} {'16, loop':>14} {f'{LONG}, loop':>14}")
    for length in (2.0, 4.0, 8.0):
        for name in ("plain", "spread"):
            sampling.correction = spread if name == "spread" else lambda given: torch.eye(len(given))[:, given]
            cells = []
            for frames, loop in ((LONG, False), (16, True), (LONG, True)):
                video = sampling.sample_video(partial(denoise, length=length), first, frames, loop=loop,
                                              generator=torch.Generator().manual_seed(2))
                seen = torch.cat([video, video], 1) if loop else video
                cells.append(f"{seam(seen, 1):.2f} / {seam(seen, 2):.2f}")
            print(f"{length:>5.0f} frames {name:>8} " + " ".join(f"{cell:>14}" for cell in cells))
    sampling.correction = spread


if __name__ == "__main__":
    main()
