"""`track4d doctor --plan`: predictions against the operations counted and the memory taken by real runs."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from track4d.plan import live_bytes, plan
from track4d.video.features import FEATURE_UNET
from track4d.video.unet import MultiViewUNet, UNetConfig
from typer.testing import CliRunner

SMALL = UNetConfig.small()


def counted(network, device, views, frames, size):
    """Operations of two videos at once, attention as the matrix products that torch's own counter knows."""
    config = network.config
    text = (torch.zeros(2, config.text_tokens, dtype=torch.long, device=device) if config.vocabulary
            else torch.zeros(2, config.text_tokens, config.text_dim, device=device))
    image = torch.zeros(2, views, config.image_dim, device=device) if config.image_dim else None
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(torch.zeros(2, views, frames, 4, size, size, device=device), torch.zeros(2, device=device), text,
                torch.zeros(2, views, 16, device=device), image)
    return counter.get_total_flops()


def test_operations_are_those_of_a_real_run():
    network = MultiViewUNet(SMALL)
    for views, frames, size in ((4, 2, 32), (2, 3, 64)):
        predicted = plan(SMALL, views, frames, size, size, batch=2).flops
        assert predicted == pytest.approx(counted(network, "cpu", views, frames, size), rel=0.01)


def test_a_short_run_scaled_is_within_a_tenth():
    """Twice as many frames are twice the work, but for the attention over time."""
    measured = counted(MultiViewUNet(SMALL), "cpu", 4, 2, 64)
    assert plan(SMALL, 4, 16, 64, 64, batch=2).flops == pytest.approx(8 * measured, rel=0.1)


def test_operations_of_the_published_size():
    with torch.device("meta"):
        network = MultiViewUNet(UNetConfig.published())
    cost = plan(UNetConfig.published(), 4, 16, 32, 32, batch=2)
    assert cost.flops == pytest.approx(counted(network, "meta", 4, 16, 32), rel=0.01)
    assert cost.parameters == 1_526_201_582 and cost.weights == sum(4 * t.numel() for t in network.state_dict().values())
    assert cost.flops == pytest.approx(51.6e12, rel=0.01)


MEMORY = """
import sys, torch
from track4d.plan import measure
from track4d.video.features import FEATURE_UNET
from track4d.video.unet import MultiViewUNet, UNetConfig

def resident(field):
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Vm"))
    return int(lines[field].split()[0]) * 1024

torch.set_num_threads(1)
network = MultiViewUNet(UNetConfig.small() if sys.argv[2] == "small" else FEATURE_UNET)
measure(network, 1, 1, 64, 64, 1)  # loads what the first run loads
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
measure(network, 4, int(sys.argv[1]), 64, 64, 2)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark of /proc")
@pytest.mark.parametrize("name, config", [("small", SMALL), ("shipped", FEATURE_UNET)])
def test_peak_memory_is_that_of_a_real_run(name, config):
    """An allocator that gives freed blocks back at once shows what the tensors themselves take."""
    run = subprocess.run([sys.executable, "-c", MEMORY, "8", name], capture_output=True, text=True, check=True,
                         env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"})
    measured = int(run.stdout)
    cost = plan(config, 4, 8, 64, 64, batch=2)
    assert cost.peak - cost.weights == pytest.approx(measured, rel=0.1)
    longer = plan(config, 4, 16, 64, 64, batch=2)
    assert longer.peak - longer.weights == pytest.approx(2 * measured, rel=0.1)


def test_live_bytes_are_counted_until_they_are_freed():
    with live_bytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)  # the same storage
        c = a + 1
        assert live.now == 8000
        del a, c
        assert live.now == 4000
        del b
        assert live.now == 0 and live.peak == 8000


def test_plan_allocates_nothing():
    """A video that hardly any machine could hold is planned all the same."""
    assert plan(SMALL, 4, 32, 512, 512).peak > 20e9


def test_command_prints_both_sizes():
    from track4d.cli import app

    result = CliRunner().invoke(app, ["doctor", "--plan", "--views", "2", "--frames", "4"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "1,526,201,582" in result.output and "2 x 4 x 256 px" in result.output and "2 x 4 x 64 px" in result.output
    assert f"{2 * plan(FEATURE_UNET, 2, 4, 64, 64).flops / 1e12:.3f}" in result.output


@pytest.mark.parametrize("arguments, code", [(["--frames", "65"], "too_many_frames"),
                                             (["--resolution", "100"], "bad_resolution")])
def test_command_says_what_cannot_be(arguments, code):
    from track4d.cli import app

    result = CliRunner().invoke(app, ["doctor", "--plan", *arguments])
    assert getattr(result.exception, "code", None) == code
