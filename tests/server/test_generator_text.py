"""Sentences: which words mean something, which ones are reported."""

import pytest
from track4d.video.generator import MotionGenerator
from track4d.video.text import (
    MAX_TOKENS,
    NATURALLY,
    VERBS,
    VOCABULARY_SIZE,
    count_tokens,
    in_manner,
    known_verbs,
    tokenise,
    unknown_words,
)


def test_inflections_and_synonyms_mean_the_same():
    for group in (
        ("run", "runs", "running", "gallops", "sprinting", "ran"),
        ("walk", "is walking", "strolls", "marching"),
        ("jump", "jumped", "hopping", "leaps"),
        ("fly", "flies", "flying", "soars"),
        ("wag", "wagging", "wags"),
    ):
        assert len({tuple(tokenise(words)) for words in group}) == 1, group


def test_verbs_differ():
    assert len({tuple(tokenise(verb.phrases[0])) for verb in VERBS}) == len(VERBS) >= 30


def test_every_training_phrase_is_understood():
    for verb in VERBS:
        for phrase in verb.phrases:
            assert unknown_words(f"the xyzzy {phrase}") == [], phrase


@pytest.mark.parametrize(
    "prompt, unknown",
    [
        ("the fox is running", []),
        ("the red fox runs quickly", []),
        ("a fluffy dragon is slowly flapping its wings", []),
        ("Fox running!", []),
        ("running", []),
        ("the building sways", []),
        ("the fox is pondering", ["pondering"]),
        ("the fox ponders", ["ponders"]),
        ("fox pondering", ["pondering"]),
        ("ponder", ["ponder"]),
        ("the fox is running and pondering", ["pondering"]),
        ("the fox runs gracefully", ["gracefully"]),
        ("der Fuchs rennt", ["rennt"]),
    ],
)
def test_unknown_words(prompt, unknown):
    assert MotionGenerator.unknown_words(prompt) == unknown


def test_a_noun_may_look_like_a_verb():
    assert sum(a != b for a, b in zip(tokenise("the fly walks"), tokenise("the gnu walks"))) <= 1
    assert tokenise("the rock shakes")[1] == tokenise("shakes")[0]
    assert unknown_words("the fly walks") == []


def test_tokens_are_bounded():
    ids = tokenise("a very long sentence about " + "many different unheard things " * 20)
    assert len(ids) == MAX_TOKENS and all(0 <= k < VOCABULARY_SIZE for k in ids)
    assert tokenise("") == [0] * MAX_TOKENS == tokenise("!?… 123")


def test_known_words():
    assert "gallop" in MotionGenerator.known_words()
    assert {"walk", "run", "jump", "swim", "fly", "bend left"} <= set(known_verbs())


@pytest.mark.parametrize(
    "prompt",
    ["the fox is running", "it naturally shakes its head", "the fox gets hit", "a dog runs realistically", "it spins naturally"],
)
def test_verbs_of_real_clips_are_asked_for_in_their_manner(prompt):
    said = tokenise(in_manner(prompt))
    assert said[0] == tokenise(NATURALLY)[0] and said.count(said[0]) == 1
    assert in_manner(in_manner(prompt)) == in_manner(prompt)
    assert [token for token in tokenise(prompt) if token not in (0, said[0])] == [token for token in said[1:] if token]


@pytest.mark.parametrize(
    "prompt", ["the vase spins", "it shakes its head", "the fox runs plainly", "mechanically walking", "", "the fox ponders"]
)
def test_designed_motions_are_asked_for_as_they_are(prompt):
    assert in_manner(prompt) == prompt


def test_the_manner_is_no_unknown_word():
    assert unknown_words("the fox runs plainly") == unknown_words("the fox runs naturally") == []


def test_the_word_for_the_manner_counts_among_the_tokens():
    nine = " ".join(["jumps", *(f"thing{'abcdefgh'[k]}" for k in range(8))])
    assert count_tokens(in_manner(nine)) == 10 and tokenise(in_manner(nine))[-1] == tokenise("thingh")[0]
    assert count_tokens(in_manner(nine + " plainly")) == 9
    assert count_tokens(in_manner(nine + " thingi")) == 11
