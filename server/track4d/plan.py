"""What a step of the video diffusion costs before it is run: the real network on tensors without data, every operation seen.

Peak memory is the largest sum of tensors alive at one time. What an operation needs inside itself, and what an allocator
keeps for later, is not in it; nor are the encoders of text and pictures and the VAE of the published size, which run before
and after the U-Net.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table
from track4d_protocol.errors import InputError

if TYPE_CHECKING:
    from .video.unet import MultiViewUNet, UNetConfig

VAE_SCALE = 8  # pixels along the edge of a latent cell of the published size
GUIDED = 2  # classifier-free guidance denoises a video twice a step, with the prompt and then without it
GIGABYTE = 1e9


class Plan(NamedTuple):
    """Cost of one forward pass in float32; half precision takes half of the bytes.

    Attributes:
        parameters: count.
        flops: floating-point operations of convolutions, matrix products and attention; a multiply-add is two.
        weights: bytes.
        peak: bytes, weights included.
    """

    parameters: int
    flops: int
    weights: int
    peak: int


def plan(config: UNetConfig, views: int, frames: int, height: int, width: int, batch: int = 1) -> Plan:
    """Predicts the cost of one forward pass without gradients.

    Args:
        config: the network's sizes.
        views, frames: V, F.
        height, width: of what the network denoises: latent cells for the published size, pixels for the small one.
        batch: videos at once.

    Raises:
        InputError: more frames than the network takes, or a size that its patches don't fill.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from .video.unet import MultiViewUNet

    with FakeTensorMode():
        network = MultiViewUNet(config)
        flops, made = measure(network, views, frames, height, width, batch)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    return Plan(sum(parameter.numel() for parameter in network.parameters()), flops, weights, weights + made)


def measure(network: MultiViewUNet, views: int, frames: int, height: int, width: int, batch: int) -> tuple[int, int]:
    """Runs one forward pass on zeros; returns (operations, bytes at the peak of its inputs and of the tensors that it made)."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # torch counts the GPU's fused attention kernels, and not the CPU's
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=kernels) as counter, live_bytes() as live:
        config = network.config
        text = (torch.zeros(batch, config.text_tokens, dtype=torch.long) if config.vocabulary
                else torch.zeros(batch, config.text_tokens, config.text_dim))
        image = torch.zeros(batch, views, config.image_dim) if config.image_dim else None
        sample = torch.zeros(batch, views, frames, config.in_channels, height, width)
        timesteps, cameras = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, views, 16)
        network(sample, timesteps, text, cameras, image)
    return counter.get_total_flops(), live.peak


def show(views: int, frames: int, resolution: int | None, console: Console) -> None:
    """Prints what one guided step costs in both sizes; the resolution is in pixels, by default each size's own.

    Raises:
        InputError: too many frames, or a resolution that is no multiple of 8.
    """
    import psutil
    import torch

    from .video.features import FEATURE_UNET
    from .video.unet import UNetConfig

    if resolution and resolution % VAE_SCALE:
        raise InputError("bad_resolution", f"The resolution {resolution} is no multiple of {VAE_SCALE}.",
                         f"Use {max(1, round(resolution / VAE_SCALE)) * VAE_SCALE}.")
    table = Table("size", "video", "parameters", "TFLOP per step", "weights GB", "peak GB", "in half precision")
    for name, config, pixels, scale in (("published", UNetConfig.published(), resolution or 256, VAE_SCALE),
                                        ("shipped", FEATURE_UNET, resolution or 64, 1)):
        cost = plan(config, views, frames, pixels // scale, pixels // scale)
        table.add_row(name, f"{views} x {frames} x {pixels} px", f"{cost.parameters:,}", f"{GUIDED * cost.flops / 1e12:.3f}",
                      f"{cost.weights / GIGABYTE:.3f}", f"{cost.peak / GIGABYTE:.2f}", f"{cost.peak / 2 / GIGABYTE:.2f}")
    console.print(table)
    free, place = psutil.virtual_memory().available, "in this machine's memory"
    if torch.cuda.is_available():
        free, place = torch.cuda.mem_get_info()[0], f"on {torch.cuda.get_device_name()}"
    console.print(f"A step denoises the video {GUIDED} times, with the prompt and then without. "
                  f"{free / GIGABYTE:.1f} GB are free {place}.")


def live_bytes() -> Any:
    """A dispatch mode whose `peak` is the largest sum, in bytes, of the storages alive that were made inside it."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.known: set[int] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    storage = leaf.untyped_storage()
                    if storage._cdata not in self.known | old:
                        self.known.add(storage._cdata)
                        self.now += storage.nbytes()
                        weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
            self.peak = max(self.peak, self.now)
            return result

        def release(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    return LiveBytes()
