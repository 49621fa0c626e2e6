"""Every default in one place: what the words "fast", "default", "fine" and "paper" mean."""

from __future__ import annotations

from dataclasses import dataclass

from .motion.fit import DEFAULT, FAST, FitPreset
from .motion.reconstruct import PAPER, PaperPreset
from .motion.refine import RefinePreset

FITTED_FRAMES = 16  # Track4DGen, section 6: videos have 16 frames; other numbers of frames are sampled from the fitted motion


@dataclass(frozen=True)
class Preset:
    """What one quality setting spends.

    Attributes:
        fit: settings of the registration.
        gaussians: how many Gaussians cover the surface.
        appearance_steps: Adam steps for their colour, scale and opacity.
        refine: settings of the motion field that corrects the registration.
        sh_degree, sh_terms: of the 4D SH, which a user's own video may need.
        color_steps: Adam steps for them.
        paper: where given, the paper's own recipe finds the motion instead of registration and refinement.
    """

    fit: FitPreset
    gaussians: int
    appearance_steps: int
    refine: RefinePreset
    sh_degree: int = 0
    sh_terms: int = 6
    color_steps: int = 60
    paper: PaperPreset | None = None


# The names that `track4d_protocol.messages.PRESETS` lets in.
PRESETS = {
    "fast": Preset(fit=FAST, gaussians=5_000, appearance_steps=40, refine=RefinePreset(rounds=0),
                   sh_terms=1, color_steps=0),
    "default": Preset(fit=DEFAULT, gaussians=20_000, appearance_steps=80, refine=RefinePreset()),
    "fine": Preset(fit=DEFAULT, gaussians=20_000, appearance_steps=160,
                   refine=RefinePreset(rounds=6, steps=80), sh_degree=1, sh_terms=8, color_steps=200),
    "paper": Preset(fit=DEFAULT, gaussians=20_000, appearance_steps=80, refine=RefinePreset(rounds=0),
                    paper=PAPER),
}
