"""The Gaussian cloud: geometry nodes play what the arrays say, and a render looks like the rasteriser's picture."""

import bpy
import numpy as np
import pytest
from mathutils import Matrix
from track4d_addon.apply.gaussian_cloud import gaussian_cloud, remove_cloud
from track4d_protocol import space
from track4d_protocol.errors import InputError
from track4d_protocol.splats import Splats, multiply_quats


def make(count=200, frames=4, degree=1, terms=2) -> Splats:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(count, 3))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    turns = [np.array([np.cos(a), 0, 0, np.sin(a)]) for a in np.linspace(0, 0.5, frames)]
    rest = rng.normal(size=(count, 4))
    rest /= np.linalg.norm(rest, axis=1, keepdims=True)
    means = np.stack([points * [1, 0.7, 0.9] + [0, 0, 0.1 * f] for f in range(frames)])
    quats = np.stack([multiply_quats(turn, rest) for turn in turns])
    sh = rng.normal(0, 0.2, (count, (degree + 1) ** 2, terms, 3))
    arrays = (means, quats, rng.uniform(0.05, 0.12, (count, 3)), rng.uniform(0.5, 1, count), sh)
    return Splats(*(array.astype(np.float32) for array in arrays))


@pytest.fixture
def scene():
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(camera)
    scene.camera = camera
    camera.data.angle = np.radians(space.FIELD_OF_VIEW)
    camera.matrix_world = Matrix(space.viewmat_to_camera_matrix(space.orbit_viewmats([30.0], 20.0)[0]).tolist())
    return scene


def instances(cloud: bpy.types.Object) -> np.ndarray:
    """World matrices of what the nodes make of the cloud, [G, 4, 4]."""
    graph = bpy.context.evaluated_depsgraph_get()
    made = [np.array(one.matrix_world) for one in graph.object_instances if one.is_instance and one.parent.original == cloud]
    return np.array(made)


@pytest.mark.parametrize("frame", [-3, 5, 7, 40])
def test_places_sizes_and_rotations_of_every_frame(scene, frame):
    splats = make()
    matrix = Matrix.Translation((1, 2, 3)) @ Matrix.Rotation(0.4, 4, "Z")
    cloud = gaussian_cloud(splats, "cloud", frame_start=5, matrix=matrix)
    scene.frame_set(frame)
    found = instances(cloud)
    f = int(np.clip(frame - 5, 0, splats.frames - 1))
    turn, shift = np.array(matrix)[:3, :3], np.array(matrix)[:3, 3]
    assert np.allclose(found[:, :3, 3], splats.means[f] @ turn.T + shift, atol=1e-5)
    axes = found[:, :3, :3]
    w, x, y, z = splats.quats[f].astype(np.float64).T
    first = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], 1)
    assert np.allclose(axes[:, :, 0], 3 * splats.scales[:, :1] * (first @ turn.T), atol=1e-5)


@pytest.mark.parametrize("direction", [None, (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("degree", [0, 1, 3])
def test_colours_are_those_of_the_harmonics(scene, degree, direction):
    splats = make(degree=degree, terms=3)
    cloud = gaussian_cloud(splats, "cloud", direction=direction)
    group = cloud.modifiers[0].node_group
    # the points before they are instanced carry the colour
    stored = next(node for node in group.nodes if node.bl_idname == "GeometryNodeStoreNamedAttribute")
    output = next(node for node in group.nodes if node.bl_idname == "NodeGroupOutput")
    group.links.new(stored.outputs[0], output.inputs[0])
    for frame in (1, 3):
        scene.frame_set(frame)
        mesh = cloud.evaluated_get(bpy.context.evaluated_depsgraph_get()).data
        colors = np.empty(len(mesh.vertices) * 3, np.float32)
        mesh.attributes["color"].data.foreach_get("vector", colors)
        eye = np.array(scene.camera.matrix_world)[:3, 3]
        wanted = splats.colors(frame - 1, viewer=eye) if direction is None else splats.colors(frame - 1, direction=direction)
        assert np.allclose(colors.reshape(-1, 3), wanted, atol=2e-4)


def test_nothing_stays_when_it_is_removed(scene):
    blocks = ("objects", "meshes", "node_groups", "materials")
    before = {kind: {block.name for block in getattr(bpy.data, kind)} for kind in blocks}
    clouds = [gaussian_cloud(make(), name) for name in ("one", "two")]
    remove_cloud(clouds[0])
    scene.frame_set(2)
    assert len(instances(clouds[1])) == 200
    remove_cloud(clouds[1])
    assert before == {kind: {block.name for block in getattr(bpy.data, kind)} for kind in blocks}


def test_too_many_are_refused(scene):
    splats = make(count=10, frames=2)
    huge = Splats(np.broadcast_to(np.float32(0), (300, 60_000, 3)), splats.quats, splats.scales, splats.opacities, splats.sh)
    with pytest.raises(InputError) as caught:
        gaussian_cloud(huge, "cloud")
    assert caught.value.code == "cloud_too_large" and not bpy.data.meshes


def test_a_render_looks_like_the_rasteriser(scene, tmp_path):
    torch = pytest.importorskip("torch")
    from track4d.gaussians.rasterise import rasterise

    splats = make(count=400, degree=1)
    gaussian_cloud(splats, "cloud")
    size, frame = 96, 3
    scene.render.engine = "CYCLES"
    scene.cycles.samples, scene.cycles.use_denoising = 32, False
    scene.render.resolution_x = scene.render.resolution_y = size
    scene.render.film_transparent = True
    scene.view_settings.view_transform = "Standard"
    scene.render.filepath = str(tmp_path / "cloud.png")
    scene.frame_set(frame)
    bpy.ops.render.render(write_still=True)
    image = bpy.data.images.load(scene.render.filepath)
    pixels = np.empty(size * size * 4, np.float32)
    image.pixels.foreach_get(pixels)
    seen = pixels.reshape(size, size, 4)[::-1]
    viewmat = space.orbit_viewmats([30.0], 20.0)
    eye = np.array(scene.camera.matrix_world)[:3, 3]
    arrays = [splats.means[frame - 1 : frame], splats.quats[frame - 1 : frame], splats.scales, splats.opacities,
              splats.colors(frame - 1, viewer=eye), viewmat, space.intrinsics(size, 1)]  # fmt: skip
    rgb, alpha = rasterise(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays), size, torch.zeros(3))
    wanted, opaque = rgb[0, 0].numpy(), alpha[0, 0].numpy()
    difference = (seen[..., :3] * seen[..., 3:] - wanted)[opaque > 0.05]
    psnr = -10 * np.log10((difference**2).mean())
    assert psnr > 22, psnr
    assert np.abs(difference.mean(0)).max() < 0.03
    shifted = (seen[..., :3] * seen[..., 3:] - np.roll(wanted, 4, 1))[opaque > 0.05]
    assert -10 * np.log10((shifted**2).mean()) < psnr - 2
