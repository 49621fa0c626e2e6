"""The fit on a real animated asset."""

import sys
from pathlib import Path

import numpy as np
import pytest
from track4d.motion.fit import FAST, fit_motion

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


def test_flapping_gull_is_recovered(shared):
    pytest.importorskip("bpy", reason="real clips are played in Blender's Python")
    import recover

    truth = recover.load_truth("gull", shared / "assets")
    truth.vertices = truth.vertices[:4]
    video, viewmats, Ks = recover.film(truth, degraded=False)
    field = fit_motion(truth.mesh, video, viewmats, Ks, preset=FAST)
    figures = recover.measure(truth, field.vertices)
    assert figures["err"] < 0.15
    assert figures["w10"] < 0.1
    assert figures["psnr"] > 34
    assert np.isfinite(field.vertices).all()
