"""`track4d generate`: pictures or a mesh in, folders of pictures and films out."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from track4d.commands import generate as command
from track4d.commands.generate import generate, write_film, write_views
from track4d.geometry.mesh_file import read_mesh
from track4d_protocol.errors import InputError
from track4d_protocol.space import intrinsics, orbit_viewmats

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "sunflower.glb"
PROMPT = "it sways"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRACK4D_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("track4d.video.multiview_video.SIZE", 32)
    monkeypatch.setattr(command, "CAPTURE", 64)
    return tmp_path / "home"


@pytest.fixture
def stills(tmp_path: Path) -> Path:
    """A folder with four pictures, 40 x 24, as a user gives them."""
    folder = tmp_path / "stills"
    folder.mkdir()
    for v in range(4):
        picture = np.zeros((24, 40, 4), np.uint8)
        picture[6:18, 8 + v:24 + v] = (200, 90, 30, 255)
        Image.fromarray(picture).save(folder / f"view_{v}.png")
    return folder


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_pictures_become_folders_and_films(published: Path, stills: Path, tmp_path: Path, own_home: Path,
                                           capsys: pytest.CaptureFixture) -> None:
    out = [tmp_path / "video", tmp_path / "film.mp4", tmp_path / "film.webm"]
    generate(stills, PROMPT, out, weights=published, frames=3, steps=1)
    assert [len(list((out[0] / f"view_{v}").iterdir())) for v in range(4)] == [3] * 4
    picture = np.asarray(Image.open(out[0] / "view_3" / "0002.png"))
    assert picture.shape == (19, 32, 4) and (picture[..., 3] == 255).all()
    cameras = json.loads((out[0] / "cameras.json").read_text())
    np.testing.assert_allclose(cameras["viewmats"], orbit_viewmats(), atol=1e-6)
    focal = intrinsics(32)[0, 0, 0]
    np.testing.assert_allclose(cameras["Ks"][0], [[focal, 0, 16], [0, focal, 9.5], [0, 0, 1]], rtol=0.02)
    for film in out[1:]:
        frames = frames_of(film)
        assert len(frames) == 3 and frames[0].shape == (20, 4 * 32, 3)
    said = capsys.readouterr().err
    assert said.count("licence of") == 3 and "Open RAIL-M" in said and "wrote" in said

    converted = own_home / "models" / "published" / "unet.safetensors"
    written = converted.stat().st_mtime_ns
    again = tmp_path / "again"
    generate(stills, "it sways " * 100, [again], weights=converted.parent, frames=3, steps=1)
    assert converted.stat().st_mtime_ns == written
    assert "first 77" in capsys.readouterr().err


def test_the_extension_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("bpy", reason="Blender's Python module isn't installed")
    from track4d_addon.image_sequences import read_cameras, read_views

    video = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16, 4)).astype(np.uint8)
    video[..., 3] = 255
    viewmats, Ks = orbit_viewmats((0, 90)), intrinsics(16, 2)
    write_views(tmp_path / "video", video, viewmats, Ks)
    assert np.array_equal(read_views(tmp_path / "video")[..., :3], video[..., :3])
    read = read_cameras(tmp_path / "video", 2, 16, 16)
    np.testing.assert_allclose(read[0], viewmats, atol=1e-6)
    np.testing.assert_allclose(read[1], Ks)
    assert read[2] == "canonical"


def test_a_mesh_moves_without_blender(tmp_path: Path) -> None:
    out = tmp_path / "video"
    generate(EXAMPLE, PROMPT, [out], frames=4, steps=2)
    first, last = (np.asarray(Image.open(out / "view_1" / f"{f:04d}.png")) for f in (0, 3))
    assert first.shape == (64, 64, 4) and 0.02 < (first[..., 3] > 127).mean() < 0.7
    assert np.abs(first.astype(int) - last).max() > 50
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".track4d-")]


def test_the_small_model_paints_a_mesh_with_transparency(tmp_path: Path) -> None:
    from track4d.video.features import save_small
    from track4d.video.unet import MultiViewUNet, UNetConfig

    torch.manual_seed(0)
    config = UNetConfig(channels=(8, 16), attention=(False, True), spatial_motion=(False, True), layers=1, heads=2,
                        motion_heads=2, groups=4, patch=2, text_dim=16, vocabulary=128, text_tokens=16, image_dim=0)
    save_small(tmp_path / "small.safetensors", MultiViewUNet(config).state_dict(), config, {})
    out = tmp_path / "video"
    generate(EXAMPLE, PROMPT, [out], model="small", weights=tmp_path / "small.safetensors", frames=4, steps=1, loop=True)
    still = np.asarray(Image.open(out / "view_0" / "0000.png"))
    assert still.shape == (64, 64, 4) and 0.02 < (still[..., 3] > 127).mean() < 0.7


@pytest.mark.parametrize("changes, code", [
    ({"out": ["film.gif"]}, "unsupported_format"),
    ({"out": ["absent/film.mp4"]}, "missing_folder"),
    ({"out": ["stills"]}, "folder_not_empty"),
    ({"prompt": "  "}, "empty_prompt"),
    ({"model": "large"}, "unknown_model"),
    ({"model": "motion"}, "not_for_motion"),
    ({"source": EXAMPLE, "loop": True}, "not_for_motion"),
    ({"source": EXAMPLE, "frames": 1}, "bad_settings"),
    ({"frames": 1}, "bad_settings"),
    ({"source": Path("absent.glb")}, "missing_file"),
    ({"source": Path("scene.blend")}, "unsupported_format"),
    ({"weights": Path("nowhere")}, "checkpoint_missing"),
])
def test_bad_input_is_refused_and_nothing_is_written(stills: Path, tmp_path: Path, changes: dict, code: str) -> None:
    given = {"source": stills, "prompt": PROMPT, "out": ["video"]} | changes
    given["out"] = [tmp_path / name for name in given["out"]]
    with pytest.raises(InputError) as refused:
        generate(**given)
    assert refused.value.code == code and refused.value.action
    assert {path.name for path in tmp_path.iterdir()} <= {"stills", "home"}


def test_cameras_of_the_users_own_are_checked(stills: Path, tmp_path: Path) -> None:
    cameras = stills / "cameras.json"
    good = {"viewmats": orbit_viewmats().tolist(), "Ks": intrinsics(40, 4).tolist()}
    cameras.write_text(json.dumps(good))
    pictures, viewmats, Ks = command.stills(stills, "-Y")
    assert pictures.shape == (4, 24, 40, 4) and viewmats.shape == (4, 4, 4) and Ks.shape == (4, 3, 3)
    three = {"viewmats": good["viewmats"][:3]}
    for spoilt in ([], good | {"Ks": [[1]]}, good | {"space": "world"}, good | three, {"Ks": good["Ks"]}):
        cameras.write_text(json.dumps(spoilt))
        with pytest.raises(InputError) as refused:
            command.stills(stills, "-Y")
        assert refused.value.code == "bad_cameras"
    cameras.unlink()
    (stills / "view_3.png").unlink()
    with pytest.raises(InputError) as refused:
        command.stills(stills, "-Y")
    assert refused.value.code == "missing_cameras"


def test_films_are_on_grey(tmp_path: Path) -> None:
    video = np.zeros((2, 5, 32, 32, 4), np.uint8)
    video[1, :, :, :, :] = (255, 255, 255, 255)
    write_film(tmp_path / "film.mp4", video)
    frame = frames_of(tmp_path / "film.mp4")[2].astype(int)
    assert np.abs(frame[:, 4:28] - 127).max() < 8 and frame[:, 40:60].min() > 245


def test_meshes_stand_upright_and_keep_their_colours(tmp_path: Path) -> None:
    box = trimesh.creation.box((1, 3, 2))  # 3 high where Y is up
    box.visual = trimesh.visual.TextureVisuals(np.random.default_rng(0).random((len(box.vertices), 2)),
                                               image=Image.new("RGB", (4, 4), (10, 200, 30)))
    box.export(tmp_path / "box.glb")
    mesh = read_mesh(tmp_path / "box.glb")
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), (1, 2, 3), atol=1e-5)
    np.testing.assert_allclose(mesh.textures[0].mean((0, 1)) * 255, (10, 200, 30), atol=2)
    assert mesh.uvs.shape == (12, 3, 2) and mesh.uvs.any()

    plain = trimesh.creation.box((1, 3, 2))
    plain.visual.face_colors = (200, 0, 0, 255)
    plain.export(tmp_path / "box.ply")
    mesh = read_mesh(tmp_path / "box.ply")
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), (1, 3, 2), atol=1e-5)
    np.testing.assert_allclose(mesh.textures[0].ravel() * 255, (200, 0, 0), atol=1)
    (tmp_path / "broken.glb").write_bytes(b"glTF broken")
    with pytest.raises(InputError) as refused:
        read_mesh(tmp_path / "broken.glb")
    assert refused.value.code == "unreadable_file"


def test_the_command_line_knows_it() -> None:
    from track4d.cli import app
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, ["generate", "--help"])
    assert result.exit_code == 0 and "--prompt" in result.output
