"""The client without a window, in a process of its own, against a real server with a tiny work."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bpy
import numpy as np
import pytest
from PIL import Image
from track4d_addon import capture, headless, image_sequences, scene_io, sources
from track4d_addon.slices import finished
from track4d_protocol.client import Client
from track4d_protocol.errors import InputError
from track4d_protocol.filelock import FileLock
from track4d_protocol.keys import read_connection
from track4d_protocol.messages import Settings
from track4d_protocol.space import canonical_similarity, intrinsics, orbit_viewmats
from track4d_protocol.splat_files import read_ply, read_t4d

HERE = Path(__file__).resolve().parent


def serve(home: Path) -> subprocess.Popen:
    """A server whose work is `film_work`."""
    home.mkdir(exist_ok=True)
    code = (
        f"import pathlib; from track4d.service import serve; serve(pathlib.Path({str(home)!r}), work='film_work:run')"
    )
    environment = os.environ | {"PYTHONPATH": str(HERE), "TINY_WORK_GATES": str(home)}
    with open(home / "test.log", "ab") as log:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log, env=environment)
    until = time.monotonic() + 120
    while not (home / "connection.json").exists():
        assert server.poll() is None and time.monotonic() < until, (home / "test.log").read_text()
        time.sleep(0.1)
    return server


def end(server: subprocess.Popen) -> None:
    server.terminate()
    server.wait(60)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home with a server."""
    home = tmp_path_factory.mktemp("home")
    server = serve(home)
    yield home
    end(server)


def client(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "track4d_addon.headless", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[int, list[dict]]:
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err[-3000:]
    return process.returncode, [json.loads(line) for line in out.splitlines()]


def test_a_file_becomes_files(kit, asset, home, tmp_path) -> None:
    names = ("fox.glb", "fox.blend", "fox.pc2", "fox.t4d", "fox.splats.glb", "fox.ply", "fox.webp", "sheet.png", "report.json")
    out = {name: tmp_path / name for name in names}
    code, lines = finish(
        client(
            "animate",
            asset("fox.glb"),
            "--prompt",
            "the fox is running",
            "--seed",
            5,
            "--frames",
            8,
            "--front",
            "-Y",
            "--home",
            home,
            "--out",
            out["fox.glb"],
            *(word for name in names[1:6] for word in ("--out", out[name])),
            "--morph-normals",
            "--strength",
            1.5,
            "--loop",
            "--keep-root",
            "--pin",
            "b_Head_05",
            "--preview",
            out["fox.webp"],
            "--sheet",
            out["sheet.png"],
            "--report",
            out["report.json"],
        )
    )
    assert code == 0, lines[-1]
    sequence = [tmp_path / f"fox_{frame:04d}.ply" for frame in range(1, 9)]
    written = [file for path in out.values() for file in (sequence if path.suffix == ".ply" else [path])]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    stages = list(dict.fromkeys(line["stage"] for line in lines if "stage" in line))
    assert [s for s in stages if s != "queued"] == ["load", "capture", "connect", "fit", "generate", "export"]
    assert all(0 <= line["step"] <= line["total"] or not line["total"] for line in lines if "stage" in line)
    assert [line["warning"]["code"] for line in lines if "warning" in line] == ["rest_pose_used", "tiny_work"]
    assert lines[-1]["done"]["files"] == [str(path) for path in written]

    report = json.loads(out["report.json"].read_text())
    assert report["prompt"] == "the fox is running" and report["seed"] == 5 and report["settings"]["file"] == "fox.glb"
    assert {"load", "capture", "submit", "wait", "apply", "export"} <= set(report["client_seconds"])
    assert report["client_versions"]["bpy"] == bpy.app.version_string
    assert [w["code"] for w in report["warnings"]] == ["rest_pose_used", "tiny_work"]
    assert report["arrived"]["views"] == [4, 256, 256, 4]
    asked = report["asked"]
    assert (asked["strength"], asked["loop"], asked["keep_root"]) == (1.5, True, True)
    assert report["arrived"]["pin"] == report["arrived"]["vertices"][:1] and 0 < report["pinned"] < report["arrived"]["pin"][0]
    assert {name: report["settings"][name] for name in ("strength", "loop", "keep_root", "pin")} == {
        "strength": 1.5, "loop": True, "keep_root": True, "pin": "b_Head_05"
    }  # fmt: skip
    with Image.open(out["fox.webp"]) as preview, Image.open(out["sheet.png"]) as sheet:
        assert preview.size == (96, 96) and preview.n_frames == 8
        assert sheet.width % 48 == 0 and sheet.height > 4 * 48

    ((still,), _), seen = scene_io.load(asset("fox.glb")), None
    seen = capture.snapshot([still])
    size = np.ptp(seen.vertices, axis=0)
    bpy.ops.wm.open_mainfile(filepath=str(out["fox.blend"]))
    (fox,) = [obj for obj in bpy.context.scene.objects if obj.type == "MESH"]
    assert (bpy.context.scene.frame_start, bpy.context.scene.frame_end) == (1, 8)
    for frame in range(8):
        lift = 0.2 * np.sin(2 * np.pi * frame / 7) * (1 + seen.vertices[:, 0])
        moved = kit.world_positions([fox], frame + 1) - kit.to_world(seen, seen.vertices)
        assert np.abs(moved[:, 2] - lift).max() < 1e-4 * size.max() and np.abs(moved[:, :2]).max() < 1e-4 * size.max()
    world = np.stack([kit.world_positions([fox], frame)[:50] for frame in range(1, 9)])
    for frame, path in enumerate(sequence):
        splats = read_ply(path)
        assert np.abs(splats.means[0] - world[frame]).max() < 1e-4 * size.max()
        np.testing.assert_allclose(splats.colors(0, direction=[0, 1, 0]), 0.25, atol=1e-5)
    means = read_t4d(out["fox.t4d"]).means
    assert means.shape == (8, 50, 3) and np.abs(means.mean(1) - world.mean(1)).max() < 1e-3 * size.max()
    with Client(read_connection(home / "connection.json")) as server:
        assert server.jobs() == []  # written, so no longer kept


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_stops_the_job_and_writes_nothing(asset, home, tmp_path, number) -> None:
    process = client(
        "animate",
        asset("static_spot.glb"),
        "--prompt",
        "it waits for ever",
        "--home",
        home,
        "--out",
        tmp_path / "a.glb",
        "--report",
        tmp_path / "r.json",
    )
    for line in process.stdout:
        if json.loads(line).get("stage") == "fit":
            break
    process.send_signal(number)
    code, lines = finish(process)
    assert code == 2 and lines[-1]["error"]["code"] == "cancelled" and list(tmp_path.iterdir()) == []
    with Client(read_connection(home / "connection.json")) as server:
        until = time.monotonic() + 60
        while (job := server.jobs()[0]).state.value != "cancelled":
            assert time.monotonic() < until, job
            time.sleep(0.1)
        server.forget(job.id)
        assert server.jobs() == []


def test_a_server_that_dies_loses_nothing(asset, tmp_path) -> None:
    """The job is on its disk; the client waits for the next server."""
    home = tmp_path / "home"
    first = serve(home)
    process = client(
        "animate", asset("static_spot.glb"), "--prompt", "it waits for more", "--home", home, "--out", tmp_path / "a.glb"
    )
    for line in process.stdout:
        if json.loads(line).get("stage") == "fit":
            break
    starting = FileLock(home / "start.lock")
    assert starting.acquire(30)
    with starting:  # or the client would start one itself, with the real pipeline
        first.kill()
        first.wait()
        (home / "connection.json").unlink()
        second = serve(home)
    (home / "more").touch()
    code, lines = finish(process)
    end(second)
    assert code == 0, lines[-1]
    assert (tmp_path / "a.glb").is_file()


def test_stopping_during_the_capture(asset, home, tmp_path) -> None:
    process = client("animate", asset("static_spot.glb"), "--prompt", "x", "--home", home, "--out", tmp_path / "a.glb")
    for line in process.stdout:
        if json.loads(line).get("stage") == "capture":
            break
    process.send_signal(signal.SIGINT)
    code, lines = finish(process)
    assert code == 2 and lines[-1]["error"]["code"] == "cancelled" and list(tmp_path.iterdir()) == []


def test_a_job_that_fails(asset, home, tmp_path) -> None:
    code, lines = finish(
        client(
            "animate",
            asset("static_spot.glb"),
            "--prompt",
            "it fails",
            "--home",
            home,
            "--out",
            tmp_path / "a.glb",
            "--quiet",
        )
    )
    assert code == 2 and lines[-1]["error"]["kind"] == "ServerError" and lines[-1]["error"]["action"]
    assert list(tmp_path.iterdir()) == [] and not any("stage" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["animate", "absent.glb", "--prompt", "x", "--out", "a.glb"], "missing_file"),
        (["animate", "here.obj", "--prompt", "x", "--out", "a.stl"], "unsupported_format"),
        (["animate", "here.obj", "--prompt", "x", "--out", "no/such/a.glb"], "missing_folder"),
        (["animate", "here.obj", "--prompt", "x", "--out", "a.glb", "--preview", "a.gif"], "unsupported_format"),
        (["animate", "here.obj", "--out", "a.glb"], "bad_arguments"),
        (["animate", "here.obj", "--prompt", " ", "--out", "a.glb"], "empty_prompt"),
        (["paint"], "bad_arguments"),
        (["animate", "here.obj", "--prompt", "x", "--out", "a.glb", "--front", "up"], "bad_arguments"),
        (["animate", "here.obj", "--prompt", "x", "--out", "a.glb", "--frames", "many"], "bad_arguments"),
    ],
)
def test_mistakes_are_told_at_once(tmp_path, monkeypatch, arguments, code) -> None:
    """Before a server is started or Blender is loaded."""
    monkeypatch.chdir(tmp_path)
    Path("here.obj").write_text("v 0 0 0\n")
    returned, lines = finish(client(*arguments, *(["--home", tmp_path / "home"] if len(arguments) > 1 else [])))
    assert returned == 2 and lines[-1]["error"]["code"] == code and lines[-1]["error"]["action"]
    assert [p.name for p in tmp_path.iterdir()] == ["here.obj"]


def test_previews_without_pillow_are_refused_at_once(tmp_path, monkeypatch) -> None:
    (tmp_path / "hidden" / "PIL").mkdir(parents=True)
    (tmp_path / "hidden" / "PIL" / "__init__.py").write_text("raise ImportError('as where Pillow is not installed')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    monkeypatch.chdir(tmp_path)
    Path("here.obj").write_text("v 0 0 0\n")
    line = ["animate", "here.obj", "--prompt", "x", "--out", "a.glb", "--home", tmp_path / "home"]
    for wanted, name in (("--preview", "a.webp"), ("--sheet", "a.png")):
        code, lines = finish(client(*line, wanted, name))
        assert code == 2 and lines[-1]["error"]["code"] == "pillow_missing"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here.obj", "hidden"]


# Videos


def write_views(folder: Path, views: int = 4, frames: int = 3, size: int = 32, mode: str = "RGB") -> None:
    """Pictures whose colour tells view and frame."""
    for view in range(views):
        (folder / f"view_{view}").mkdir(parents=True)
        for frame in range(frames):
            color = (50 * view, 80 * frame, 7, 128)[: len(mode)]
            Image.new(mode, (size, size), color).save(folder / f"view_{view}" / f"{frame:04d}.png")


def write_films(folder: Path, views: int, frames: int, size: int, rate: int) -> None:
    """Films that grow lighter."""
    av = pytest.importorskip("av", reason="PyAV isn't installed")
    folder.mkdir(exist_ok=True)
    for view in range(views):
        with av.open(str(folder / f"view_{view}.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width = stream.height = size
            for frame in range(frames):
                picture = np.full((size, size, 3), 60 * frame, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())


def fit(mesh: Path, home: Path, folder: Path) -> dict:
    """Fits a mesh to the video in `folder`, writes a.glb and a.t4d there, and returns the report."""
    out = [word for name in ("a.glb", "a.t4d") for word in ("--out", folder / name)]
    code, lines = finish(
        client("fit", mesh, "--video", folder / "video", "--home", home, *out, "--report", folder / "r.json")
    )
    assert code == 0, lines[-1]
    return json.loads((folder / "r.json").read_text())


def test_a_video_moves_the_mesh(asset, home, tmp_path) -> None:
    write_views(tmp_path / "video")
    report = fit(asset("static_spot.glb"), home, tmp_path)
    assert report["arrived"]["video"] == [4, 3, 32, 32, 3] and "views" not in report["arrived"]
    assert report["first_pixels"] == [[[50 * v, 80 * f, 7] for f in range(3)] for v in range(4)]


def test_large_films_are_sent_small_and_keep_their_length_and_pace(asset, home, tmp_path) -> None:
    """Five frames of 720 pixels at ten a second: 0.4 s of the mesh, and 256 pixels on the way to the server."""
    write_films(tmp_path / "video", views=4, frames=5, size=720, rate=10)
    report = fit(asset("static_spot.glb"), home, tmp_path)
    assert report["arrived"]["video"] == [4, 5, 256, 256, 3]
    assert report["asked"]["frames"] == report["settings"]["frames"] == 5
    data = (tmp_path / "a.glb").read_bytes()
    document = json.loads(data[20 : 20 + int.from_bytes(data[12:16], "little")])
    (times,) = {sampler["input"] for animation in document["animations"] for sampler in animation["samplers"]}
    assert document["accessors"][times]["max"][0] - document["accessors"][times]["min"][0] == pytest.approx(0.4, abs=1e-3)
    assert read_t4d(tmp_path / "a.t4d").fps == 10


def test_larger_pictures_are_reduced_with_their_cameras(kit, tmp_path) -> None:
    (tmp_path / "view_0").mkdir()
    picture = np.zeros((300, 600, 4), np.uint8)
    picture[:, 101:] = (200, 30, 10, 255)
    Image.fromarray(picture).save(tmp_path / "view_0" / "a.png")
    K = [[500.0, 0, 300], [0, 500, 150], [0, 0, 1]]
    (tmp_path / "cameras.json").write_text(json.dumps({"viewmats": np.eye(4)[None].tolist(), "Ks": [K], "fps": 8}))
    seen = capture.snapshot([kit.make_cone()])
    request = finished(sources.from_folder(seen, Settings(task="fit"), tmp_path, size=100))
    video = request.arrays["video"]
    assert video.shape == (1, 1, 50, 100, 4)
    assert not video[..., :16, 3].any() and (video[..., 17:, 3] == 255).all()
    assert video[0, 0, 25, 16].tolist() == [200, 30, 10, 43]  # a sixth of it; nothing of the background is in the colour
    np.testing.assert_allclose(request.arrays["Ks"][0], np.diag([1 / 6, 1 / 6, 1]) @ K, rtol=1e-6)
    assert image_sequences.duration(tmp_path) == 0
    (tmp_path / "cameras.json").write_text(json.dumps({"fps": "many"}))
    with pytest.raises(InputError) as caught:
        image_sequences.duration(tmp_path)
    assert caught.value.code == "bad_cameras"


def test_long_videos_are_thinned_and_masks_make_them_transparent(tmp_path) -> None:
    write_views(tmp_path, views=2, frames=9, size=16)
    for view in range(2):
        (tmp_path / f"mask_{view}").mkdir()
        for frame in range(9):
            mask = np.zeros((16, 16), np.uint8)
            mask[frame:, 8 * view :] = 255
            Image.fromarray(mask).save(tmp_path / f"mask_{view}" / f"{frame}.png")
    video = image_sequences.read_views(tmp_path, most=3)
    assert video.shape == (2, 3, 16, 16, 4)
    for k, frame in enumerate((0, 4, 8)):
        with Image.open(tmp_path / "view_1" / f"{frame:04d}.png") as picture:
            np.testing.assert_array_equal(video[1, k, ..., :3], np.asarray(picture))
    for view in range(2):
        for k, frame in enumerate((0, 4, 8)):
            inside = video[view, k, ..., 3] == 255
            assert inside[frame:, 8 * view :].all() and inside.sum() == (16 - frame) * (16 - 8 * view)
    (tmp_path / "mask_1").rename(tmp_path / "kept")
    with pytest.raises(InputError) as caught:
        image_sequences.read_views(tmp_path)
    assert caught.value.code == "bad_masks"
    shutil.rmtree(tmp_path / "mask_0")
    assert image_sequences.read_views(tmp_path).shape == (2, 9, 16, 16, 3)


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4)])
def test_pictures_come_back_as_they_are(tmp_path, mode, channels) -> None:
    write_views(tmp_path, views=2, frames=2, mode=mode)
    video = image_sequences.read_views(tmp_path)
    assert video.shape == (2, 2, 32, 32, channels) and video[1, 1, 5, 5].tolist() == [50, 80, 7, 128][:channels]
    assert not bpy.data.images


def test_pictures_are_the_right_way_up(tmp_path) -> None:
    (tmp_path / "view_0").mkdir()
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[0], picture[:, 0] = (255, 0, 0), (0, 255, 0)
    Image.fromarray(picture).save(tmp_path / "view_0" / "a.png")
    np.testing.assert_array_equal(image_sequences.read_views(tmp_path)[0, 0], picture)


def test_films(tmp_path) -> None:
    write_films(tmp_path, views=2, frames=4, size=32, rate=24)
    assert image_sequences.duration(tmp_path) == pytest.approx(3 / 24)
    video = image_sequences.read_views(tmp_path)
    assert video.shape == (2, 4, 32, 32, 3) and np.abs(video[0, :, 16, 16, 0] - np.arange(4) * 60.0).max() < 8


def test_cameras_of_both_spaces_are_the_same(kit, tmp_path) -> None:
    cone = kit.make_cone()
    cone.location, cone.rotation_euler = (5, 6, 7), (0.1, 0.2, 2.0)
    seen = capture.snapshot([cone])
    similarity = canonical_similarity(seen.vertices)
    in_capture = similarity.viewmats_to_world(orbit_viewmats())
    in_world = in_capture @ np.linalg.inv(seen.to_world)
    for space, viewmats in (("canonical", orbit_viewmats()), ("world", in_world)):
        (tmp_path / "cameras.json").write_text(
            json.dumps({"viewmats": viewmats.tolist(), "Ks": intrinsics(32, 4).tolist(), "space": space})
        )
        found, Ks, named = image_sequences.read_cameras(tmp_path, 4, 32, 32)
        assert named == space and Ks.shape == (4, 3, 3)
        found = found @ seen.to_world if space == "world" else similarity.viewmats_to_world(found)
        np.testing.assert_allclose(found, in_capture, atol=1e-4)


def cameras(**changes) -> str:
    return json.dumps({"viewmats": orbit_viewmats().tolist(), "Ks": intrinsics(32, 4).tolist()} | changes)


def lose_a_picture(folder: Path) -> None:
    (folder / "view_1" / "0002.png").unlink()


def lose_a_view(folder: Path) -> None:
    (folder / "view_1").rename(folder / "view_7")


def empty_a_view(folder: Path) -> None:
    for file in (folder / "view_1").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: (folder / "view_1" / "0001.png").write_bytes(b"not a picture"), "unreadable_file"),
        (lambda folder: Image.new("RGB", (8, 8)).save(folder / "view_1" / "0001.png"), "sizes_differ"),
        (lose_a_picture, "sizes_differ"),
        (lose_a_view, "no_views"),
        (empty_a_view, "no_views"),
        (lambda folder: (folder / "cameras.json").write_text("{"), "bad_cameras"),
        (lambda folder: (folder / "cameras.json").write_text("[]"), "bad_cameras"),
        (lambda folder: (folder / "cameras.json").write_text(cameras(Ks=[])), "bad_cameras"),
        (lambda folder: (folder / "cameras.json").write_text(cameras(space="mars")), "bad_cameras"),
        (
            lambda folder: (folder / "cameras.json").write_text(
                cameras(viewmats=[[[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 3], [0, 0, 0, 1]]] * 4)
            ),
            "bad_cameras",
        ),
        (lambda folder: write_views(folder / "deeper"), None),
    ],
)
def test_videos_that_can_not_be_used(tmp_path, spoil, code) -> None:
    write_views(tmp_path)
    spoil(tmp_path)
    try:
        video = image_sequences.read_views(tmp_path)
        image_sequences.read_cameras(tmp_path, len(video), 32, 32)
        found = None
    except InputError as error:
        found = error.code
        assert error.action
    assert found == code and not bpy.data.images


def test_without_cameras_the_views_must_be_the_orbit(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        image_sequences.read_cameras(tmp_path, 3, 32, 32)
    assert caught.value.code == "missing_cameras"


def test_the_command_line_hands_the_client_what_it_was_given(monkeypatch, tmp_path) -> None:
    typer_testing = pytest.importorskip("typer.testing")
    cli = pytest.importorskip("track4d.cli", reason="the server isn't installed here")
    given = {}
    monkeypatch.setattr(cli, "blender_client", lambda task, mesh, what, *_: given.update(task=task, what=what))
    words = ["animate", "fox.glb", "-o", "a.glb", "--prompt", "it runs", "--strength", "0.5", "--loop", "--pin", "Feet"]
    done = typer_testing.CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert given["task"] == "animate" and given["what"][:2] == ["--prompt", "it runs"]
    assert given["what"][-3:] == ["--strength=0.5", "--loop", "--pin=Feet"]
    monkeypatch.chdir(tmp_path)
    Path("fox.obj").write_text("v 0 0 0\n")
    options = headless._parse(["animate", "fox.obj", "--out", "a.glb", *given["what"], "--front", "+X"])
    assert (options.strength, options.loop, options.keep_root, options.pin, options.front) == (0.5, True, False, "Feet", "+X")
