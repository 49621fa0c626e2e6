"""Every default in one place: what the words "fast" and "default" mean."""

from __future__ import annotations

from dataclasses import dataclass

from .motion.fit import DEFAULT, FAST, FitPreset

FITTED_FRAMES = 16  # Track4DGen, section 6: videos have 16 frames; other numbers of frames are sampled from the fitted motion


@dataclass(frozen=True)
class Preset:
    """What one quality setting spends.

    Attributes:
        sampling_steps: denoising steps of the generator.
        fit: settings of the registration.
        gaussians: how many Gaussians cover the surface.
        appearance_steps: Adam steps for their colour, scale and opacity.
    """

    sampling_steps: int
    fit: FitPreset
    gaussians: int
    appearance_steps: int


# The names that `track4d_protocol.messages.PRESETS` lets in.
PRESETS = {
    "fast": Preset(sampling_steps=8, fit=FAST, gaussians=5_000, appearance_steps=40),
    "default": Preset(sampling_steps=25, fit=DEFAULT, gaussians=10_000, appearance_steps=80),
}
