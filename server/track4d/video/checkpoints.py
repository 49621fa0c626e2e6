"""The published weights, as users download them: found, checked tensor by tensor, and kept as safetensors.

Four parts make the published multi-view video model: MVDream's 2-D U-Net with its VAE and text encoder, Animate3D's motion
modules, IP-Adapter, and the image encoder that belongs to it. Nothing is downloaded here. Pickles are opened for their
tensors only, never for code.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from track4d_protocol.errors import InputError
from track4d_protocol.keys import default_home

from .unet import MultiViewUNet, UNetConfig

if TYPE_CHECKING:
    from .multiview_video import MultiViewVideo

logger = logging.getLogger(__name__)
FORMAT = 1  # of the converted folder
STEP_BYTES = 2_100_000_000  # of tensors that a step on 4 x 16 frames makes in float32, by `track4d doctor --plan`


@dataclass(frozen=True)
class Repository:
    """One download.

    Attributes:
        name: owner/name on the Hugging Face hub.
        needs: files that must be there; "|" between names of which one is enough.
        licence: as its model card says.
        note: what else a user should know about the licence.
    """

    name: str
    needs: tuple[str, ...]
    licence: str
    note: str = ""

    @property
    def command(self) -> str:
        files = "" if self.name != IP_ADAPTER else ' --include README.md "models/ip-adapter_sd15.bin" "models/image_encoder/*"'
        return f"hf download {self.name}{files}"


BASE, ANIMATE3D, IP_ADAPTER = "yanqinJiang/mvdream-sd1.5-diffusers", "yanqinJiang/animate3d", "h94/IP-Adapter"
PUBLISHED = (
    Repository(BASE, ("unet/diffusion_pytorch_model.safetensors|unet/diffusion_pytorch_model.bin", "unet/config.json",
                      "vae/config.json", "text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"),
               "apache-2.0", "made from Stable Diffusion 1.5, whose CreativeML Open RAIL-M licence restricts some uses"),
    Repository(ANIMATE3D, ("animate3d_motion_modules.safetensors|animate3d_motion_modules.ckpt",), "apache-2.0",
               "trained on MV-Video, whose objects are in part CC BY-NC"),
    Repository(IP_ADAPTER, ("models/ip-adapter_sd15.safetensors|models/ip-adapter_sd15.bin", "models/image_encoder/config.json"),
               "apache-2.0"),
)


def find_published(folder: Path | None = None) -> dict[str, Path]:
    """Where the downloads are.

    Args:
        folder: holds one folder per repository, named like it (with its owner's folder or without), or is a hub cache;
            None looks into the machine's hub cache.

    Returns:
        Folder by repository name.

    Raises:
        InputError: a file is absent; says which, and the command that downloads it.
    """
    found, absent = {}, []
    for repository in PUBLISHED:
        places = list(_places(repository.name, folder))
        lacking = [[need for need in repository.needs if _file(place, need) is None] for place in places]
        complete = [place for place, needs in zip(places, lacking) if not needs]
        if complete:
            found[repository.name] = complete[0]
        else:
            absent.append((repository, min(lacking, key=len) if lacking else list(repository.needs)))
    if absent:
        what = "; ".join(f"{repository.name} ({', '.join(needs)})" for repository, needs in absent).replace("|", " or ")
        raise InputError("checkpoint_missing", f"These published weights are not in {folder or 'the hub cache'}: {what}.",
                         "Download them: " + "; ".join(repository.command for repository, _ in absent) + ".")
    return found


def _places(name: str, folder: Path | None) -> Iterator[Path]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if folder is not None:
        yield from (place for place in (folder / name.split("/")[1], folder / name) if place.is_dir())
    try:
        yield Path(snapshot_download(name, cache_dir=folder, local_files_only=True))
    except (LocalEntryNotFoundError, OSError):  # OSError: the folder is none or can't be read
        return


def _file(folder: Path, need: str) -> Path | None:
    return next((folder / name for name in need.split("|") if (folder / name).is_file()), None)


def _weights(found: Mapping[str, Path], repository: Repository) -> Path:
    """The file of a download that `needs` names first."""
    file = _file(found[repository.name], repository.needs[0])
    assert file is not None, "find_published has seen it"
    return file


def licences(found: Mapping[str, Path]) -> list[str]:
    """A line per download: its licence by its own model card, or as it was when this was written."""
    lines = []
    for repository in PUBLISHED:
        card = found[repository.name] / "README.md"
        content = card.read_text(errors="replace") if card.is_file() else ""
        stated = re.search(r"\A---\n.*?^license:\s*(\S+)", content, re.M | re.S)
        licence = stated[1] if stated else f"{repository.licence} (its card is not among the files)"
        lines.append(f"{repository.name}: {licence}" + (f"; {repository.note}" if repository.note else ""))
    return lines


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle, by name.

    Names of nested dictionaries are joined by dots, a wrapping "state_dict" and a "module." before every name (left by
    distributed training) fall away, and what isn't a tensor is left out.

    Raises:
        InputError: the file is absent, damaged, holds code, or holds no tensors.
    """
    path = Path(path)
    action = "Download it again; it should be a state dict of tensors."
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except FileNotFoundError:
        raise InputError("checkpoint_missing", f"The file '{path}' isn't there.", "Check its name and folder.") from None
    except pickle.UnpicklingError as error:
        raise InputError("checkpoint_unsafe", f"'{path}' is no plain state dict: it is damaged, or asks for code to be run.",
                         "It was not opened. " + action) from error
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise InputError("checkpoint_damaged", f"'{path}' can't be read: {_first_line(error)}.", action) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = dict(_flat(content))
    if not tensors:
        raise InputError("checkpoint_no_tensors", f"'{path}' holds no tensors by name, but a {type(content).__name__}.", action)
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"  # torch maps only its newer files into memory


def _flat(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(content, Tensor):
        yield prefix, content


def check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, torch.Size], source: Path) -> None:
    """Refuses a set of tensors that isn't exactly the expected one.

    Raises:
        InputError: names the file, how many tensors are wrong, and one or two of them.
    """
    again = "Check that it is the right file and that its download is complete."
    shared = found.keys() & expected.keys()
    if not shared:
        raise InputError("checkpoint_wrong_file", f"'{source}' is another model's: none of its {len(found)} tensors belongs here "
                         f"(the first is {next(iter(found), 'absent')}).", again)
    lacking = [name for name in expected if name not in found]
    if lacking:
        raise InputError("checkpoint_incomplete", f"'{source}' lacks {len(lacking)} of {len(expected)} tensors, such as "
                         f"{_examples(lacking)}.", again)
    surplus = [name for name in found if name not in expected]
    if surplus:
        raise InputError("checkpoint_surplus", f"'{source}' has {len(surplus)} tensors that don't belong here, such as "
                         f"{_examples(surplus)}.", again)
    wrong = [name for name in expected if found[name].shape != expected[name]]
    if wrong:
        name = wrong[0]
        raise InputError("checkpoint_widths", f"'{source}' has {len(wrong)} tensors of another size: {name} is "
                         f"{list(found[name].shape)}, not {list(expected[name])}.",
                         "It belongs to a model of another size. " + again)


def _examples(names: list[str]) -> str:
    return " and ".join(names[:2])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def unet_config(base: Mapping[str, Any], adapter: Mapping[str, Tensor]) -> UNetConfig:
    """Sizes of the network by the base model's unet/config.json and the IP-Adapter's tensors.

    Raises:
        InputError: the base isn't of Stable Diffusion 1.5's kind, or the adapter isn't IP-Adapter's plain one.
    """
    published = UNetConfig.published()
    channels = tuple(base.get("block_out_channels", published.channels))
    text = base.get("cross_attention_dim", published.text_dim)
    kinds = base.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    heads = base.get("attention_head_dim", published.heads)
    projection = adapter.get("image_proj.proj.weight")
    if len(kinds) != len(channels) or not isinstance(heads, int) or not isinstance(text, int):
        raise InputError("checkpoint_wrong_file", f"The base model has {len(channels)} levels of kinds {kinds}, "
                         f"{heads} heads and text of width {text}.", f"Use {BASE}.")
    if projection is None or projection.ndim != 2 or projection.shape[0] % text:
        shape = "no projection" if projection is None else f"a projection of {list(projection.shape)}"
        raise InputError("checkpoint_wrong_file", f"The IP-Adapter has {shape} and doesn't fit text of width {text}.",
                         "Use ip-adapter_sd15.bin, not its plus, full-face or SDXL variants.")
    return UNetConfig(channels=channels, attention=tuple(kind.startswith("CrossAttn") for kind in kinds),
                      spatial_motion=(True,) * len(channels), layers=base.get("layers_per_block", published.layers), heads=heads,
                      groups=base.get("norm_num_groups", published.groups), text_dim=text, image_dim=projection.shape[1],
                      image_tokens=projection.shape[0] // text)


@lru_cache(maxsize=2)
def expected_tensors(config: UNetConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a U-Net; takes no memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in MultiViewUNet(config).state_dict().items()}


def is_motion(name: str) -> bool:
    """Whether a tensor comes with Animate3D's file: motion modules and MV2V adapters, 888 of 1614 in the published size."""
    return ".motion_modules." in name or "_i2v." in name


def is_adapter(name: str) -> bool:
    """Whether a tensor comes with the IP-Adapter."""
    return "_ip." in name or name.startswith("encoder_hid_proj.")


def adapter_names(names: Mapping[str, Any]) -> dict[str, str]:
    """IP-Adapter's own name of each of the network's adapter tensors.

    It numbers the cross-attentions 1, 3, 5, ... in the order of the down blocks, the up blocks and the middle block.
    """
    def order(name: str) -> tuple[int, list[int]]:
        return ("down", "up_b", "mid_").index(name[:4]), [int(number) for number in re.findall(r"\d+", name)]

    places = sorted({name.split(".to_")[0] for name in names if "_ip." in name}, key=order)
    renamed = {f"{place}.to_{kind}_ip.0.weight": f"ip_adapter.{2 * k + 1}.to_{kind}_ip.weight"
               for k, place in enumerate(places) for kind in "kv"}
    head = "encoder_hid_proj.image_projection_layers.0."
    for name in names:
        if name.startswith(head):
            renamed[name] = "image_proj." + name.removeprefix(head).replace("image_embeds.", "proj.")
    return renamed


def assemble_unet(found: Mapping[str, Path]) -> tuple[UNetConfig, dict[str, Tensor]]:
    """The whole U-Net's tensors out of the three downloads.

    Args:
        found: of `find_published`.

    Raises:
        InputError: a file is damaged, partial, of another model or of another size.
    """
    base_file, motion_file, adapter_file = (_weights(found, repository) for repository in PUBLISHED)
    adapter = read_tensors(adapter_file)
    config = unet_config(read_json(found[BASE] / "unet" / "config.json"), adapter)
    expected = expected_tensors(config)
    names = adapter_names(expected)

    check_tensors(adapter, {names[name]: shape for name, shape in expected.items() if is_adapter(name)}, adapter_file)
    base = read_tensors(base_file)
    still = {name: shape for name, shape in expected.items() if not is_motion(name) and not is_adapter(name)}
    check_tensors(base, still, base_file)
    motion = read_tensors(motion_file)
    whole = any(name in expected and not is_motion(name) for name in motion)  # training saves all 1614 tensors
    check_tensors(motion, {name: shape for name, shape in expected.items() if whole or is_motion(name)}, motion_file)
    return config, {**base, **{own: adapter[other] for own, other in names.items()}, **motion}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: it is damaged, or no object.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no object")
        return content
    except (OSError, ValueError) as error:
        raise InputError("checkpoint_damaged", f"'{path}' can't be read: {error}.", "Download it again.") from error


def convert_published(folder: Path | None, out: Path) -> Path:
    """Brings the published weights into one folder of safetensors, once.

    Args:
        folder: as `find_published`.
        out: the converted folder, left alone if it is there and made from the same files, or if `folder` is None and the
            downloads have gone.

    Returns:
        `out`.

    Raises:
        InputError: as `find_published` and `assemble_unet`, or an encoder is damaged.
    """
    try:
        found = find_published(folder)
    except InputError:
        if folder is None and is_converted(out):
            return out
        raise
    files = sorted(file for place in found.values() for file in place.rglob("*")
                   if file.suffix in (".json", ".bin", ".ckpt", ".safetensors"))
    stamp = {str(file): [file.stat().st_size, int(file.stat().st_mtime)] for file in files}
    if is_converted(out) and read_json(out / "model.json").get("sources") == stamp:
        return out
    config, tensors = assemble_unet(found)
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / "unet.safetensors")
    for name, model in _encoders(found[BASE], found[IP_ADAPTER] / "models" / "image_encoder"):
        model.save_pretrained(part / name)
    stated = licences(found)
    content = {"format": FORMAT, "unet": config.to_dict(), "licences": stated, "sources": stamp}
    (part / "model.json").write_text(json.dumps(content, indent=1))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    for line in stated:
        logger.info("licence of %s", line)
    return out


def _encoders(base: Path, image_encoder: Path) -> Iterator[tuple[str, Any]]:
    """VAE, text encoder, tokenizer and image encoder; each complete, whatever kind of file it is in."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    for name, kind, place in (("vae", AutoencoderKL, base / "vae"), ("text_encoder", CLIPTextModel, base / "text_encoder"),
                              ("image_encoder", CLIPVisionModelWithProjection, image_encoder)):
        yield name, _complete(kind, place)
    try:
        yield "tokenizer", CLIPTokenizer.from_pretrained(base / "tokenizer")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError("checkpoint_damaged", f"The tokenizer '{base / 'tokenizer'}' can't be read: {error}.",
                         "Download it again.") from error


def _complete(kind: Any, place: Path) -> Any:
    """A pretrained model of diffusers or transformers, refused if a tensor is absent or of another size."""
    again = "Check that its download is complete."
    try:
        safe = any(place.glob("*.safetensors"))
        model, report = kind.from_pretrained(place, output_loading_info=True, local_files_only=True, use_safetensors=safe)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise InputError("checkpoint_damaged", f"'{place}' can't be read: {_first_line(error)}.", again) from error
    wrong = sorted(report["missing_keys"]) + [str(key) for key in report["mismatched_keys"]]
    if wrong:
        raise InputError("checkpoint_incomplete", f"{len(wrong)} tensors of '{place}' are absent or of another size, such as "
                         f"{_examples(wrong)}.", again)
    return model


def is_converted(folder: Path) -> bool:
    """Whether a folder is one that `convert_published` made."""
    return (folder / "model.json").is_file() and (folder / "unet.safetensors").is_file()


def load_published(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> MultiViewVideo:
    """The published model, from the folder that `convert_published` made.

    Args:
        dtype: of the U-Net and of the text and image encoders; the VAE stays float32.

    Raises:
        InputError: the folder is another one, or damaged.
    """
    from .multiview_video import Encoders, MultiViewVideo

    if not is_converted(folder):
        raise InputError("checkpoint_missing", f"'{folder}' holds no converted weights.", "Convert the downloaded ones first.")
    content = read_json(folder / "model.json")
    if content.get("format") != FORMAT:
        raise InputError("checkpoint_format", f"'{folder}' was converted by another version of Track4D.",
                         "Remove it and convert the downloaded weights again.")
    unet = load_unet(UNetConfig.from_dict(content["unet"]), folder / "unet.safetensors").to(device, dtype)
    encoders = Encoders(**dict(_encoders(folder, folder / "image_encoder")))
    return MultiViewVideo(unet, encoders.to(device, dtype))


def open_published(weights: Path | None = None) -> tuple[MultiViewVideo, list[str]]:
    """The published model, in half precision where there is a GPU, and a line per licence; the first use converts its weights.

    Args:
        weights: as `find_published`, or a folder that `convert_published` made; None takes what was converted before, or
            looks into the machine's hub cache.

    Raises:
        InputError: the weights are absent, damaged or of another model, or take more memory than is free.
    """
    folder = weights if weights and is_converted(weights) else default_home() / "models" / "published"
    if folder != weights:
        convert_published(weights, folder)
    graphics = torch.cuda.is_available()
    check_memory(folder, graphics)
    model = load_published(folder, "cuda" if graphics else "cpu", torch.float16 if graphics else torch.float32)
    return model, read_json(folder / "model.json")["licences"]


def check_memory(folder: Path, graphics: bool) -> None:
    """Raises:
        InputError: too_little_memory, for converted weights and a step of their network.
    """
    needed = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) + STEP_BYTES
    free, place = psutil.virtual_memory().available, "memory"
    if graphics:
        needed, free, place = needed // 2, torch.cuda.mem_get_info()[0], "memory on the GPU"
    if needed > free:
        raise InputError("too_little_memory", f"The published weights need about {needed / 1e9:.1f} GB; {free / 1e9:.1f} GB of "
                         f"{place} are free.", "Close other programs, or use the model that ships.")


def load_unet(config: UNetConfig, path: Path) -> MultiViewUNet:
    """A U-Net with the tensors of a file, as they are, without being initialised first.

    Raises:
        InputError: the file is damaged, or its tensors don't fit `config`.
    """
    tensors = read_tensors(path)
    with torch.device("meta"):
        unet = MultiViewUNet(config)
    check_tensors(tensors, {name: tensor.shape for name, tensor in unet.state_dict().items()}, path)
    unet.load_state_dict(tensors, assign=True)
    return unet.requires_grad_(False).eval()
