"""The published weights' folders and files as users download them, with small random tensors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def write_tokenizer(folder: Path) -> None:
    """CLIP's byte-level vocabulary without any merge: every letter is a token."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + k) for k in range(256 - len(letters))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    start, end = "<|startoftext|>", "<|endoftext|>"
    special = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_published(folder: Path, seed: int = 0) -> Path:
    """Everything that the published model consists of, with narrow layers, in the published names and kinds of file."""
    from diffusers import AutoencoderKL
    from track4d.video.checkpoints import adapter_names, is_adapter, is_motion
    from track4d.video.unet import MultiViewUNet, UNetConfig
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    channels = (16, 24, 32, 32)
    unet = MultiViewUNet(UNetConfig(channels, (True, True, True, False), (True,) * 4, heads=4, groups=8, text_dim=24,
                                    image_dim=20))
    tensors = {name: tensor if name.endswith(".pe") else tensor + 0.05 * torch.randn(tensor.shape)
               for name, tensor in unet.state_dict().items()}  # nothing stays zero

    base = folder / "mvdream-sd1.5-diffusers"
    write_tokenizer(base / "tokenizer")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# MVDream\n")
    (base / "unet").mkdir()
    (base / "unet" / "config.json").write_text(json.dumps({
        "_class_name": "MVUNet2DConditionModel", "block_out_channels": channels, "attention_head_dim": 4, "layers_per_block": 2,
        "norm_num_groups": 8, "cross_attention_dim": 24, "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]}))
    torch.save({name: tensor for name, tensor in tensors.items() if not is_motion(name) and not is_adapter(name)},
               base / "unet" / "diffusion_pytorch_model.bin")
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                        block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4, sample_size=64)
    vae.save_pretrained(base / "vae", safe_serialization=False)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=514, hidden_size=24, intermediate_size=32, num_hidden_layers=1,
                                        num_attention_heads=2, bos_token_id=512, eos_token_id=513))
    text.config.save_pretrained(base / "text_encoder")
    older = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in text.state_dict().items()}
    torch.save(older | {"text_model.embeddings.position_ids": torch.arange(77)[None]},  # as transformers 4.25 wrote them
               base / "text_encoder" / "pytorch_model.bin")

    motion = folder / "animate3d"
    motion.mkdir()
    torch.save({"state_dict": {name: tensor for name, tensor in tensors.items() if is_motion(name)}},
               motion / "animate3d_motion_modules.ckpt")

    adapter = folder / "IP-Adapter" / "models"
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, other in adapter_names(tensors).items():
        part, rest = other.split(".", 1)
        parts[part][rest] = tensors[name].half()
    image = CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                                           image_size=32, num_attention_heads=2, patch_size=16,
                                                           projection_dim=20))
    image.save_pretrained(adapter / "image_encoder")
    torch.save(parts, adapter / "ip-adapter_sd15.bin")
    return folder


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of complete downloads; tests read it and don't change it."""
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def published_copy(published: Path, tmp_path: Path) -> Callable[[], Path]:
    """published_copy() is a folder of downloads that a test may spoil."""
    return lambda: Path(shutil.copytree(published, tmp_path / "spoilt"))
