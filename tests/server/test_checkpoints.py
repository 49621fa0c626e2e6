"""The published weights: found where users put them, refused with a reason, converted without a change."""

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from track4d.video.checkpoints import (
    adapter_names,
    assemble_unet,
    check_tensors,
    convert_published,
    expected_tensors,
    find_published,
    is_adapter,
    is_motion,
    licences,
    load_published,
    read_tensors,
)
from track4d.video.unet import UNetConfig
from track4d_protocol.errors import InputError

CKPT = "animate3d/animate3d_motion_modules.ckpt"
ADAPTER = "IP-Adapter/models/ip-adapter_sd15.bin"
BASE = "mvdream-sd1.5-diffusers/unet/diffusion_pytorch_model.bin"


@pytest.fixture(scope="module")
def published_keys(shared: Path) -> dict[str, torch.Size]:
    keys = json.loads(gzip.decompress((shared / "fixtures" / "mvvdm_full_keys.json.gz").read_bytes()))
    return {name: torch.Size(shape) for name, shape in keys.items()}


def test_the_parts_of_the_published_model_are_told_apart(published_keys: dict[str, torch.Size]) -> None:
    expected = expected_tensors(UNetConfig.published())
    assert expected == published_keys and len(expected) == 1614
    assert sum(map(is_motion, expected)) == 888 and sum(map(is_adapter, expected)) == 36
    assert not any(is_motion(name) and is_adapter(name) for name in expected)


def test_cross_attentions_are_numbered_as_in_ip_adapter(shared: Path, published_keys: dict[str, torch.Size]) -> None:
    names = adapter_names(published_keys)
    assert len(names) == 36
    for number, place in json.loads((shared / "fixtures" / "mvvdm_tiny" / "config.json").read_text())["ip_key_order"]:
        assert names[f"{place}.to_k_ip.0.weight"] == f"ip_adapter.{number}.to_k_ip.weight"
        assert names[f"{place}.to_v_ip.0.weight"] == f"ip_adapter.{number}.to_v_ip.weight"
    assert names["encoder_hid_proj.image_projection_layers.0.image_embeds.bias"] == "image_proj.proj.bias"


def test_the_downloads_become_one_unet(published: Path) -> None:
    config, tensors = assemble_unet(find_published(published))
    assert config.channels == (16, 24, 32, 32) and config.attention == (True, True, True, False)
    assert (config.heads, config.text_dim, config.image_dim, config.image_tokens) == (4, 24, 20, 4)
    motion = torch.load(published / CKPT, weights_only=True)["state_dict"]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in motion.items())
    assert len(tensors) == 1614
    adapter = torch.load(published / ADAPTER, weights_only=True)
    mid = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_v_ip.0.weight"
    assert torch.equal(tensors[mid], adapter["ip_adapter"]["31.to_v_ip.weight"])


def test_folders_of_owners_and_the_hub_cache_are_found_too(published: Path, tmp_path: Path) -> None:
    for name in ("yanqinJiang/mvdream-sd1.5-diffusers", "yanqinJiang/animate3d", "h94/IP-Adapter"):
        place = tmp_path / "owners" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(published / name.split("/")[1])
        cached = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text("a" * 40)
        (cached / "snapshots").mkdir()
        (cached / "snapshots" / ("a" * 40)).symlink_to(published / name.split("/")[1])
    for folder in ("owners", "cache"):
        assert len(find_published(tmp_path / folder)) == 3
        assert len(assemble_unet(find_published(tmp_path / folder))[1]) == 1614


def test_what_is_absent_is_named_with_the_command_that_brings_it(published_copy: Callable[[], Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="hf download yanqinJiang/animate3d;") as all_absent:
        find_published(tmp_path)
    assert all_absent.value.code == "checkpoint_missing" and "h94/IP-Adapter" in str(all_absent.value)
    folder = published_copy()
    (folder / ADAPTER).unlink()
    with pytest.raises(InputError) as one_absent:
        find_published(folder)
    assert "ip-adapter_sd15.bin" in str(one_absent.value) and "image_encoder/config" not in one_absent.value.message
    assert "animate3d" not in one_absent.value.message


def resave(path: Path, change: Callable[[dict], object]) -> None:
    """Saves a file again with its tensors changed in place, or with what `change` returns instead of them."""
    content = torch.load(path, weights_only=True)
    other = change(content.get("state_dict", content))
    torch.save(content if other is None else other, path)


def drop(tensors: dict, every: int) -> None:
    for name in list(tensors)[::every]:
        del tensors[name]


def put(**changes: object) -> Callable[[dict], None]:
    return lambda tensors: tensors.update({name.replace("__", "."): value for name, value in changes.items()})


SPOILS: dict[str, tuple[str, Callable[[dict], object], str]] = {
    "one tensor less": (CKPT, lambda t: drop(t, len(t)), "checkpoint_incomplete"),
    "half of it": (CKPT, lambda t: drop(t, 2), "checkpoint_incomplete"),
    "one more": (CKPT, put(extra=torch.ones(1)), "checkpoint_surplus"),
    "another width": (CKPT, put(mid_block__motion_modules__0__norm__weight=torch.ones(3)), "checkpoint_widths"),
    "another model": (CKPT, lambda t: {"layers.0.weight": torch.ones(2)}, "checkpoint_wrong_file"),
    "no state dict": (CKPT, lambda t: [torch.ones(2)], "checkpoint_no_tensors"),
    "numbers": (CKPT, lambda t: {"epoch": 3}, "checkpoint_no_tensors"),
    "base of another width": (BASE, put(conv_in__weight=torch.ones(320, 4, 3, 3)), "checkpoint_widths"),
    "motion file as base": (BASE, lambda t: {"mid_block.motion_modules.0.norm.weight": torch.ones(16)}, "checkpoint_wrong_file"),
    "plus adapter": (ADAPTER, put(image_proj={"latents": torch.ones(1, 16, 24)}), "checkpoint_wrong_file"),
    "SDXL adapter": (ADAPTER, put(image_proj={"proj.weight": torch.ones(8192, 1280)}), "checkpoint_wrong_file"),
}


@pytest.mark.parametrize("what", SPOILS)
def test_a_wrong_file_is_refused_with_a_reason(published_copy: Callable[[], Path], tmp_path: Path, what: str) -> None:
    folder = published_copy()
    file, change, code = SPOILS[what]
    resave(folder / file, change)
    with pytest.raises(InputError) as refused:
        convert_published(folder, tmp_path / "out")
    assert refused.value.code == code and refused.value.action
    assert Path(file).name in str(refused.value) or code == "checkpoint_wrong_file"
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (print, ("code from a file was run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content, code", [
    (pickle.dumps(Evil()), "checkpoint_unsafe"),
    (b"", "checkpoint_damaged"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n", "checkpoint_unsafe"),
    (b"PK\x03\x04 but cut off", "checkpoint_damaged"),
])
def test_code_and_damaged_files_are_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, code: str) -> None:
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_tensors(path)
    assert refused.value.code == code and "file.ckpt" in str(refused.value)
    assert "code from a file" not in capsys.readouterr().out


def test_a_new_pickle_with_code_is_refused_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"a": torch.ones(1), "b": Evil()}, tmp_path / "file.ckpt")
    with pytest.raises(InputError) as refused:
        read_tensors(tmp_path / "file.ckpt")
    assert refused.value.code == "checkpoint_unsafe" and "code from a file" not in capsys.readouterr().out


def test_wrappers_and_prefixes_fall_away(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(2), "b.weight": torch.zeros(3)}
    for name, content in {"plain": tensors, "wrapped": {"state_dict": tensors, "epoch": 3},
                          "module": {"state_dict": {f"module.{key}": value for key, value in tensors.items()}}}.items():
        torch.save(content, tmp_path / name)
        assert read_tensors(tmp_path / name).keys() == tensors.keys()
    save_file(tensors, tmp_path / "plain.safetensors")
    assert read_tensors(tmp_path / "plain.safetensors").keys() == tensors.keys()
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "mixed")
    assert read_tensors(tmp_path / "mixed").keys() == {"module.a", "b"}
    torch.save(tensors, tmp_path / "old", _use_new_zipfile_serialization=False)
    assert read_tensors(tmp_path / "old").keys() == tensors.keys()


def test_a_whole_unet_with_prefixes_is_taken_as_training_saves_it(published_copy: Callable[[], Path]) -> None:
    folder = published_copy()
    _, tensors = assemble_unet(find_published(folder))
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in trained.items()}}, folder / CKPT)
    _, again = assemble_unet(find_published(folder))
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())


def test_conversion_happens_once_and_changes_nothing(published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "no cache"))
    out = tmp_path / "models" / "published"
    with caplog.at_level("INFO"):
        assert convert_published(published, out) == out
    assert caplog.text.count("licence of") == 3
    assert not [file for file in out.rglob("*") if file.suffix in (".bin", ".ckpt", ".pt")]
    config, tensors = assemble_unet(find_published(published))
    saved = load_file(out / "unet.safetensors")
    assert saved.keys() == tensors.keys() and all(torch.equal(saved[name], tensors[name]) for name in tensors)

    written = (out / "unet.safetensors").stat().st_mtime_ns
    convert_published(published, out)
    assert convert_published(None, out) == out  # the downloads may be thrown away
    assert (out / "unet.safetensors").stat().st_mtime_ns == written
    with pytest.raises(InputError):
        convert_published(tmp_path / "another place", out)
    (out / "unet.safetensors").write_bytes(b"damaged")
    with pytest.raises(InputError) as damaged:
        load_published(out)
    assert damaged.value.code == "checkpoint_damaged"


def test_new_downloads_are_converted_anew(published_copy: Callable[[], Path], tmp_path: Path) -> None:
    folder, out = published_copy(), tmp_path / "out"
    convert_published(folder, out)
    resave(folder / CKPT, lambda t: t.update({name: tensor + 1 for name, tensor in t.items()}))
    os.utime(folder / CKPT, (1, 1))
    convert_published(folder, out)
    name = "down_blocks.0.motion_modules.0.norm.weight"
    expected = torch.load(folder / CKPT, weights_only=True)["state_dict"][name]
    assert torch.equal(load_file(out / "unet.safetensors")[name], expected)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_an_encoder_without_all_its_tensors_is_refused(published_copy: Callable[[], Path], tmp_path: Path, part: str,
                                                       capsys: pytest.CaptureFixture) -> None:
    folder = published_copy()
    place = folder / "mvdream-sd1.5-diffusers" / part
    file = next(file for file in place.iterdir() if file.suffix in (".bin", ".safetensors"))
    tensors = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, {"format": "pt"}) if file.suffix == ".safetensors" else torch.save(tensors, file)
    with pytest.raises(InputError) as refused:
        convert_published(folder, tmp_path / "out")
    assert refused.value.code == "checkpoint_incomplete" and part in str(refused.value)
    for content in (b"nothing", pickle.dumps(Evil())):
        file.write_bytes(content)
        with pytest.raises(InputError) as refused:
            convert_published(folder, tmp_path / "out")
        assert refused.value.code == "checkpoint_damaged" and part in str(refused.value)
    assert "code from a file" not in capsys.readouterr().out


def test_licences_come_from_the_model_cards(published: Path) -> None:
    base, animate3d, adapter = licences(find_published(published))
    assert "apache-2.0;" in base and "Open RAIL-M" in base and "its card is not among" not in base
    assert "apache-2.0" in animate3d and "its card is not among" in animate3d and "h94/IP-Adapter" in adapter


def test_the_whole_published_set_passes_the_check_and_a_part_of_it_does_not(published_keys: dict[str, torch.Size]) -> None:
    with torch.device("meta"):
        motion = {name: torch.empty(shape) for name, shape in published_keys.items() if is_motion(name)}
    expected = {name: shape for name, shape in published_keys.items() if is_motion(name)}
    check_tensors(motion, expected, Path("animate3d_motion_modules.ckpt"))
    motion.pop("up_blocks.1.motion_modules.2.proj_out.bias")
    with pytest.raises(InputError, match="lacks 1 of 888 tensors, such as up_blocks.1.motion_modules.2.proj_out.bias"):
        check_tensors(motion, expected, Path("animate3d_motion_modules.ckpt"))
