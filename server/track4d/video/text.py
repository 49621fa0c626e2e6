"""The generator's language: the verbs it has learnt, how sentences become tokens, and which words mean nothing to it.

Synonyms and inflections share a token ("gallops", "running" and "ran" are all `run`); words without a token, nouns
above all, fall into a few hash buckets, so that a sentence about a thing never seen in training reads like one that
was.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

MAX_TOKENS = 10
HASH_BUCKETS = 16


@dataclass(frozen=True)
class Verb:
    """A motion the generator has learnt.

    Attributes:
        name: as shown to users.
        phrases: in the third person singular, from which training prompts are made.
    """

    name: str
    phrases: tuple[str, ...]


VERBS: tuple[Verb, ...] = (
    Verb("walk", ("walks", "is walking", "walk")),
    Verb("run", ("runs", "is running", "run")),
    Verb("jump", ("jumps", "is jumping", "jump")),
    Verb("fly", ("flies", "is flying", "fly")),
    Verb("swim", ("swims", "is swimming", "swim")),
    Verb("flap", ("flaps", "is flapping its wings", "flaps the wings", "flap")),
    Verb("wave", ("waves", "is waving", "waves a hand", "wave")),
    Verb(
        "wag the tail",
        ("wags the tail", "is wagging its tail", "swings the tail", "is swinging its tail", "wags", "wag"),
    ),
    Verb("nod", ("nods", "is nodding its head", "is nodding", "nod")),
    Verb("look around", ("looks around", "is looking around", "look around")),
    Verb("dance", ("dances", "is dancing", "dance")),
    Verb("bounce", ("bounces", "is bouncing", "bounce")),
    Verb(
        "squash and stretch",
        ("squashes and stretches", "is squashing and stretching", "squashes", "is stretching", "squash and stretch"),
    ),
    Verb("spin", ("spins", "is spinning", "spins around", "turns around", "spin")),
    Verb("shake", ("shakes", "is shaking", "shake")),
    Verb("sway", ("sways", "is swaying", "swings", "is swinging", "sway")),
    Verb("twist", ("twists", "is twisting", "twist")),
    Verb("bend left", ("bends left", "is bending to the left", "bends to the left", "bend left")),
    Verb("bend right", ("bends right", "is bending to the right", "bends to the right", "bend right")),
    Verb("pulse", ("pulses", "is pulsing", "pulse")),
    Verb("attack", ("attacks", "is attacking", "attack", "bites", "strikes")),
    Verb("die", ("dies", "is dying", "falls over", "collapses", "die")),
    Verb("idle", ("idles", "breathes", "is waiting", "stands still", "is breathing", "idle")),
    Verb("get hit", ("gets hit", "is hit", "recoils", "flinches", "get hit")),
    Verb("punch", ("punches", "is punching", "boxes", "punch")),
    Verb("kick", ("kicks", "is kicking", "kick")),
    Verb("sit", ("sits", "sits down", "is sitting down", "sit down")),
    Verb("eat", ("eats", "is eating", "grazes", "eat")),
    Verb("roll", ("rolls", "is rolling", "tumbles", "roll")),
    Verb("crouch", ("crouches", "is crouching", "ducks", "crouch")),
    Verb("bow", ("bows", "is bowing", "takes a bow", "bow")),
    Verb("shake the head", ("shakes the head", "is shaking its head", "shakes its head", "shake the head")),
    Verb("turn", ("turns", "is turning", "turns to the side", "turn")),
    Verb("clap", ("claps", "is clapping", "claps its hands", "clap")),
)
VERB_NAMES = tuple(verb.name for verb in VERBS)

AMPLITUDES = {"slightly": 0.55, "": 1.0, "strongly": 1.5}  # word -> factor on the motion's size
SPEEDS = {"slowly": 0.5, "": 1.0, "quickly": 1.6}  # word -> factor on the motion's frequency
COUNTS = {"once": 1, "twice": 2}  # word -> how often a countable motion happens in 16 frames
SIDES = {"left": 1, "right": -1}  # word -> side of a motion that has one; left where a sentence does not say

# The word that tells real clips from designed motions; a sentence gets it unless it says "plainly", where its verb has more than
# four real clips. What was learnt from fewer doesn't carry over to other bodies.
NATURALLY = "naturally"
_NATURAL = frozenset("walk run jump fly swim attack die idle recoil punch kick sit".split())  # tokens
_PLAINLY = frozenset("plainly simply mechanically".split())

# token -> base forms of the words that share it
_VERB_WORDS = {
    "walk": "walk stroll march step stride wander tread go move pace strut trot hike amble stomp waddle crawl creep",
    "run": "run ran gallop sprint dash jog race rush hurry chase canter flee",
    "jump": "jump leap hop spring vault",
    "fly": "fly flies flew flown soar glide hover",
    "swim": "swim swam swum slither undulate wriggle snake float paddle",
    "flap": "flap flutter",
    "wave": "wave greet salute",
    "wag": "wag waggle",
    "nod": "nod agree",
    "look": "look watch peek search survey glance",
    "dance": "dance groove boogie",
    "bounce": "bounce bob",
    "squash": "squash squish squeeze squeez compress",
    "stretch": "stretch elongate",
    "spin": "spin spun rotate whirl revolve twirl pirouette",
    "shake": "shake shook tremble shiver vibrate rattle quiver wobble jitter",
    "sway": "sway swing swung rock",
    "twist": "twist wring contort",
    "bend": "bend bent curve lean tilt",
    "pulse": "pulse pulsate throb inflate swell beat",
    "attack": "attack bite strike struck lunge pounce charge maul",
    "die": "die dying collapse faint perish fall fell topple",
    "idle": "idle breathe wait stand stood rest relax",
    "recoil": "hit recoil flinch stagger",
    "punch": "punch box jab",
    "kick": "kick",
    "sit": "sit sat",
    "eat": "eat ate graze feed munch nibble chew drink",
    "roll": "roll tumble somersault",
    "crouch": "crouch duck kneel squat cower",
    "bow": "bow curtsy",
    "turn": "turn face pivot",
    "clap": "clap applaud",
}
_OTHER_WORDS = {
    "slightly": "slightly gently softly little bit subtly weakly calmly lightly",
    "strongly": "strongly wildly hard violently vigorously powerfully heavily energetically greatly happily excitedly",
    "slowly": "slowly slow lazily leisurely",
    "quickly": "quickly fast quick rapidly swiftly speedily hastily",
    "left": "left leftward leftwards",
    "right": "right rightward rightwards",
    "tail": "tail",
    "wings": "wing wings",
    "head": "head",
    "around": "around about",
    "over": "over",
    "still": "still",
    "once": "once",
    "twice": "twice",
    "naturally": "naturally natural realistically lifelike organically",
}
_LEXICON = {word: token for table in (_VERB_WORDS, _OTHER_WORDS) for token, words in table.items() for word in words.split()}
_VERB_TOKENS = frozenset(_VERB_WORDS)
TOKENS = (*_VERB_WORDS, *_OTHER_WORDS)
_TOKEN_ID = {token: k + 1 for k, token in enumerate(TOKENS)}  # 0 is padding
VOCABULARY_SIZE = 1 + len(TOKENS) + HASH_BUCKETS

_STOP_WORDS = frozenset(
    """
    a an the this that these those its it his her their my your our is are was were be been being am will would
    to of on in at with and or then while as for from by into onto up down very really quite so too please
    make makes let lets i we you he she they them him me us there here do does doing start starts starting keep
    keeps begin begins beginning just some all both each spot place forward forwards backward backwards again
    hand hands arm arms leg legs foot feet body side sides ground air water one two hat animate animated
    animation motion cycle like
    """.split()
) | _PLAINLY
_AUXILIARIES = frozenset("is are was were be being am will starts start keeps keep begins begin".split())
_DETERMINERS = frozenset("a an the this that these those its his her their my your our some all both each".split())


def _words(prompt: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", prompt.lower())


def _base_forms(word: str) -> list[str]:
    """The word and what it may be an inflection of: "running" -> running, runn, runne, run."""
    forms = [word]
    for suffix, replacement in (
        ("ies", "y"),
        ("s", ""),
        ("es", ""),
        ("ing", ""),
        ("ing", "e"),
        ("ed", ""),
        ("ed", "e"),
        ("in", ""),
    ):
        if word.endswith(suffix) and len(word) - len(suffix) >= 2:
            stem = word[: -len(suffix)] + replacement
            forms.append(stem)
            if not replacement and len(stem) > 2 and stem[-1] == stem[-2]:
                forms.append(stem[:-1])
    return forms


def _token(word: str) -> str | None:
    return next((_LEXICON[form] for form in _base_forms(word) if form in _LEXICON), None)


def _tokens(words: list[str]) -> list[str | None]:
    """The token of each word; a verb as it is behind a determiner is a noun if a verb follows ("the fly walks")."""
    tokens = [_token(word) for word in words]
    verbs = [k for k, token in enumerate(tokens) if token in _VERB_TOKENS]
    for k in verbs[:-1]:
        if k > 0 and words[k - 1] in _DETERMINERS and words[k] in _LEXICON:
            tokens[k] = None
    return tokens


def tokenise(prompt: str) -> list[int]:
    """Token ids of a sentence, `MAX_TOKENS` long, padded with 0; stop words are left out."""
    words, ids = _words(prompt), []
    for word, token in zip(words, _tokens(words)):
        if token is not None:
            ids.append(_TOKEN_ID[token])
        elif word not in _STOP_WORDS:
            ids.append(1 + len(TOKENS) + zlib.crc32(word.encode()) % HASH_BUCKETS)
    return (ids + [0] * MAX_TOKENS)[:MAX_TOKENS]


def in_manner(prompt: str) -> str:
    """The sentence in the manner of real clips, where its verb was learnt from some and it doesn't say "plainly"."""
    words = _words(prompt)
    tokens = _tokens(words)
    verb = next((token for token in tokens if token in _VERB_TOKENS), None)
    if _PLAINLY & set(words) or not (verb in _NATURAL or NATURALLY in tokens):
        return prompt
    return " ".join([NATURALLY, *(word for word, token in zip(words, tokens) if token != NATURALLY)])


def read(prompt: str) -> list[int]:
    """What the generator reads of a user's sentence: the tokens of it in its manner, `MAX_TOKENS` long."""
    return tokenise(in_manner(prompt))


def is_natural(prompt: str) -> bool:
    """Whether the generator takes a user's sentence in the manner of real clips."""
    return _TOKEN_ID[NATURALLY] in read(prompt)


def count_tokens(prompt: str) -> int:
    """How many tokens a sentence has, those that `tokenise` leaves out beyond `MAX_TOKENS` too."""
    return sum(any(tokenise(word)) for word in prompt.split())


def length_warnings(count: int, limit: int = MAX_TOKENS) -> list[dict[str, str]]:
    """A warning when a prompt has more tokens than a model reads."""
    if count <= limit:
        return []
    return [{"code": "long_prompt", "message": f"The prompt has {count} tokens, of which the model reads the first {limit}.",
             "action": "Say what happens first."}]


def known_verbs() -> list[str]:
    """The motions the generator has learnt, for messages to the user."""
    return list(VERB_NAMES)


def known_words() -> list[str]:
    """Every word with a meaning of its own, base forms only, sorted."""
    return sorted(_LEXICON)


def unknown_words(prompt: str) -> list[str]:
    """Words that should describe the motion but mean nothing to the generator, in their order.

    Nouns and adjectives are not reported: the generator sees the object in its pictures. What is
    reported: everything in the verb's place when no verb is known ("the fox is pondering", "the fox ponders"), and
    unknown words that look like a verb or an adverb beside a known one ("runs gracefully").
    """
    words = _words(prompt)
    tokens = _tokens(words)
    unknown = [k for k, word in enumerate(words) if tokens[k] is None and word not in _STOP_WORDS]
    if any(token in _VERB_TOKENS for token in tokens):
        after_determiner = {k + 1 for k, word in enumerate(words) if word in _DETERMINERS}
        reported = [k for k in unknown if words[k].endswith(("ing", "ly")) and len(words[k]) > 4 and k not in after_determiner]
        return [words[k] for k in reported]
    auxiliary = next((k for k, word in enumerate(words) if word in _AUXILIARIES), None)
    behind = [k for k in unknown if auxiliary is not None and k > auxiliary]
    if behind:
        return [words[k] for k in behind]
    return [words[k] for k in unknown[-1:]] if auxiliary is None else []
