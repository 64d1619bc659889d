"""The caption of a row in an epoch: one of several drawn, words put around it, its tags shuffled and dropped.

What is drawn is a function of (seed, epoch, row): see `seeding`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finetune.config_captions import Captions
from finetune.seeding import key, permutation

Tags = list[str]


def caption_of(options: Sequence[str], rules: Captions, *, seed: int, epoch: int, row: int) -> str:
    """The caption of a row in an epoch; options: those that one is drawn from, at least one.

    Without rules it is the option as it stands. If tags are shuffled or dropped, they are stripped of white space, and
    empty ones are taken out.
    """
    caption = options[key(seed, "caption", epoch, row) % len(options)]

    def drawn(tags: Tags) -> Tags:
        places: Sequence[int] = range(len(tags))
        if rules.shuffle:
            places = permutation(seed, f"order of tags in row {row}", epoch, len(tags))
        if rules.tag_dropout:  # by a tag's place in the caption, so that shuffling does not change which are dropped
            places = [i for i in places if key(seed, "tag dropout", epoch, row, i) >= rules.tag_dropout * 2**64]
        return [tags[i] for i in places]

    return _worded(caption, rules, drawn)


def whole(caption: str, rules: Captions) -> str:
    """The longest text that `caption_of` makes of a caption: with all of its tags, in their order."""
    return _worded(caption, rules, lambda tags: tags)


def _worded(caption: str, rules: Captions, vary: Callable[[Tags], Tags]) -> str:
    glue = f"{rules.separator.rstrip()} "
    caption = " ".join(filter(None, (rules.prefix, caption, rules.suffix)))
    if rules.shuffle or rules.tag_dropout or rules.keep_tokens_separator:
        head, tags, tail = _parts(caption, rules)
        caption = glue.join([*head, *vary(tags), *tail])
    return glue.join(filter(None, (rules.trigger_word, caption)))


def _parts(caption: str, rules: Captions) -> tuple[Tags, Tags, Tags]:
    """The tags that stay at the start, those that vary, and those that stay at the end."""

    def split(text: str) -> Tags:
        return [tag for each in text.split(rules.separator) if (tag := each.strip())]

    if rules.keep_tokens_separator and rules.keep_tokens_separator in caption:
        head, _, rest = caption.partition(rules.keep_tokens_separator)
        tags, _, tail = rest.partition(rules.keep_tokens_separator)
        return split(head), split(tags), split(tail)
    tags = split(caption)
    return tags[: rules.keep_tokens], tags[rules.keep_tokens :], []
