"""The tiny work with a film of it, which becomes preview and contact sheet. The report tells what arrived."""

import numpy as np
import tiny_work
from track4d_protocol.messages import Request, Result


def run(request: Request, report) -> Result:
    """The wave of `tiny_work`; each view of its film is a grey ramp over time."""
    result = tiny_work.run(request, report)
    arrays, frames = request.arrays, request.settings.frames
    ramp = np.linspace(0, 255, frames).astype(np.uint8)[None, :, None, None, None]
    result.arrays["video"] = np.broadcast_to(ramp, (len(arrays["viewmats"]), frames, 48, 48, 3)).copy()
    result.report["arrived"] = {name: list(array.shape) for name, array in arrays.items()}
    if "video" in arrays:
        result.report["first_pixels"] = arrays["video"][:, :, 0, 0].tolist()  # [V, F, C]
        result.report["viewmats"] = arrays["viewmats"].tolist()
    return result
