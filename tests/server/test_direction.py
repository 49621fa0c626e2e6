"""What the user asks of a motion besides its sentence."""

import numpy as np
import pytest
from track4d.motion.direction import directed, is_cycle, looped
from track4d.motion.field import MotionField


@pytest.fixture
def walk() -> np.ndarray:
    """A thing that swings and goes forward; [16, 40, 3]."""
    rest = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    t = np.linspace(0, 1, 16, dtype=np.float32)
    motion = np.repeat(rest[None], 16, 0)
    motion[..., 0] += t[:, None]
    motion[..., 2] += 0.2 * np.sin(9 * t)[:, None] * rest[:, 0]
    return motion


def test_nothing_asked_nothing_changed(walk):
    assert np.allclose(directed(walk), walk, atol=1e-6)


def test_strength_scales_every_displacement(walk):
    assert np.allclose(directed(walk, 0.5) - walk[0], 0.5 * (walk - walk[0]), atol=1e-6)
    assert np.allclose(directed(walk, 0.0), walk[:1], atol=1e-6)


def test_a_loop_ends_where_it_began_and_begins_unchanged(walk):
    looped = directed(walk, loop=True)
    assert np.allclose(looped[-1], looped[0], atol=1e-6) and np.allclose(looped[:9], walk[:9], atol=1e-6)
    steps = np.linalg.norm(np.diff(looped, axis=0), axis=-1).max(1)
    assert steps.max() < 5 * np.linalg.norm(np.diff(walk, axis=0), axis=-1).max()


def test_the_root_stays_and_the_limbs_go_on(walk):
    still = directed(walk, keep_root=True)
    assert np.abs(still[..., :2].mean(1) - walk[0, :, :2].mean(0)).max() < 1e-5
    assert np.allclose(still[..., 2], walk[..., 2], atol=1e-6)


def test_pinned_vertices_do_not_move(walk):
    pin = np.linspace(0, 1, 40)
    held = directed(walk, 2.0, pin=pin)
    assert np.allclose(held[:, -1], walk[0, -1], atol=1e-6)
    assert np.allclose(held[:, 20] - walk[0, 20], 2 * (1 - pin[20]) * (walk[:, 20] - walk[0, 20]), atol=1e-5)


def test_a_loop_is_periodic_in_time(walk):
    """A walk finds back, and goes through the seam as smoothly as it goes elsewhere."""
    field = looped(MotionField(walk, np.ones(walk.shape[:2], np.float32)))
    assert field.loops and field.vertices.shape == (15, 40, 3) and field.confidence.shape == (15, 40)
    before, seam, after = field.sample(np.array([1 - 1e-3, 1.0, -1 + 1e-3]))
    assert np.allclose(seam, walk[0], atol=1e-6) and np.allclose(field.sample(np.array([-1.0]))[0], seam, atol=1e-6)
    assert np.allclose(seam - before, after - seam, atol=1e-4)
    assert np.abs(seam - before).max() > 1e-5  # it does not stop there


def test_a_cycle_is_left_as_it_is():
    rest = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    angle = 2 * np.pi * np.arange(16) / 16
    circle = rest + 0.1 * np.stack([np.sin(angle), 1 - np.cos(angle), 0 * angle], 1)[:, None].astype(np.float32)
    field = MotionField(circle, np.ones((16, 40), np.float32))
    assert is_cycle(circle) and looped(field).loops and looped(field).vertices is circle
    assert not is_cycle(circle[:12]) and not is_cycle(np.concatenate([circle, circle[:1]])) and not is_cycle(circle[:1])
    still = MotionField(circle[:1].repeat(4, 0), field.confidence[:4])
    assert np.allclose(looped(still).sample(np.linspace(-1, 1, 6)), circle[0])
