"""The fast rasterisers against their definition in plain float64 torch."""

import gc
import platform
import re
import threading

import numba
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import float32, int64
from track4d.gaussians import rasterise as rasterise_module
from track4d.gaussians.rasterise import blending, projection, rasterise, rasterise_depth
from track4d.gaussians.rasterise.constants import ALPHA_MAX
from track4d.gaussians.rasterise.dense import rasterise_dense
from track4d.gaussians.rasterise.gsplat_backend import rasterise_gsplat
from track4d_protocol.errors import ServerError
from track4d_protocol.space import intrinsics, orbit_viewmats

LEARNT = ("means", "quats", "scales", "opacities", "colors")
BACKGROUND = torch.tensor([0.2, 0.5, 0.8])


def make_scene(frames=1, gaussians=200, views=1, size=40, seed=0, own_colors=None, own_scales=False):
    """Random Gaussians around the origin as `rasterise` takes them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    of_colors = {None: [], "frame": [frames], "view": [frames, views]}[own_colors]
    return {
        "means": 0.5 * normal(frames, gaussians, 3),
        "quats": normal(frames, gaussians, 4),
        "scales": 0.08 * torch.exp(0.5 * normal(*([frames] if own_scales else []), gaussians, 3)),
        "opacities": torch.sigmoid(1 + 1.5 * normal(gaussians)),
        "colors": torch.rand(*of_colors, gaussians, 3, generator=generator),
        "viewmats": torch.from_numpy(orbit_viewmats(azimuths=np.linspace(0, 300, views))),
        "Ks": torch.from_numpy(intrinsics(size, views)),
        "size": size,
        "background": BACKGROUND,
    }


def draw(scene, dtype=torch.float32, seed=7):
    """Image, alpha and the gradients of a random linear function of both."""
    values = {k: x.to(dtype) if torch.is_tensor(x) else x for k, x in scene.items()}
    for name in LEARNT:
        values[name] = values[name].detach().clone().requires_grad_()
    image, alpha = (rasterise if dtype == torch.float32 else rasterise_dense)(**values)
    generator = torch.Generator().manual_seed(seed)
    image_weights = torch.randn(image.shape, generator=generator)
    alpha_weights = torch.randn(alpha.shape, generator=generator)
    ((image * image_weights).sum() + (alpha * alpha_weights).sum()).backward()
    return image.detach(), alpha.detach(), {name: values[name].grad for name in LEARNT}


def assert_same_pictures(scene):
    """A contribution on the cut of alpha or on the stop may fall on either side: a pixel in 5,000 may be off."""
    image, alpha, gradients = draw(scene)
    true_image, true_alpha, true_gradients = draw(scene, torch.float64)
    assert image.dtype == torch.float32 and image.shape == true_image.shape and alpha.shape == true_alpha.shape
    error = torch.maximum((image - true_image).abs().amax(-1), (alpha - true_alpha).abs())  # [F, V, H, W]
    assert (error > 1e-5).sum() <= 1 + error.numel() // 5000 and error.max() < 2 / 255
    for name in LEARNT:
        error = (gradients[name] - true_gradients[name]).norm() / true_gradients[name].norm().clamp(min=1e-6)
        assert error < 1e-4, (name, float(error))
    return true_alpha


@pytest.mark.parametrize("options", [
    {"gaussians": 300, "size": 64},
    {"gaussians": 300, "size": 33, "seed": 1},
    {"gaussians": 500, "size": 100, "seed": 2},  # four tiles, three of them cut by the edge
    {"gaussians": 1, "size": 32, "seed": 1},
    {"gaussians": 17, "size": 16, "seed": 3},  # one more than a block of the projection
    {"frames": 3, "views": 2, "gaussians": 150, "size": 48, "seed": 4},
    {"frames": 2, "views": 3, "gaussians": 150, "size": 40, "seed": 5, "own_colors": "frame"},
    {"frames": 2, "views": 2, "gaussians": 100, "size": 40, "seed": 6, "own_colors": "view", "own_scales": True},
], ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items()))
def test_picture_and_gradients_are_those_of_the_definition(options):
    assert assert_same_pictures(make_scene(**options)).max() > 0.05


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), gaussians=st.integers(1, 120), size=st.integers(1, 80),
       distance=st.floats(0.3, 5), growth=st.floats(0.1, 4), stretch=st.floats(0.5, 2))
def test_any_scene_is_drawn_as_defined(seed, gaussians, size, distance, growth, stretch):
    """Also with cameras inside the cloud, big and tiny Gaussians, and pixels that aren't square.

    A pixel may differ by one contribution at the cut of alpha or at the stop, where the picture is discontinuous.
    """
    scene = make_scene(gaussians=gaussians, size=size, seed=seed)
    scene["viewmats"] = torch.from_numpy(orbit_viewmats([seed % 360], distance=distance))
    scene["scales"] = scene["scales"] * growth
    scene["Ks"][:, 1, 1] *= stretch
    scene["Ks"][:, 0, 2] += 0.1 * size
    values = {k: x.double() if torch.is_tensor(x) else x for k, x in scene.items()}
    image, alpha = rasterise(**scene)
    true_image, true_alpha = rasterise_dense(**values)
    assert (image - true_image).abs().max() < 2 / 255
    assert (alpha - true_alpha).abs().max() < 2 / 255
    assert (image - true_image).abs().mean() < 1e-4


def test_opaque_gaussians_in_front_hide_the_rest():
    """Many opaque layers: the limit at 0.99 and the stop at 1e-4 decide the picture."""
    scene = make_scene(gaussians=400, size=48, seed=8)
    scene["scales"], scene["opacities"] = scene["scales"] * 3, torch.full((400,), 0.999)
    assert assert_same_pictures(scene).max() > 0.999


def test_no_gaussian_is_more_opaque_than_the_limit_and_all_can_become_less():
    """Whatever clamp of alpha a backend has compiled in (0.99 or 0.999) is never reached."""
    scene = make_scene(gaussians=1, size=17)
    scene["means"][:], scene["scales"], scene["opacities"] = 0, torch.full((1, 3), 0.2), torch.tensor([1.0])
    image, alpha, gradients = draw(scene)
    limited = draw({**scene, "opacities": torch.tensor([ALPHA_MAX])})
    assert abs(float(alpha.max()) - ALPHA_MAX) < 1e-6
    assert torch.equal(image, limited[0]) and torch.equal(alpha, limited[1])
    assert gradients["opacities"].abs() > 1e-3
    assert torch.allclose(gradients["opacities"] * 1.0, limited[2]["opacities"], rtol=1e-5)


def test_depth_is_the_distance_of_the_surface_and_has_its_gradient():
    scene = make_scene(frames=2, views=3, gaussians=200, size=32, seed=14)
    del scene["colors"], scene["background"]
    scene["means"] = scene["means"].requires_grad_()
    depth, alpha = rasterise_depth(**scene)
    assert not depth[alpha == 0].any() and ((depth[alpha > 0] > 1) & (depth[alpha > 0] < 6)).all()
    (grown,) = torch.autograd.grad((depth * alpha.detach()).sum(), scene["means"])

    exact = {k: x.detach().double() if torch.is_tensor(x) else x for k, x in scene.items()}
    means = exact["means"].requires_grad_()
    depths = torch.einsum("vij,fnj->fvni", exact["viewmats"][:, :3, :3], means) + exact["viewmats"][:, None, :3, 3]
    weighted, true_alpha = rasterise_dense(**exact, colors=depths[..., 2:].expand(-1, -1, -1, 3), background=means.new_zeros(3))
    true_depth = torch.where(true_alpha > 0, weighted[..., 0] / true_alpha.clamp(min=1e-9), 0)
    (true,) = torch.autograd.grad((true_depth * true_alpha.detach()).sum(), means)
    assert ((depth - true_depth).abs() > 1e-4).sum() <= 2
    assert (grown - true).norm() < 1e-3 * true.norm()


def test_depth_of_one_opaque_wall():
    scene = make_scene(gaussians=1, size=9)
    scene["means"][:], scene["scales"], scene["opacities"] = 0, torch.full((1, 3), 3.0), torch.tensor([0.9])
    del scene["colors"], scene["background"]
    depth, _ = rasterise_depth(**scene)
    assert torch.allclose(depth, torch.full_like(depth, float(scene["viewmats"][0, 2, 3])), atol=1e-5)


def test_nothing_to_see_is_the_background_with_zero_gradients():
    scene = make_scene(frames=2, views=2, gaussians=20)
    scene["means"] = scene["means"] + torch.tensor([0, 0, 50.0])  # far above all pictures
    image, alpha, gradients = draw(scene)
    assert torch.equal(image, BACKGROUND.expand_as(image)) and not alpha.any()
    assert all(not gradient.any() for gradient in gradients.values())


def test_gaussians_behind_and_in_the_camera_are_not_drawn():
    scene = make_scene(gaussians=60, size=32, seed=9)
    camera = torch.linalg.inv(scene["viewmats"][0])
    scene["means"][0, :20] = 2 * camera[:3, 3] + 0.1 * scene["means"][0, :20]  # behind
    scene["means"][0, 20] = camera[:3, 3]  # exactly in it: depth 0
    _, _, gradients = draw(scene)
    assert_same_pictures(scene)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not gradients["means"][0, :21].any()


def test_invisible_opacities_are_not_drawn():
    scene = make_scene(gaussians=50)
    scene["opacities"][:25] = torch.tensor([0.0, 0.003]).repeat(13)[:25]
    _, _, gradients = draw(scene)
    assert_same_pictures(scene)
    assert not gradients["opacities"][:25].any()


def test_a_gaussian_larger_than_any_integer_still_covers_the_picture():
    scene = make_scene(gaussians=1, size=16)
    scene["means"][:], scene["scales"], scene["opacities"] = 0, torch.full((1, 3), 1e6), torch.tensor([0.9])
    _, alpha = rasterise(**scene)
    assert (alpha > 0.89).all()


def test_a_grey_background_and_other_dtypes_are_accepted():
    scene = make_scene(gaussians=30)
    grey, _ = rasterise(**{**scene, "background": 0.5})
    doubles = {k: x.double() if torch.is_tensor(x) else x for k, x in scene.items()}
    same, _ = rasterise(**{**doubles, "background": [0.5] * 3})
    assert grey.dtype == same.dtype == torch.float32 and torch.equal(grey, same)


def test_all_frames_and_views_are_one_call_of_each_kernel(monkeypatch):
    calls = []
    for module, name in ((blending, "draw"), (blending, "draw_backward"), (projection, "project_backward")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arrays, name=name, kernel=kernel: calls.append(name) or kernel(*arrays))
    draw(make_scene(frames=5, views=3, gaussians=20, size=16))
    assert calls == ["draw", "draw_backward", "project_backward"]


def test_samples_are_averaged_from_a_finer_picture():
    scene = make_scene(frames=2, views=2, size=21)
    fine = {k: x.double() if torch.is_tensor(x) else x for k, x in scene.items()}
    fine["Ks"], fine["size"] = fine["Ks"] * torch.tensor([3.0, 3, 1])[:, None], 63
    pictures = []
    for values, function, more in ((scene, rasterise, {"samples": 3}), (fine, rasterise_dense, {})):
        values = dict(values, means=values["means"].clone().requires_grad_(), colors=values["colors"].clone().requires_grad_())
        image, alpha = function(**values, **more)
        if not more:
            image, alpha = (x.unflatten(2, (21, 3)).unflatten(4, (21, 3)).mean((3, 5)) for x in (image, alpha))
        (image.square().sum() + alpha.square().sum()).backward()
        pictures.append((image.detach(), alpha.detach(), values["means"].grad, values["colors"].grad))
    for ours, theirs in zip(*pictures):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_two_forwards_before_their_backwards():
    """No call may overwrite what the backward of another one needs."""
    first, second = make_scene(seed=10), make_scene(seed=11, gaussians=300)
    apart = [draw(first)[2], draw(second)[2]]
    leaves, losses = [], []
    for scene in (first, second):
        leaf = {k: x.clone().requires_grad_() if k in LEARNT else x for k, x in scene.items()}
        image, alpha = rasterise(**leaf)
        generator = torch.Generator().manual_seed(7)
        losses.append((image * torch.randn(image.shape, generator=generator)).sum()
                      + (alpha * torch.randn(alpha.shape, generator=generator)).sum())
        leaves.append(leaf)
    for loss in reversed(losses):
        loss.backward()
    for leaf, gradients in zip(leaves, apart):
        for name in LEARNT:
            assert torch.equal(leaf[name].grad, gradients[name]), name


def test_two_threads_draw_at_once():
    scenes = [make_scene(seed=seed, gaussians=400, views=2, size=64) for seed in (12, 13)]
    expected = [draw(scene) for scene in scenes]
    results = [[], []]

    def work(k):
        results[k] = [draw(scenes[k]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (image, alpha, gradients), runs in zip(expected, results):
        assert len(runs) == 10
        for run_image, run_alpha, run_gradients in runs:
            assert torch.equal(run_image, image) and torch.equal(run_alpha, alpha)
            assert all(torch.equal(run_gradients[name], gradients[name]) for name in LEARNT)


def test_memory_does_not_grow():
    """Also not when the cycle collector never runs, and when a picture is drawn without a backward."""
    scene = make_scene(frames=2, views=4, gaussians=2000, size=64)
    scene["means"].requires_grad_()
    process = psutil.Process()
    used = []
    gc.collect()
    gc.disable()
    try:
        for round_ in range(60):
            image, _ = rasterise(**scene)  # 2 MB a call with its graph
            if round_ % 2:
                image.sum().backward()
            if round_ in (19, 59):
                used.append(process.memory_info().rss)
    finally:
        gc.enable()
    assert used[1] - used[0] < 20e6


SPLAT = numba.from_dtype(blending.SPLAT)
STRIPS = {
    "forward": (blending.blend_strip, (float32[::1], int64, int64, SPLAT, float32, float32)),
    "backward": (blending.blend_strip_backward, (float32[::1], int64, int64, SPLAT, float32, float32, float32[::1])),
    "covariances": (projection.covariances, (float32[::1],)),
    "covariances backward": (projection.covariances_backward, (float32[::1],)),
    "projection": (projection.project_block, (float32[::1], float32[:, ::1], float32[:, ::1], float32)),
    "projection backward": (projection.project_block_backward,
                            (float32[::1], float32[:, ::1], float32[:, ::1], float32)),
}


@pytest.mark.parametrize("name", STRIPS)
def test_inner_loops_are_vector_code(name):
    """Losing it costs a factor of eight and shows nowhere else: a signed index or a float64 constant is enough."""
    kernel, signature = STRIPS[name]
    fresh = numba.njit(fastmath=True, error_model="numpy")(kernel.py_func)  # from the cache there is no assembly
    fresh.compile(signature)
    assembly = fresh.inspect_asm(fresh.signatures[0])
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        packed = re.findall(r"\bv?(?:mul|fn?m(?:add|sub)\d+)ps\b.*%[xyz]mm", assembly)
        registers = re.findall(r"%[yz]mm", assembly)
        assert len(registers) >= 30, f"only {len(registers)} uses of 256 or 512 bit registers"
    elif machine in ("arm64", "aarch64"):
        packed = re.findall(r"\bfm(?:ul|la|ls)(?:\.4s|\s+v\d+\.4s)", assembly)
    else:
        pytest.skip(f"what vector code looks like on {machine} is not written down here")
    assert len(packed) >= 8, f"only {len(packed)} packed multiplications"


def test_a_gpu_without_cuda_is_refused_with_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    scene = make_scene(gaussians=3)
    with pytest.raises(ServerError) as refused:
        rasterise_gsplat(**scene)
    assert refused.value.code == "no_cuda" and refused.value.action


def test_the_best_device_is_one_that_can_draw(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rasterise_module.best_device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(rasterise_module, "find_spec", lambda name: None)
    assert rasterise_module.best_device() == "cpu", "a GPU without gsplat draws nothing"
    monkeypatch.setattr(rasterise_module, "find_spec", lambda name: name == "gsplat")
    assert rasterise_module.best_device() == "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"gaussians": 400, "size": 64}, {"frames": 2, "views": 3, "own_colors": "frame"},
                                     {"frames": 2, "views": 3, "own_colors": "view", "own_scales": True}])
def test_gsplat_draws_the_same(options):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU with CUDA")
    pytest.importorskip("gsplat")
    scene = make_scene(**options)
    scene["opacities"][::7] = 1.0  # its own clamp of alpha depends on its version
    image, alpha, gradients = draw(scene)
    gpu_scene = {k: x.cuda() if torch.is_tensor(x) else x for k, x in scene.items()}
    leaves = {k: x.detach().clone().requires_grad_() if k in LEARNT else x for k, x in gpu_scene.items()}
    gpu_image, gpu_alpha = rasterise(**leaves)
    generator = torch.Generator().manual_seed(7)
    loss = (gpu_image * torch.randn(image.shape, generator=generator).cuda()).sum()
    (loss + (gpu_alpha * torch.randn(alpha.shape, generator=generator).cuda()).sum()).backward()
    assert (gpu_image.cpu() - image).abs().mean() < 1e-4 and (gpu_image.cpu() - image).abs().max() < 2 / 255
    assert (gpu_alpha.cpu() - alpha).abs().max() < 2 / 255
    for name in LEARNT:
        error = (leaves[name].grad.cpu() - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-2, (name, float(error))
    shape = [{k: x for k, x in values.items() if k not in ("colors", "background")} for values in (scene, gpu_scene)]
    (depth, _), (gpu_depth, _) = (rasterise_depth(**values) for values in shape)
    assert (gpu_depth.cpu() - depth).abs().mean() < 1e-3
