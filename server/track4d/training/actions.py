"""What a random object does, drawn at random, and the sentence that says so."""

from __future__ import annotations

import numpy as np

from ..video.text import AMPLITUDES, COUNTS, SIDES, SPEEDS, VERB_NAMES, VERBS
from .objects import ProceduralObject
from .verbs import Action

# Locomotion is what people ask for first, and the hardest; whole-body motions are learnt soonest.
_OFTEN = {"walk": 3.5, "run": 3.5, "fly": 2.5, "swim": 2.0} | dict.fromkeys(("wag the tail", "wave", "flap"), 2.0)
_OFTEN |= dict.fromkeys(("jump", "look around", "twist", "dance"), 1.5)
_OFTEN |= {"idle": 2.0, "clap": 2.0} | dict.fromkeys(("attack", "eat", "kick"), 1.5)
_OFTEN |= dict.fromkeys(("sit", "die", "roll", "spin", "turn"), 2.0)  # far from rest, where errors are largest
_SHARES = np.array([_OFTEN.get(name, 1.0) for name in VERB_NAMES])
_SHARES /= _SHARES.sum()

# Motions that can be told to the other side, and how often those that can be counted happen in 16 frames.
SIDED = frozenset(("wave", "look around", "spin", "sway", "twist", "die", "punch", "kick", "turn", "dance"))
CYCLES = {"nod": 2} | dict.fromkeys(("jump", "attack", "punch", "kick", "bow", "get hit", "sway", "twist", "look around"), 1)

# Verbs that speak of limbs; all others suit every object.
_NEEDS = {
    **dict.fromkeys(("walk", "run"), ("leg",)),
    **dict.fromkeys(("fly", "flap"), ("wing", "arm")),
    "wave": ("arm", "wing", "leg"),
    "wag the tail": ("tail",),
    **dict.fromkeys(("nod", "look around", "shake the head", "eat"), ("head",)),
    **dict.fromkeys(("kick", "sit"), ("leg",)),
    "punch": ("arm", "leg"),
    "clap": ("arm", "wing", "leg"),
}
# Of unsuitable verbs that are kept: nobody is told "no". A snake that waves is rare, and needs practice the more.
_ODD_SHARE = 0.15
_ODD_PRACTICE = 0.4


def suits(thing: ProceduralObject, verb: int, rng: np.random.Generator, odd: float = _ODD_SHARE) -> bool:
    """Whether a sample may have the object do the verb: where it has the limbs, and sometimes where it has not."""
    needs = _NEEDS.get(VERB_NAMES[verb])
    return needs is None or bool(thing.of(*needs)) or rng.random() < odd


def draw_verb(rng: np.random.Generator, thing: ProceduralObject) -> int:
    """A random verb that suits the object; index into `VERBS`."""
    while True:
        verb = int(rng.choice(len(VERBS), p=_SHARES))
        if suits(thing, verb, rng, _ODD_PRACTICE):
            return verb


def draw_action(rng: np.random.Generator, verb: int, plain: bool = False) -> tuple[Action, str, str]:
    """An action with random amplitude, speed and side, and the words for them.

    Args:
        verb: index into `VERBS`.
        plain: without adverbs.

    Returns:
        the action, the word for its size, and the words for its pace or number, and its side.
    """
    name = VERB_NAMES[verb]
    size = "" if plain else str(rng.choice(list(AMPLITUDES), p=[0.2, 0.6, 0.2]))
    pace = "" if plain else str(rng.choice(list(SPEEDS), p=[0.2, 0.6, 0.2]))
    speed, side = SPEEDS[pace], ""
    if not plain and name in CYCLES and rng.random() < 0.25:
        pace = str(rng.choice(list(COUNTS)))
        speed = COUNTS[pace] / CYCLES[name]
    if not plain and name in SIDED and rng.random() < 0.35:
        side = str(rng.choice(list(SIDES)))
    amplitude, speed = AMPLITUDES[size] * float(rng.uniform(0.9, 1.1)), speed * float(rng.uniform(0.96, 1.04))
    return Action(verb, amplitude, speed, SIDES.get(side, 1)), size, f"{pace} {side}".strip()


NOUNS = {
    plan: nouns.split()
    for plan, nouns in {
        "quadruped": "fox dog cat horse cow wolf lion deer sheep tiger giraffe elephant bear animal pony creature",
        "biped": "man woman robot person boy girl monkey character figure astronaut monster zombie bear creature",
        "bird": "bird gull eagle duck chicken parrot dragon owl bat creature",
        "fish": "fish shark whale dolphin creature",
        "snake": "snake worm eel creature",
        "plant": "tree flower plant cactus mushroom",
        "insect": "spider ant beetle bug crab insect",
        "stack": "vase bottle penguin tower lamp pawn object statue",
        "vehicle": "car truck toy bus object",
        "blob": "object blob thing toy shape rock",
    }.items()
}
_ADJECTIVES = "red blue green little big old young happy cute wooden brown white black fat tall robotic".split()


def draw_prompt(rng: np.random.Generator, nouns: list[str], verb: int, size: str, pace: str) -> str:
    """A sentence for an action: known and invented nouns, adverbs in varying places."""
    if rng.random() < 0.3:
        noun = "".join(chr(97 + k) for k in rng.integers(0, 26, int(rng.integers(3, 9))))
    else:
        noun = str(rng.choice(nouns))
    adjective = str(rng.choice(_ADJECTIVES)) if rng.random() < 0.2 else ""
    subject = "" if rng.random() < 0.15 else f"{rng.choice(['the', 'a', 'my'])} {adjective} {noun}"
    phrase = str(rng.choice(VERBS[verb].phrases))
    order = rng.integers(3) if not set(pace.split()) & {*SIDES, *COUNTS} else 0  # nobody says "left the fox turns"
    words = (
        f"{subject} {phrase} {size} {pace}",
        f"{subject} {size} {pace} {phrase}",
        f"{pace} {subject} {phrase} {size}",
    )[order]
    return " ".join(words.split())
