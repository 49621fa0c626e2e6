"""Puppets for real clips: bodies of simple solids that do what the pieces of a real one do."""

import numpy as np
import pytest
from track4d.training import puppets
from track4d.training.bodies import other_body
from track4d.training.objects import make_object
from track4d.training.puppets import RINGS, SPOKES, puppet
from track4d.training.verbs import Action, animate
from track4d.video.text import VERB_NAMES

TIMES = np.arange(16) / 15
SOLID = RINGS * SPOKES + 2  # vertices


def turn(degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def volume(vertices, faces):
    return np.einsum("tc,tc->t", vertices[faces[:, 0]], np.cross(vertices[faces[:, 1]], vertices[faces[:, 2]])).sum() / 6


@pytest.fixture
def dog():
    return make_object(np.random.default_rng(3), "quadruped")


@pytest.mark.parametrize("seed", range(4))
def test_a_whole_that_turns_is_a_puppet_that_turns(dog, seed):
    poses = np.stack([dog.vertices @ turn(angle).T + (0, 0, angle / 300) for angle in (0, 30, 60, 90)]).astype(np.float32)
    rest, faces, (moved,) = puppet(dog.vertices, dog.faces, poses[None], np.random.default_rng(seed))
    assert faces.min() == 0 and faces.max() == len(rest) - 1 and rest.dtype == moved.dtype == np.float32
    assert np.linalg.norm(rest, axis=1).max() == pytest.approx(1, abs=1e-5)
    assert np.abs(rest.min(0) + rest.max(0)).max() < 1e-5
    assert np.abs(moved[0] - rest).max() < 1e-4
    for angle, pose in zip((30, 60, 90), moved[1:]):
        turned = rest @ turn(angle).T
        assert np.abs(pose - turned - (pose - turned).mean(0)).max() < 2e-3


def test_solids_are_closed_and_face_outwards(dog):
    rest, faces, _ = puppet(dog.vertices, dog.faces, dog.vertices[None, None], np.random.default_rng(0))
    sides = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert {tuple(side) for side in sides} == {tuple(side[::-1]) for side in sides}
    assert len(np.unique(sides, axis=0)) == len(sides)
    solid = faces[:, 0] // SOLID
    assert (faces // SOLID == solid[:, None]).all() and len(rest) == SOLID * (solid.max() + 1)
    volumes = [volume(rest, faces[solid == k]) for k in range(solid.max() + 1)]
    assert min(volumes) > 0 and 0.02 < sum(volumes) < 4.2


def test_puppets_run_as_the_dog_does_on_bodies_of_their_own(dog):
    run = animate(dog, Action(VERB_NAMES.index("run")), TIMES)[None].astype(np.float32)
    size = np.linalg.norm(run[0] - dog.vertices, axis=-1).mean()
    shapes = set()
    for seed in range(6):
        rest, faces, (moved,) = puppet(dog.vertices, dog.faces, run, np.random.default_rng(seed))
        shapes.add(tuple(np.ptp(rest, 0).round(2)))
        swing = np.linalg.norm(moved - rest, axis=-1)
        assert 0.4 < swing.mean() / size < 2.5
        low = rest[:, 2] < np.quantile(rest[:, 2], 0.2)  # legs
        assert swing[:, low].mean() > swing[:, ~low].mean()
        edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
        lengths = np.linalg.norm(np.diff(np.concatenate([rest[None], moved])[:, edges], axis=2), axis=-1)[..., 0]
        stretch = lengths[1:] / np.maximum(lengths[0], 1e-3)
        assert 0.9 < np.median(stretch) < 1.1 and np.quantile(stretch, 0.95) < 1.5
    assert len(shapes) == 6


def test_a_puppet_of_another_body_is_drawn_from_the_same_numbers(dog):
    run = animate(dog, Action(VERB_NAMES.index("run")), TIMES)[None].astype(np.float32)
    rest, poses = other_body(dog.vertices, dog.faces, run, np.random.default_rng(5))
    one, other = (puppet(rest, dog.faces, poses, np.random.default_rng(9)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one, other))


def test_a_limb_may_be_missing_and_things_may_be_carried(dog, monkeypatch):
    run = animate(dog, Action(VERB_NAMES.index("run")), TIMES)[None].astype(np.float32)

    def solids(seed, lost, carried):
        monkeypatch.setattr(puppets, "LOST_SHARE", lost)
        monkeypatch.setattr(puppets, "MOST_CARRIED", carried)
        return len(puppet(dog.vertices, dog.faces, run, np.random.default_rng(seed))[0]) // SOLID

    whole = [solids(seed, 0, 0) for seed in range(6)]
    lost = [before - solids(seed, 1, 0) for seed, before in enumerate(whole)]
    assert min(lost) >= 1 and max(lost) > 1 and all(few < before / 2 for few, before in zip(lost, whole))
    carried = [solids(seed, 0, 3) - before for seed, before in enumerate(whole)]
    assert min(carried) >= 0 and 1 <= max(carried) <= 3
