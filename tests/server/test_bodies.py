"""Other bodies for real clips: the motion of one body on another of the same connectivity."""

import numpy as np
import pytest
from track4d.training.bodies import other_body, reshape, transfer
from track4d.training.objects import make_object
from track4d.training.verbs import Action, animate
from track4d.video.text import VERB_NAMES


def edges_of(faces):
    sides = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    return np.unique(sides, axis=0)


def lengths(points, edges):
    return np.linalg.norm(points[..., edges[:, 0], :] - points[..., edges[:, 1], :], axis=-1)


@pytest.fixture
def dog():
    return make_object(np.random.default_rng(3), "quadruped")


@pytest.fixture
def run(dog):
    return animate(dog, Action(VERB_NAMES.index("run")), np.arange(8) / 8).astype(float)


def test_the_same_body_moves_as_it_did(dog, run):
    moved = transfer(dog.vertices.astype(float), dog.vertices.astype(float), edges_of(dog.faces), run)
    assert np.abs(moved - run).max() < 1e-9


def test_a_turn_stays_a_turn_on_a_body_of_other_proportions(dog):
    angle = np.radians(70)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    places, edges = dog.vertices.astype(float), edges_of(dog.faces)
    body = places * (1.3, 0.7, 0.8)
    (moved,) = transfer(places, body, edges, (places @ turn.T)[None])
    assert np.abs(lengths(moved, edges) - lengths(body, edges)).max() < 0.01
    along = body[edges[:, 0]] - body[edges[:, 1]]
    assert np.abs((moved[edges[:, 0]] - moved[edges[:, 1]]) - along @ turn.T).max() < 0.01


def test_another_body_runs_with_legs_of_its_own_length(dog, run):
    rest, (moved,) = other_body(dog.vertices, dog.faces, run[None].astype(np.float32), np.random.default_rng(1))
    assert rest.shape == dog.vertices.shape and moved.shape == run.shape and moved.dtype == np.float32
    assert np.linalg.norm(rest, axis=1).max() == pytest.approx(1, abs=1e-5)
    edges = edges_of(dog.faces)
    changed = lengths(rest, edges) / np.maximum(lengths(dog.vertices, edges), 1e-6)
    assert np.percentile(changed, 90) / np.percentile(changed, 10) > 1.1  # it is another body
    for before, now in zip(lengths(run, edges), lengths(moved, edges)):  # whose limbs keep their lengths as well as the first's
        kept = np.median(np.abs(now / lengths(rest, edges) - 1))
        assert kept < np.median(np.abs(before / lengths(dog.vertices, edges) - 1)) + 0.03
    swing = np.linalg.norm(moved - moved[:1], axis=-1).max() / np.linalg.norm(run - run[:1], axis=-1).max()
    assert 0.4 < swing < 2.5


def test_pieces_that_nothing_joins_stay_together(dog):
    """Two copies of a body side by side, one mesh: the second neither drifts nor falls behind."""
    count = len(dog.vertices)
    vertices = np.concatenate([dog.vertices, dog.vertices + (0, 1.2, 0)]).astype(np.float32)
    faces = np.concatenate([dog.faces, dog.faces + count])
    poses = np.stack([vertices, vertices + (0, 0, 0.5)]).astype(np.float32)
    rest, (moved,) = other_body(vertices, faces, poses[None], np.random.default_rng(2))
    gap = lambda points: points[count:].mean(0) - points[:count].mean(0)  # noqa: E731
    assert np.abs(gap(moved[1]) - gap(rest)).max() < 0.02
    assert np.abs(moved[0] - rest).max() < 0.02


def test_proportions_are_alike_on_both_sides_without_the_wobble():
    class Even(np.random.Generator):
        """Draws no wobble."""

        def normal(self, *arguments, **options):
            return np.zeros((3, 3))

    points = np.random.default_rng(0).uniform(-1, 1, (50, 3))
    flip = np.array([1, -1, 1])
    one, other = (reshape(side, Even(np.random.PCG64(5))) for side in (points, points * flip))
    shift = one - other * flip  # the wobble is the same shift everywhere
    assert np.abs(shift - shift[0]).max() < 1e-9
