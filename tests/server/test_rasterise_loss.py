"""The fused picture loss against the same sum in plain torch."""

import pytest
import torch
from track4d.gaussians.rasterise import picture_loss

WEIGHTS = [{}, {"squared": 0.2}, {"absolute": 0.0, "squared": 100.0, "mask_absolute": 0.0, "mask_squared": 100.0},
           {"absolute": 0.3, "squared": 0.7, "mask_absolute": 2.0, "mask_squared": 0.1}]


def defined(rgb, alpha, wanted_rgb, wanted_alpha, absolute=1.0, squared=0.0, mask_absolute=1.0, mask_squared=0.0):
    off, off_mask = rgb - wanted_rgb, alpha - wanted_alpha
    return (absolute * off.abs().mean() + squared * off.square().mean() + mask_absolute * off_mask.abs().mean()
            + mask_squared * off_mask.square().mean())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 3, 33, 33), (1, 1, 1, 1), (5, 3)], ids=str)
def test_value_and_gradient_are_torchs(shape, weights):
    generator = torch.Generator().manual_seed(3)
    values = [torch.rand(*shape, *tail, generator=generator) for tail in ((3,), (), (3,), ())]
    values[2][0], values[3][0] = values[0][0], values[1][0]  # where nothing is off, the gradient of |d| is 0
    found, true = [], []
    for loss, dtype, results in ((picture_loss, torch.float32, found), (defined, torch.float64, true)):
        rgb, alpha, wanted_rgb, wanted_alpha = (x.to(dtype, copy=True) for x in values)
        rgb.requires_grad_(), alpha.requires_grad_()
        value = loss(rgb, alpha, wanted_rgb, wanted_alpha, **weights)
        (3 * value).backward()
        results += [value.detach(), rgb.grad, alpha.grad]
    for a, b in zip(found, true):
        assert a.dtype == torch.float32 and (a - b).norm() <= 1e-6 * b.norm()


def test_views_and_slices_are_read_where_they_lie():
    rgba = torch.rand(2, 3, 20, 20, 4)
    wanted = torch.rand(2, 3, 20, 20, 4)
    rgba.requires_grad_()
    picture_loss(rgba[..., :3], rgba[..., 3], wanted[..., :3], wanted[..., 3]).backward()
    expected, = torch.autograd.grad(defined(rgba[..., :3], rgba[..., 3], wanted[..., :3], wanted[..., 3]), rgba)
    assert torch.allclose(rgba.grad, expected, atol=1e-9)


def test_the_graph_can_be_walked_twice():
    rgb, alpha = torch.rand(1, 1, 8, 8, 3, requires_grad=True), torch.rand(1, 1, 8, 8)
    loss = picture_loss(rgb, alpha, torch.zeros(1, 1, 8, 8, 3), torch.zeros(1, 1, 8, 8))
    loss.backward(retain_graph=True)
    once = rgb.grad.clone()
    loss.backward()
    assert torch.equal(rgb.grad, 2 * once)
