"""A real Blender window, driven by run.sh; see docs/blender.md."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.gui
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suite", ["trixie", "sid"])
def test_a_user_animates_and_cancels(suite, shared, tmp_path):
    setup = shared / "tools" / "blender_gui" / "setup_blender_gui.sh"
    if os.environ.get("TRACK4D_GUI") != "1":
        pytest.skip("needs root, a display, and 1.5 GB of Debian packages; set TRACK4D_GUI=1 to run it")
    if not setup.exists() or not shutil.which("chroot") or os.geteuid() != 0:
        pytest.skip("there is no script that sets up a Blender window, or no right to run it")
    environment = os.environ | {"SETUP": str(setup), "SHOTS": str(tmp_path), "WORK": "tiny_work:run", "WAIT": "120"}
    done = subprocess.run(
        [HERE / "run.sh", suite, "", "the monkey nods very slowly"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {"1_ready.png", "2_progress.png", "3_applied.png", "5_cancelled.png"} <= {p.name for p in tmp_path.iterdir()}
