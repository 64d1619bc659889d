"""The section of the configuration that says what is made of each caption before it is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from finetune.config_types import CountOrZero, Fraction, section


@section
class Captions:
    """What is made of each caption before it is read: words around it, and its tags shuffled and dropped.

    The order and the tags are drawn per epoch and row. With data.dataset_config, what a subset says holds for it.
    """

    trigger_word: str = ""
    """Put in front of every caption with the separator; neither shuffled nor dropped."""
    prefix: str = ""
    """Put in front of every caption with a space, so that it belongs to the first tag (sd-scripts' caption_prefix)."""
    suffix: str = ""
    """Put behind every caption with a space, so that it belongs to the last tag (sd-scripts' caption_suffix)."""
    separator: Annotated[str, Field(min_length=1)] = ","
    """What stands between tags."""
    shuffle: bool = False
    """Shuffle the tags of each caption."""
    keep_tokens: CountOrZero = 0
    """Tags at the start that are neither shuffled nor dropped."""
    keep_tokens_separator: str = ""
    """Text in a caption that ends the tags that are kept at its start, instead of keep_tokens; a second one begins
    those that are kept at its end. It is taken out."""
    tag_dropout: Fraction = 0.0
    """Share of the tags left out, each drawn for itself."""


def caption_contradictions(captions: Captions, text: bool, subsets: bool) -> Iterator[tuple[str, str]]:
    """What would do nothing, as (place, problem) pairs. text: whether captions are read. subsets: whether
    data.dataset_config may switch shuffling on."""
    if captions != Captions() and not text:
        yield "captions", "no text is among the conditions, so that captions are not read: remove the section"
        return
    varied = captions.shuffle or captions.tag_dropout or subsets
    if captions.keep_tokens and not varied:
        yield "captions.keep_tokens", "no tags are shuffled or dropped: set captions.shuffle or captions.tag_dropout"
    if captions.keep_tokens and captions.keep_tokens_separator:
        yield "captions.keep_tokens_separator", f"keep_tokens {captions.keep_tokens} says the same: give one of them"
    apart = varied or captions.trigger_word or captions.keep_tokens_separator
    if captions.separator != "," and not apart:
        yield "captions.separator", "nothing is shuffled, dropped or put in front with it: remove it"
