"""CoTracker3 on whole videos and on streams: resizing, grids, support points, backward tracking, the user's checkpoint file.

Positions are in pixels with centres at integers throughout this module, as the network has them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from track4d_protocol.errors import InputError

from .cotracker import STRIDE, CoTracker3, Estimate, to_cells

log = logging.getLogger(__name__)

SUPPORT_GRID = 6
ITERATIONS = 6
NOTICE = "CoTracker3's published weights are under CC BY-NC 4.0: not for commercial use."


def grid_points(count: int, height: int, width: int) -> Tensor:
    """A regular grid of count x count positions (x, y), a 64th of the width away from the border; [count^2, 2], row by row."""
    if count == 1:
        return torch.tensor([[width / 2, height / 2]])
    margin = width / 64
    x, y = (torch.linspace(margin, side - margin, count) for side in (width, height))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def points_on_mask(points: Tensor, mask: Tensor) -> Tensor:
    """Those of `points` [N, 2] that lie on `mask` [H, W]."""
    x, y = points.long().unbind(-1)
    return points[mask[y.clamp(0, mask.shape[0] - 1), x.clamp(0, mask.shape[1] - 1)] > 0]


class OnlineTracker:
    """Follows points while frames arrive, in windows that overlap by half (CoTracker, section 3.4).

    A window begins where the one before it left off: its first half starts from the known positions, its second half from the
    last of them. Every frame is encoded once, and only one window of features is kept.

    Args:
        queries: [B, N, 3] frame (of the whole stream) and position in pixels of the encoded pictures.
    """

    def __init__(self, model: CoTracker3, queries: Tensor, iterations: int = ITERATIONS) -> None:
        self.model, self.queries, self.iterations = model, to_cells(queries), iterations
        self.start = 0  # of the window that is being filled
        self.pyramid: list[Tensor] | None = None  # features from frame `start` on
        self.templates: list[Tensor] | None = None
        batch, points = queries.shape[:2]
        self.known = Estimate(queries.new_zeros(batch, 0, points, 2), *queries.new_zeros(2, batch, 0, points).unbind())

    def add(self, pyramid: list[Tensor]) -> Estimate:
        """Takes the features of new frames, from `CoTracker3.encode`; returns what is known of all frames up to now."""
        known = self.pyramid
        self.pyramid = pyramid if known is None else [torch.cat(pair, 1) for pair in zip(known, pyramid)]
        window = self.model.window
        while self.pyramid[0].shape[1] >= window:
            self._track([level[:, :window] for level in self.pyramid])
            self.start += window // 2
            self.pyramid = [level[:, window // 2:] for level in self.pyramid]
        return self.known

    def finish(self) -> Estimate:
        """Tracks the frames that don't fill a window, the last one repeated; returns all frames."""
        if self.pyramid is None:
            return self.known
        left = self.pyramid[0].shape[1]
        if self.start + left > self.known.coords.shape[1]:
            missing = self.model.window - left
            self._track([torch.cat([level, level[:, -1:].expand(-1, missing, -1, -1, -1)], 1) for level in self.pyramid])
            self.known = Estimate(*(part[:, :self.start + left] for part in self.known))
        return self.known

    def _track(self, pyramid: list[Tensor]) -> None:
        window, frame = self.model.window, self.queries[..., 0]  # [B, N]
        here = (frame >= self.known.coords.shape[1]) & (frame < self.start + window)  # first seen in this window
        local = torch.cat([(frame - self.start).clamp(0, window - 1)[..., None], self.queries[..., 1:]], -1)
        found = self.model.templates(pyramid, local)
        before = self.templates or [torch.zeros_like(level) for level in found]
        self.templates = [torch.where(here[..., None, None], new, old) for new, old in zip(found, before)]
        coords = self.queries[:, None, :, 1:].expand(-1, window, -1, -1)
        zeros = torch.zeros_like(coords[..., 0])
        first = Estimate(coords, zeros, zeros)
        if self.start:
            tails = [part[:, self.start:] for part in self.known]
            tails = [torch.cat([tail, tail[:, -1:].expand(-1, window - tail.shape[1], *[-1] * (tail.ndim - 2))], 1)
                     for tail in tails]
            old = (frame < self.known.coords.shape[1])[:, None]  # [B, 1, N]
            first = Estimate(torch.where(old[..., None], tails[0], coords),
                             torch.where(old, tails[1], zeros), torch.where(old, tails[2], zeros))
        result = self.model.refine(pyramid, self.templates, first, self.iterations)
        self.known = Estimate(*(torch.cat([part[:, :self.start], new], 1) for part, new in zip(self.known, result)))


def resize(video: Tensor, resolution: tuple[int, int]) -> Tensor:
    """Video [B, T, 3, H, W] in 0..255 to float [B, T, 3, *resolution]."""
    frames = [F.interpolate(view.float(), resolution, mode="bilinear", align_corners=True) for view in video]
    return torch.stack(frames)


@torch.inference_mode()
def predict(model: CoTracker3, video: Tensor, queries: Tensor | None = None, *, grid: int = 0, grid_frame: int = 0,
            mask: Tensor | None = None, support: int = SUPPORT_GRID, backward: bool = False,
            iterations: int = ITERATIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Tracks points through videos of any size, all views of the batch at once.

    Args:
        video: [B, T, 3, H, W] in 0..255.
        queries: [B, N, 3] frame and pixel position (x, y); None for a grid.
        grid: points along each side of a regular grid on frame `grid_frame`.
        mask: [B, H, W]; grid points outside of it are left out. Every view must keep equally many.
        support: points along each side of a grid on frame 0 that is tracked beside queries or masked points to help them, and
            left out of the result; 0 for none.
        backward: tracks from each query to earlier frames in a second pass. Without it the frames before a query hold what the
            pass through the whole clip says of them (offline), or the query itself (online).

    Returns:
        tracks [B, T, N, 2] in pixels, visibility and confidence [B, T, N] in 0..1; exact, visible and certain at the query.

    Raises:
        InputError: the views of a masked grid keep different numbers of points, or none.
    """
    batch, frames, _, height, width = video.shape
    rows, columns = model.resolution
    scale = video.new_tensor([(columns - 1) / max(width - 1, 1), (rows - 1) / max(height - 1, 1)], dtype=torch.float32)
    whole_grid = queries is None and mask is None  # needs no support
    if queries is None:
        points = [grid_points(grid, rows, columns).to(video.device)] * batch
        if mask is not None:
            small = F.interpolate(mask[:, None].float(), model.resolution)[:, 0]
            points = [points_on_mask(some, on) for some, on in zip(points, small)]
            kept = sorted(len(some) for some in points)
            if kept[0] != kept[-1] or not kept[0]:
                raise InputError("uneven_grid", f"The masks of the views keep {kept} grid points.",
                                 "Track views with different masks one by one, and give a mask that covers grid points.")
        at = torch.stack(points)  # [B, N, 2]
        queries = torch.cat([torch.full_like(at[..., :1], grid_frame), at], -1)
    else:
        queries = torch.cat([queries[..., :1], queries[..., 1:] * scale], -1)
    count = queries.shape[1]
    if support and not whole_grid:
        extra = F.pad(grid_points(support, rows, columns).to(video.device), (1, 0)).expand(batch, -1, -1)  # frame 0
        queries = torch.cat([queries, extra], 1)

    pyramid = model.encode(resize(video, model.resolution))
    found = _follow(model, pyramid, queries, iterations)
    if backward:
        turned = torch.cat([frames - 1 - queries[..., :1], queries[..., 1:]], -1)
        other = _follow(model, [level.flip(1) for level in pyramid], turned, iterations)  # pictures are encoded one by one
        early = torch.arange(frames, device=video.device)[:, None] < queries[:, None, :, 0]  # [B, T, N]
        found = Estimate(*(torch.where(early.view(*early.shape, *[1] * (there.ndim - 3)), back.flip(1), there)
                           for there, back in zip(found, other)))
    frame = queries[:, None, :count, 0].long()
    tracks, vis, conf = found.coords[:, :, :count] * STRIDE, found.vis[:, :, :count].sigmoid(), found.conf[:, :, :count].sigmoid()
    tracks.scatter_(1, frame[..., None].expand(-1, -1, -1, 2), queries[:, None, :count, 1:])
    return tracks / scale, vis.scatter(1, frame, 1.0), conf.scatter(1, frame, 1.0)


def _follow(model: CoTracker3, pyramid: list[Tensor], queries: Tensor, iterations: int) -> Estimate:
    if not model.online:
        return model.locate(pyramid, to_cells(queries), iterations)
    tracker = OnlineTracker(model, queries, iterations)
    tracker.add(pyramid)
    return tracker.finish()


def load_cotracker(path: Path | str, device: str | torch.device = "cpu") -> CoTracker3:
    """Reads a published CoTracker3 checkpoint; a window of 16 frames says that it is an online one.

    Args:
        path: .pth (a state dict, or one under "model") or .safetensors.

    Raises:
        InputError: no such file, damaged, no state dict, another model's, tensors missing, or sizes that don't fit each other.
    """
    from ..video.checkpoints import check_tensors, read_tensors

    path = Path(path)
    state = read_tensors(path)
    if all(name.startswith("model.") for name in state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    shapes = {name: tensor.shape for name, tensor in state.items()}

    def size(name: str, axis: int, default: int) -> int:
        return shapes[name][axis] if len(shapes.get(name, ())) > axis else default

    depth = sum(name.startswith("updateformer.time_blocks.") and name.endswith(".attn.to_q.bias") for name in shapes)
    with torch.device("meta"):  # no memory before the file is known to fit
        model = CoTracker3(
            latent=size("fnet.conv3.weight", 0, 128), hidden=size("updateformer.input_transform.weight", 0, 384),
            virtual_tracks=size("updateformer.virual_tracks", 1, 64), depth=depth or 3,
            corr_hidden=size("corr_mlp.fc1.weight", 0, 384), corr_out=size("corr_mlp.fc2.weight", 0, 256),
            window=size("time_emb", 1, 60))
    check_tensors(state, {name: tensor.shape for name, tensor in model.state_dict().items()}, path)
    model.load_state_dict(state, assign=True)
    log.info("%s: %s", path.name, NOTICE)
    return model.requires_grad_(False).eval().to(device, torch.float32)

