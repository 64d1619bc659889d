"""What is drawn of captions: their tags shuffled and dropped, as (seed, epoch, row) say; and the words around them."""

import math
from collections import Counter
from dataclasses import replace

import pytest

from finetune.captions import caption_of, whole
from finetune.config_captions import Captions
from finetune.seeding import key

TAGS = [f"tag {n}" for n in range(8)]
CAPTION = ", ".join(TAGS)
SHUFFLE = Captions(shuffle=True, keep_tokens=2)


def drawn(rules: Captions, caption: str = CAPTION, *, seed: int = 0, epochs=range(20), row: int = 3) -> list[str]:
    return [caption_of([caption], rules, seed=seed, epoch=epoch, row=row) for epoch in epochs]


def test_without_rules_a_caption_stays_as_it_is():
    odd = " a,, b ,c  \n d ||| "
    assert drawn(Captions(), odd) == [odd] * 20 and whole(odd, Captions()) == odd
    options = ["x", "y", "z"]
    for epoch in range(30):  # the draw of every run so far
        expected = options[key(7, "caption", epoch, 5) % 3]
        assert caption_of(options, Captions(), seed=7, epoch=epoch, row=5) == expected


def test_shuffling_keeps_the_tags_and_the_first_ones_in_place():
    captions = drawn(SHUFFLE)
    for caption in captions:
        tags = caption.split(", ")
        assert tags[:2] == TAGS[:2] and sorted(tags) == sorted(TAGS)
    assert len(set(captions)) > 15, "epochs differ"
    assert captions == drawn(SHUFFLE), "the same at a resume and in any process"
    assert captions != drawn(SHUFFLE, row=4) and captions != drawn(SHUFFLE, seed=1)
    assert len({caption.split(", ")[0] for caption in drawn(Captions(shuffle=True))}) > 1  # negative control


def test_every_order_is_as_likely():
    counts = Counter(drawn(Captions(shuffle=True), "a,b,c", epochs=range(3000)))
    assert len(counts) == 6
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in 1000


def test_tags_are_dropped_as_often_as_asked_each_for_itself():
    rules, n = Captions(tag_dropout=0.3, keep_tokens=2), 2000
    captions = [set(filter(None, caption.split(", "))) for caption in drawn(rules, epochs=range(n))]
    kept = {tag: sum(tag in caption for caption in captions) for tag in TAGS}
    assert [kept[tag] for tag in TAGS[:2]] == [n, n]
    five_sigma = 5 * math.sqrt(n * 0.3 * 0.7)
    assert all(abs(kept[tag] - 0.7 * n) < five_sigma for tag in TAGS[2:])
    both = sum({TAGS[2], TAGS[3]} <= caption for caption in captions)
    assert abs(both - 0.49 * n) < 5 * math.sqrt(n * 0.49 * 0.51), "independent of each other"
    sizes = Counter(len(caption) - 2 for caption in captions)
    expected = {k: n * math.comb(6, k) * 0.7**k * 0.3 ** (6 - k) for k in range(7)}
    assert sum((sizes[k] - expected[k]) ** 2 / expected[k] for k in range(7)) < 22.5  # 6 degrees: once in 1000
    assert not all(abs(kept[tag] - 0.8 * n) < five_sigma for tag in TAGS[2:])  # negative control


def test_all_or_nothing_is_dropped_at_the_ends():
    assert set(drawn(Captions(tag_dropout=1.0))) == {""}
    assert set(drawn(Captions(tag_dropout=1.0, keep_tokens=1, trigger_word="sks"))) == {"sks, tag 0"}
    assert set(drawn(Captions(tag_dropout=1e-12))) == {CAPTION}


def test_which_tags_are_dropped_does_not_depend_on_their_order():
    dropped = drawn(Captions(tag_dropout=0.5))
    both = drawn(Captions(tag_dropout=0.5, shuffle=True))
    assert [sorted(caption.split(", ")) for caption in dropped] == [sorted(caption.split(", ")) for caption in both]
    assert dropped != both


def test_words_around_a_caption():
    rules = Captions(prefix="a photo of", suffix="in the rain", trigger_word="sks")
    assert drawn(rules, "cat, dog", epochs=[0]) == ["sks, a photo of cat, dog in the rain"]
    assert whole("", rules) == "sks, a photo of in the rain" and whole("", Captions(trigger_word="sks")) == "sks"
    for caption in drawn(replace(rules, shuffle=True)):
        assert caption.startswith("sks, ")
        assert sorted(caption.split(", ")[1:]) == sorted(["a photo of tag 0", *TAGS[1:-1], "tag 7 in the rain"])


def test_a_separator_of_ones_own():
    assert whole("a; b , c;;", Captions(separator=";", shuffle=True, trigger_word="w")) == "w; a; b , c"
    assert sorted(drawn(Captions(separator=" ", shuffle=True), "a b  c")[0].split(" ")) == ["a", "b", "c"]


def test_marks_say_what_is_kept_at_both_ends():
    rules = Captions(shuffle=True, tag_dropout=0.4, keep_tokens_separator="|||")
    captions = drawn(rules, "a, b ||| c, d, e ||| f, g", epochs=range(60))
    for caption in captions:
        tags = caption.split(", ")
        assert tags[:2] == ["a", "b"] and tags[-2:] == ["f", "g"] and set(tags[2:-2]) <= {"c", "d", "e"}
    assert len(set(captions)) > 10
    assert whole("a ||| b", rules) == "a, b" and whole("a, b", rules) == "a, b"


@pytest.mark.parametrize(
    ("captions", "problem"),
    [
        ({"keep_tokens": 1}, "captions.keep_tokens: no tags are shuffled or dropped"),
        ({"separator": ";"}, "captions.separator: nothing is shuffled"),
        ({"shuffle": True, "keep_tokens": 1, "keep_tokens_separator": "|||"}, "says the same"),
        ({"separator": ""}, "at least 1 character"),
        ({"tag_dropout": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_would_do_nothing_is_refused(captions, problem):
    from test_data import config

    with pytest.raises(ValueError, match=problem):
        replace(config("text"), captions=captions)
    assert replace(config("text"), captions={"shuffle": True, "keep_tokens": 1}).captions == replace(
        SHUFFLE, keep_tokens=1
    )
    with pytest.raises(ValueError, match="captions are not read"):
        replace(config(), captions=Captions(shuffle=True))
