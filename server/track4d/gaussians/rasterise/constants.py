"""The numbers that define the picture; the same in every backend (Kerbl et al. 2023, gsplat)."""

NEAR = 0.01  # Gaussians whose centre is nearer to the camera's plane are not drawn
EPS2D = 0.3  # added to the diagonal of the screen covariance, in squared pixels: a low-pass filter of about one pixel
ALPHA_CUT = 1 / 255  # contributions below are dropped
# No contribution exceeds this: larger opacities count as this much (see `rasterise`). Kerbl et al. and gsplat from 1.6 on clamp
# alpha at 0.99, gsplat 1.5 at 0.999; with the opacity limited neither clamp is ever reached, and all draw the same picture.
ALPHA_MAX = 0.99
TRANSMITTANCE_STOP = 1e-4  # a Gaussian that would leave less light than this is not drawn, nor is any behind it
CLAMP_MARGIN = 0.3  # the Jacobian is taken within the picture widened by this share of its half width
