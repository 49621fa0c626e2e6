"""Training of the multi-view video U-Net with point-tracking priors (Track4DGen, section 3.2): `train`, for both sizes.

Through accelerate: the same code runs on a CPU, on a GPU, on many of them (`accelerate launch -m track4d train video ...`) and
on many machines that share the folder it writes to. A step's data and noise depend on (seed, step, process) alone, so a training
that was stopped and resumed ends with the same weights as one that was not; bit by bit on a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from track4d_protocol.errors import InputError

from ..progress import Report, silent
from ..video.features import save_small
from ..video.multiview_video import MultiViewVideo, on_background
from ..video.sampling import ALPHA_BARS, TRAINING_STEPS
from ..video.unet import MultiViewUNet, UNetConfig
from .probe import track_errors
from .video_data import Batch, ClipShape, Source, load_batches
from .video_losses import correspondence_loss, diffusion_loss, first_frame_scales, noise_frames, position_loss

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

TEXT_DROP = 0.1  # share of clips without their sentence, for classifier-free guidance; all else stays (Animate3D's train.py)
GRADIENT_NORM = 1.0  # clipped to it
KEPT = 1  # checkpoints


@dataclass(frozen=True)
class VideoTraining:
    """What determines the weights, together with data, number of processes and this package's version.

    The values are Track4DGen's (section 6) for the published size: 16 processes with one clip each, 20 epochs.

    Attributes:
        steps: optimiser steps in all, earlier ones of a resumed training included.
        batch: clips of each process at once.
        accumulation: such batches per optimiser step.
        shapes: views and frames of the clips; several are taken in turn, batch by batch.
        size: pixels along a side of the clips.
        seed: of the data and the noise, and of weights that begin at random.
        learning_rate: of AdamW, constant after `warm_up` steps.
        diffusion, correspondence, position: weights of the losses (lambda 1 to 3).
        first_frame: the largest noise scale of the first frame (Eq. 2), in standard deviations of the latents; the paper
            doesn't give it.
        step_power: training steps are drawn as u ** step_power with a uniform u; more than 1 prefers slight noise.
        average: decay of the exponential moving average of the weights, reached after a warm-up.
        checkpointing: recompute the network's layers in the backward pass, for less memory.
        precision: "no", "bf16" or "fp16", of the network's forward pass.
        save_every, sheet_every: optimiser steps between checkpoints and between sample sheets.
    """

    steps: int = 20_000
    batch: int = 1
    accumulation: int = 1
    shapes: tuple[tuple[int, int], ...] = ((4, 16),)
    size: int = 256
    seed: int = 0
    learning_rate: float = 1e-6
    warm_up: int = 500
    diffusion: float = 1.0
    correspondence: float = 0.1
    position: float = 10.0
    first_frame: float = 0.5
    step_power: float = 1.0
    average: float = 0.9999
    checkpointing: bool = True
    precision: str = "bf16"
    save_every: int = 500
    sheet_every: int = 500

    @classmethod
    def small(cls, **changes: Any) -> VideoTraining:
        """For the small network from scratch: faster, of few pictures a clip, and mostly at the slight noise it is used with."""
        values: dict[str, Any] = {
            "steps": 2000, "batch": 2, "shapes": ((2, 4), (1, 8), (4, 4), (2, 8), (1, 16)), "size": 64, "learning_rate": 1e-3,
            "warm_up": 20, "step_power": 2.0, "average": 0.99, "checkpointing": False, "precision": "no", "save_every": 50,
            "sheet_every": 250,
        }
        return cls(**(values | changes))


@dataclass
class Losses:
    """The three terms of L_1, not weighted, of one batch."""

    diffusion: Tensor
    correspondence: Tensor
    position: Tensor

    def total(self, settings: VideoTraining) -> Tensor:
        return (
            settings.diffusion * self.diffusion
            + settings.correspondence * self.correspondence
            + settings.position * self.position
        )


def trained_parameters(unet: MultiViewUNet) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name: of the published size the MV2V adapter and the motion modules; else all.

    The multi-view 3D attention, all else of the 2D network, text, cameras and IP-Adapter stay frozen (section 3.2).
    """
    everything = dict(unet.named_parameters())
    if unet.config.vocabulary:
        return everything
    return {name: value for name, value in everything.items() if "i2v." in name or "motion_modules." in name}


def video_losses(
    model: MultiViewVideo, unet: nn.Module, batch: Batch, settings: VideoTraining, generator: torch.Generator
) -> Losses:
    """Eqs. 1 to 5 on a batch.

    Args:
        unet: what is called for the prediction: `model.unet`, or the same wrapped for many processes.
        generator: on the CPU; draws steps, noise and dropped sentences.
    """
    batch_size, views, frames, _, height, width = batch.video.shape
    with torch.no_grad():
        latents = model.encode(batch.video.flatten(0, 2), generator).unflatten(0, (batch_size, views, frames))
        text, cameras, image = batch_conditions(model, batch, generator)
    times = torch.rand(batch_size, generator=generator) ** settings.step_power
    steps = (times * TRAINING_STEPS).long()
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    scales = first_frame_scales(steps / TRAINING_STEPS, settings.first_frame, generator)
    noisy = noise_frames(latents, noise, ALPHA_BARS[steps].to(latents), scales.to(latents))
    name = model.unet.config.temporal_feature
    answer = unet(noisy, steps.to(latents.device), text, cameras, image, features=(name,))
    positions = batch.tracks / batch.tracks.new_tensor([width, height])
    visible = batch.visibility & batch.mask[:, :, None]
    features = answer.features[name].float()
    return Losses(
        diffusion_loss(answer.sample, noise),
        correspondence_loss(features, positions, visible),
        position_loss(features, positions, visible),
    )


def batch_conditions(model: MultiViewVideo, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """Text [B, T, ...], cameras [B, V, 16] and image embeddings [B, V, E]; some sentences are dropped."""
    each = [model.conditions(*clip) for clip in zip(batch.captions, batch.viewmats, batch.video[:, :, 0])]
    dropped = (torch.rand(len(each), generator=generator) < TEXT_DROP).tolist()
    text = torch.stack([clip.no_text if drop else clip.text for clip, drop in zip(each, dropped)])
    images = [clip.image for clip in each if clip.image is not None]
    return text, torch.stack([clip.cameras for clip in each]), torch.stack(images) if images else None


def train(
    out: Path,
    model: MultiViewVideo,
    source: Source,
    settings: VideoTraining,
    validation: Source | None = None,
    resume: bool = False,
    workers: int = 1,
    report: Report = silent,
) -> Path:
    """Trains the U-Net of `model` in place.

    Args:
        out: folder for `checkpoint_N/`, `logs/` (TensorBoard), `sheets/` and the weights; one that all processes share.
        source: of the clips.
        validation: of clips for sample sheets and for the tracking error, which is logged with them; none leaves them out.
        resume: goes on from the last checkpoint in `out`, where there is one.
        workers: processes that make or read clips; 0 does it in this one.
        report: called once per step with stage "train"; may raise to stop, after which the training can be resumed.

    Returns:
        the path of the weights, an exponential moving average: all of the small network (`features.load_small`), or the
        tensors that Animate3D's file holds, which take its place (`checkpoints.find_published`).

    Raises:
        InputError: the clips don't fit the settings.
    """
    from accelerate import Accelerator
    from accelerate.utils import ProjectConfiguration
    from diffusers.training_utils import EMAModel

    check_settings(settings)
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulation,
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(out), logging_dir=str(out / "logs")),
    )
    accelerator.init_trackers("", config={name: str(value) for name, value in asdict(settings).items()})
    unet = model.unet.train()
    unet.gradient_checkpointing = settings.checkpointing
    parameters = trained_parameters(unet)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in parameters)
        parameter.data = parameter.data.float() if name in parameters else parameter.data
    optimizer = torch.optim.AdamW(parameters.values(), settings.learning_rate, weight_decay=0.01)
    wrapped, optimizer = accelerator.prepare(unet, optimizer)
    average = EMAModel(list(parameters.values()), settings.average)
    accelerator.register_for_checkpointing(average)
    step = load_newest(accelerator, out) if resume else 0
    average.to(accelerator.device)
    if model.encoders is not None:
        half = torch.float16 if accelerator.device.type == "cuda" else torch.float32
        model.encoders = model.encoders.to(accelerator.device, half)
    batches = iterate(source, settings, step, accelerator, workers)

    def keep() -> None:
        save_checkpoint(accelerator, out, step)
        if accelerator.is_main_process:
            save_weights(out, unet, average, parameters, asdict(settings) | {"step": step})

    begun, waited = time.process_time(), 0.0
    try:
        while step < settings.steps:
            try:
                report("train", step, settings.steps)
            except BaseException:
                keep()
                raise
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(1.0, (step + 1) / settings.warm_up)
            sums = torch.zeros(3)
            for part in range(settings.accumulation):
                start = time.perf_counter()
                batch = next(batches).to(accelerator.device)
                waited += time.perf_counter() - start
                generator = noise_generator(settings.seed, step * settings.accumulation + part, accelerator.process_index)
                with accelerator.accumulate(wrapped):
                    losses = video_losses(model, wrapped, batch, settings, generator)
                    accelerator.backward(losses.total(settings))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters.values(), GRADIENT_NORM)
                    optimizer.step()
                    optimizer.zero_grad()
                sums += torch.stack([losses.diffusion, losses.correspondence, losses.position]).detach().cpu()
            average.step(parameters.values())
            step += 1
            means = dict(zip(("loss/diffusion", "loss/correspondence", "loss/position"), (sums / settings.accumulation).tolist()))
            accelerator.log(means | {"cpu_seconds": time.process_time() - begun, "seconds_waiting_for_clips": waited}, step)
            if validation is not None and accelerator.is_main_process and step % settings.sheet_every == 0:
                with averaged(average, parameters):
                    write_sheet(accelerator, out, model, validation, settings, step)
            if step % settings.save_every == 0 or step == settings.steps:
                keep()
    finally:
        accelerator.end_training()
        accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        unet.requires_grad_(False).eval()
    average.copy_to(parameters.values())
    return weights_path(out, unet.config)


def check_settings(settings: VideoTraining) -> None:
    """
    Raises:
        InputError: bad_training.
    """
    for views, frames in settings.shapes:
        if views < 1 or frames < 2:
            raise InputError("bad_training", f"Clips of {views} views and {frames} frames can't be trained on.",
                             "Ask for at least one view and two frames.")


def iterate(source: Source, settings: VideoTraining, step: int, accelerator: Accelerator, workers: int) -> Iterator[Batch]:
    """The batches of this process from optimiser step `step` on."""
    shapes = [ClipShape(views, frames, settings.size) for views, frames in settings.shapes]
    first, last = step * settings.accumulation, settings.steps * settings.accumulation
    return iter(load_batches(source, shapes, settings.batch, settings.seed, first, last, workers=workers,
                             rank=accelerator.process_index, world=accelerator.num_processes))


def noise_generator(seed: int, part: int, process: int) -> torch.Generator:
    """The generator of one forward pass."""
    return torch.Generator().manual_seed(int(np.random.default_rng([seed, part, process]).integers(2**62)))


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """Step and folder of the complete checkpoints, oldest first."""
    return sorted((int(path.name.split("_")[1]), path) for path in out.glob("checkpoint_*") if path.name[11:].isdigit())


def load_newest(accelerator: Accelerator, out: Path) -> int:
    """Goes back to the newest checkpoint; its step, or 0 where there is none."""
    found = checkpoints(out)
    if not found:
        return 0
    step, path = found[-1]
    accelerator.load_state(str(path))
    return step


def save_checkpoint(accelerator: Accelerator, out: Path, step: int) -> None:
    """Writes weights, optimiser, scaler and average; under their name only when complete."""
    partial = out / f"checkpoint_{step}.partial"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        complete = partial.with_suffix("")
        shutil.rmtree(complete, ignore_errors=True)
        os.replace(partial, complete)
        for _, old in checkpoints(out)[:-KEPT]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


@contextmanager
def averaged(average: EMAModel, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """The averaged weights take the place of the trained ones for a while."""
    average.store(parameters.values())
    average.copy_to(parameters.values())
    yield
    average.restore(parameters.values())


def weights_path(out: Path, config: UNetConfig) -> Path:
    return out / ("features.safetensors" if config.vocabulary else "animate3d_motion_modules.safetensors")


def save_weights(out: Path, unet: MultiViewUNet, average: EMAModel, parameters: dict[str, nn.Parameter], trained: dict) -> None:
    """Writes the averaged weights and the settings they came from."""
    path = weights_path(out, unet.config)
    partial = path.with_name(path.name + ".partial")
    with averaged(average, parameters):
        if unet.config.vocabulary:
            save_small(partial, unet.state_dict(), unet.config, trained)
        else:
            kept = {name: value.detach().to("cpu", torch.float16).contiguous() for name, value in parameters.items()}
            save_file(kept, partial, {"trained": json.dumps(trained)})
    os.replace(partial, path)


@torch.no_grad()
def write_sheet(
    accelerator: Accelerator, out: Path, model: MultiViewVideo, validation: Source, settings: VideoTraining, step: int
) -> None:
    """Truth above sample for two views of a validation clip, and how well its points are tracked by features."""
    shape = ClipShape(2, 8, model.size)
    clip = validation(settings.seed, 0, shape)
    model.unet.eval()
    sample = model.generate(clip.video[:, 0], clip.viewmats, clip.caption, shape.frames, steps=10, guidance=1.0, seed=0)
    errors = track_errors(model, [validation(settings.seed, k, shape) for k in range(2)], [model.unet.config.temporal_feature])
    model.unet.train()
    rows = [np.concatenate(list(frames), 1) for v in range(shape.views) for frames in (clip.video[v], sample[v])]
    sheet = np.concatenate(rows).astype(np.float32) / 255
    picture = torch.from_numpy(sheet).permute(2, 0, 1)[None]
    picture[:, :3] *= picture[:, 3:]
    flat = (on_background(picture)[0].permute(1, 2, 0).numpy() * 255 + 0.5).astype(np.uint8)
    (out / "sheets").mkdir(exist_ok=True)
    cv2.imwrite(str(out / "sheets" / f"{step:06d}.png"), flat[..., ::-1])
    for tracker in accelerator.trackers:  # none where tensorboard is not installed: the sheet is on disk too
        tracker.log_images({"sample": flat[None]}, step, dataformats="NHWC")
    accelerator.log({f"validation/{name}": value for name, value in asdict(errors[0]).items() if name in ("error", "pck")}, step)
