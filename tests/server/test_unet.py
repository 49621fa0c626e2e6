"""The multi-view video U-Net against the published implementation, and what holds for every size."""

import gzip
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from track4d.video import attention
from track4d.video.unet import MultiViewUNet, UNetConfig, camera_condition
from track4d_protocol.errors import InputError
from track4d_protocol.space import orbit_viewmats

VIEWS = 3


@pytest.fixture(scope="module")
def tiny(shared):
    """The network of the fixture and its inputs."""
    folder = shared / "fixtures" / "mvvdm_tiny"
    config = replace(UNetConfig.published(), channels=(16, 24, 32, 32), motion_heads=2, groups=8, text_dim=24, image_dim=20)
    network = MultiViewUNet(config).eval()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / "weights.safetensors").items()})
    for motion in network.up_blocks[0].motion_modules:  # 32 groups in every size there, whatever the other norms have
        motion.norm.num_groups = 32
    data = load_file(folder / "inputs.safetensors")
    by_view = {name: tensor.unflatten(0, (-1, VIEWS)) for name, tensor in data.items()}
    inputs = {"sample": by_view["sample"].transpose(2, 3), "timesteps": by_view["timestep"][:, 0],
              "text": by_view["encoder_hidden_states"], "cameras": by_view["camera"], "image": by_view["image_embeds"]}
    return network, inputs, load_file(folder / "output.safetensors")


def small_inputs(config, batch=1, views=2, frames=3, height=16, width=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {"sample": torch.randn(batch, views, frames, config.in_channels, height, width, generator=draw),
            "timesteps": torch.randint(0, 1000, (batch,), generator=draw),
            "text": torch.randint(0, config.vocabulary, (batch, 5), generator=draw),
            "cameras": torch.randn(batch, views, 16, generator=draw)}


@pytest.fixture(scope="module")
def small():
    """A small network in which nothing is silent: random where training starts from zero."""
    torch.manual_seed(0)
    network = MultiViewUNet(UNetConfig.small()).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return network


def test_equals_the_published_implementation(tiny):
    network, inputs, expected = tiny
    stored = {name.removeprefix("feat."): value for name, value in expected.items() if name.startswith("feat.")}
    wanted = [name for name in stored if name in network.feature_names()]
    assert {"up_blocks.1", "up_blocks.1.motion_modules.2"} <= set(wanted) and len(wanted) == 7
    assert network.config.temporal_feature in wanted
    with torch.no_grad():
        sample, features = network(**inputs, features=wanted)
    assert (sample.transpose(2, 3).flatten(0, 1) - expected["sample"]).abs().max() < 1e-4
    for name in wanted:  # values up to 180 in float32: relative to the largest
        difference = (features[name].flatten(0, 2) - stored[name]).abs().max()
        assert difference / stored[name].abs().max() < 1e-5, name


def test_each_frame_may_have_its_own_noise_level(tiny):
    network, inputs, expected = tiny
    timesteps = inputs["timesteps"][:, None].repeat(1, 5)
    timesteps[:, 0] = 0
    with torch.no_grad():
        sample = network(**inputs | {"timesteps": timesteps}).sample
    assert (sample.transpose(2, 3).flatten(0, 1) - expected["sample_i2v_cond_time_zero"]).abs().max() < 1e-4


def test_attention_of_the_first_block_equals_the_published_one(tiny):
    network, inputs, expected = tiny
    places = {"d0a0.attn1": "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
              "d0a0.attn2": "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
              "d0m0.attn1": "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1"}
    seen = {}
    handles = [network.get_submodule(place).register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
               for name, place in places.items()]
    with torch.no_grad():
        network(**inputs)
    for handle in handles:
        handle.remove()
    seen["d0m0.attn1"] = seen["d0m0.attn1"].unflatten(0, (-1, 5)).transpose(1, 2).flatten(0, 1)  # stored as [B * V * L, F, C]
    for name, value in seen.items():
        assert (value - expected[f"feat.{name}"]).abs().max() < 1e-4, name


def test_names_and_shapes_of_the_published_checkpoints(shared):
    with torch.device("meta"):
        network = MultiViewUNet(UNetConfig.published())
    expected = json.loads(gzip.decompress((shared / "fixtures" / "mvvdm_full_keys.json.gz").read_bytes()))
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == expected
    assert len(expected) == 1614
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_526_201_582
    trained = [p.numel() for name, p in network.named_parameters() if "i2v." in name or "motion_modules." in name]
    assert (len(trained), sum(trained)) == (846, 642_699_562)  # what Animate3D trains


def test_cameras_are_told_as_the_published_network_expects(tiny):
    viewmats = torch.from_numpy(orbit_viewmats([0, 120, 240], elevation=15, distance=3))
    torch.testing.assert_close(camera_condition(viewmats), tiny[1]["cameras"][0], atol=1e-6, rtol=0)


def test_a_batch_equals_its_members_one_by_one(tiny, small):
    cropped = tiny[1] | {"sample": tiny[1]["sample"][..., :8, :8]}
    for network, inputs in ((tiny[0], cropped), (small, small_inputs(small.config, batch=2))):
        name = network.config.temporal_feature
        with torch.no_grad():
            both = network(**inputs, features=[name])
            for b in range(2):
                alone = network(**{key: value[b : b + 1] for key, value in inputs.items()}, features=[name])
                torch.testing.assert_close(alone.sample, both.sample[b : b + 1], atol=2e-5, rtol=1e-5)
                torch.testing.assert_close(alone.features[name], both.features[name][b : b + 1], atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("views, frames, height, width", [(1, 4, 16, 16), (9, 2, 16, 16), (2, 1, 16, 16), (2, 32, 16, 16),
                                                          (2, 3, 16, 24), (2, 3, 10, 18)])
def test_any_number_of_views_and_frames_and_any_resolution(small, views, frames, height, width):
    """One view, nine views, one frame, pictures that aren't square, and sizes that don't halve evenly are all served."""
    inputs = small_inputs(small.config, 1, views, frames, height, width)
    with torch.no_grad():
        sample = small(**inputs).sample
        turned = small(**inputs | {name: inputs[name].flip(1) for name in ("sample", "cameras")}).sample
    assert sample.shape == inputs["sample"].shape and sample.isfinite().all()
    torch.testing.assert_close(turned.flip(1), sample, atol=2e-5, rtol=1e-4)  # no view is special


def test_every_conditioning_matters(tiny, small):
    """Text, image, cameras, time and the first frame reach every frame of every view."""
    cropped = tiny[1] | {"sample": tiny[1]["sample"][:, :, :3, :, :8, :8]}
    for network, inputs in ((tiny[0], cropped), (small, small_inputs(small.config, batch=2))):
        with torch.no_grad():
            before = network(**inputs).sample
            for name in inputs.keys() - {"sample"}:
                after = network(**inputs | {name: inputs[name].flip(0)}).sample
                assert (after - before).abs().amax((3, 4, 5)).min() > 1e-5, name
            sample = inputs["sample"].clone()
            sample[0, 0, 0] += 1
            change = (network(**inputs | {"sample": sample}).sample - before).abs().amax((3, 4, 5))  # [B, V, F]
        assert change[0].min() > 1e-5 and change[1].max() == 0


def test_features_come_by_name_with_gradients(small):
    config = small.config
    inputs = small_inputs(config, height=64, width=64, frames=2)
    sample, features = small(**inputs, features=small.feature_names())
    assert set(features) == set(small.feature_names()) and sample.shape == inputs["sample"].shape
    assert features[config.spatial_feature].shape == features[config.temporal_feature].shape == (1, 2, 2, 64, 8, 8)
    assert features["up_blocks.1"].shape == (1, 2, 2, 64, 16, 16)
    features[config.temporal_feature].square().mean().backward()
    motion = small.up_blocks[1].motion_modules[config.layers]
    assert motion.proj_in.weight.grad.abs().max() > 0 and small.conv_out.weight.grad is None
    small.zero_grad()


def test_checkpointing_changes_memory_and_nothing_else(small):
    inputs = small_inputs(small.config)
    gradients = []
    for small.gradient_checkpointing in (False, True):
        with FlopCounterMode(display=False) as counter:
            sample, features = small(**inputs, features=["up_blocks.1"])
            forward = counter.get_total_flops()
            (sample.square().mean() + features["up_blocks.1"].square().mean()).backward()
        gradients.append({name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None})
        work = counter.get_total_flops() / forward
        small.zero_grad()
    small.gradient_checkpointing = False
    assert gradients[0].keys() == gradients[1].keys() and work > 3.5  # forward, forward again, backward
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("chunk, grid", [(1 << 30, 3), (600, 65535), (100, 65535), (1, 1)])
def test_attention_in_slices_is_the_same(monkeypatch, chunk, grid):
    torch.manual_seed(0)
    query, key, value = torch.randn(7, 11, 8), torch.randn(7, 13, 8), torch.randn(7, 13, 8)
    q, k, v = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in (query, key, value))
    expected = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    monkeypatch.setattr(attention, "CHUNK", chunk)
    monkeypatch.setattr(attention, "GRID_LIMIT", grid)
    torch.testing.assert_close(attention.attend(query, key, value, 2), expected, atol=1e-6, rtol=1e-5)


def test_a_fresh_adapter_and_motion_module_change_nothing():
    """Training starts from the pictures' network: the adapter's and the motion modules' outputs are zero."""
    network = MultiViewUNet(UNetConfig.small()).eval()
    inputs = small_inputs(network.config)
    inputs["sample"][:, :, 2] = inputs["sample"][:, :, 1]
    changed = inputs["sample"].clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        before, after = network(**inputs).sample, network(**inputs | {"sample": changed}).sample
    torch.testing.assert_close(before[:, :, 1], before[:, :, 2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(before[:, :, 1:], after[:, :, 1:], atol=1e-5, rtol=1e-4)
    block = network.mid_block.attentions[0].transformer_blocks[0].attn1
    assert torch.equal(block.processor.to_q_i2v.weight, block.to_q.weight)


def test_configuration_survives_json():
    for config in (UNetConfig.small(), UNetConfig.published()):
        assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("shape, code, number", [
    ((1, 2, 65, 4, 16, 16), "too_many_frames", "65"),
    ((1, 2, 2, 4, 16, 15), "bad_video_size", "15 x 16"),
    ((1, 2, 32, 4, 1 << 20, 1 << 20), "out_of_memory", "1048576"),  # half a petabyte: no machine has the addresses
])
def test_what_cannot_be_computed_is_said(small, shape, code, number):
    inputs = small_inputs(small.config, views=shape[1])
    with torch.no_grad(), pytest.raises(InputError) as caught:
        small(**inputs | {"sample": torch.zeros(()).expand(shape)})
    assert caught.value.code == code and number in caught.value.message and caught.value.action


def test_other_failures_keep_their_own_words(small):
    inputs = small_inputs(small.config)
    with torch.no_grad(), pytest.raises(RuntimeError) as caught:
        small(**inputs | {"cameras": torch.zeros(1, 2, 15)})
    assert not isinstance(caught.value, InputError)
