"""The tiny work with a film of it, which becomes preview and contact sheet. The report tells what arrived."""

import numpy as np
import tiny_work
from track4d_protocol.messages import Request, Result


def run(request: Request, report, checkpoint=None) -> Result:
    """The wave of `tiny_work`; each view of its film is a grey ramp over time."""
    result = tiny_work.run(request, report)
    arrays, frames = request.arrays, request.settings.frames
    ramp = np.linspace(0, 255, frames).astype(np.uint8)[None, :, None, None, None]
    result.arrays["video"] = np.broadcast_to(ramp, (len(arrays["viewmats"]), frames, 48, 48, 3)).copy()
    result.arrays |= gaussians(result.arrays["vertices"])
    result.report["arrived"] = {name: list(array.shape) for name, array in arrays.items()}
    result.report["asked"] = request.settings.to_dict()
    if "pin" in arrays:
        result.report["pinned"] = int((arrays["pin"] > 0).sum())
    if "video" in arrays:
        result.report["first_pixels"] = arrays["video"][:, :, 0, 0].tolist()  # [V, F, C]
        result.report["viewmats"] = arrays["viewmats"].tolist()
    return result


def gaussians(vertices: np.ndarray) -> dict[str, np.ndarray]:
    """One Gaussian on each of the first vertices, [F, N, 3]."""
    frames, count = len(vertices), min(50, vertices.shape[1])
    return {
        "gaussian_means": vertices[:, :count],
        "gaussian_quats": np.tile(np.float32([1, 0, 0, 0]), (frames, count, 1)),
        "gaussian_scales": np.full((count, 3), 0.5, np.float32),
        "gaussian_opacities": np.full(count, 0.75, np.float32),
        "gaussian_colors": np.full((count, 3), 0.25, np.float32),
    }
