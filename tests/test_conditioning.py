"""Conditions, their dropout by position, and the one unconditional case that training and sampling share."""

import logging

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from finetune import text_conditions
from finetune.conditioning import build_conditioner
from finetune.conditions import ClassLabel
from finetune.errors import ConfigError, DataError
from finetune.seeding import PositionRandom
from finetune.text_conditions import PooledText, TextSequence
from tiny_models import LENGTH, WIDTH, batch, config, parts  # noqa: F401

TEXTS = ["a red three", "", "blue", "a red three"]


def text(parts, cls=TextSequence, **arguments):  # noqa: F811
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder")
    return cls(encoder, CLIPTokenizer.from_pretrained(parts / "tokenizer"), **arguments)


def random(positions):
    return PositionRandom(7, torch.as_tensor(positions))


def test_embeddings_are_those_of_transformers(parts):  # noqa: F811
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    ids = tokenizer(TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        output = encoder(ids)
    sequence = text(parts).condition(TEXTS)["encoder_hidden_states"]
    pooled = text(parts, PooledText).condition(TEXTS)["class_labels"]
    assert sequence.shape == (4, LENGTH, WIDTH) and pooled.shape == (4, WIDTH)
    torch.testing.assert_close(sequence, output.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(pooled, output.pooler_output, rtol=0, atol=1e-5)
    assert (pooled[0] - pooled[2]).abs().max() > 0.1, "two texts must differ"


@pytest.mark.parametrize("cls", [PooledText, TextSequence])
def test_an_embedding_does_not_depend_on_its_company_or_the_cache(parts, cls):  # noqa: F811
    many = [f"{a} {b}" for a in ("red", "blue", "green", "a") for b in ("three", "seven", "one")]
    one = text(parts, cls)
    shapes = set()  # one shape only: on other machines, larger encoders round differently in other shapes
    one.text_encoder.register_forward_pre_hook(lambda _, inputs: shapes.add(tuple(inputs[0].shape)))
    together = one.condition(many)[one.argument]
    again = one.condition(many[::-1])[one.argument].flip(0)
    alone = torch.cat([text(parts, cls).condition([each])[one.argument] for each in many])
    assert torch.equal(together, again) and torch.equal(together, alone)
    assert len(many) == 12 and shapes == {(8, LENGTH)}


def test_the_cache_is_bounded(parts, monkeypatch):  # noqa: F811
    monkeypatch.setattr(text_conditions, "CACHE_BYTES", 2 * LENGTH * WIDTH * 4)
    small = text(parts)
    first = small.condition(["a", "b", "c", "d"])
    assert len(small._cache) == 2
    assert torch.equal(small.condition(["a", "b", "c", "d"])["encoder_hidden_states"], first["encoder_hidden_states"])


def test_dropout_has_its_rate_and_belongs_to_the_position():
    conditioner = ClassLabel(3, dropout=0.1)
    positions = torch.arange(20_000)
    labels = positions % 3
    got = conditioner(batch_of_labels(positions, labels), random(positions))["class_labels"]
    dropped = got == 3
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.09 / 20_000) ** 0.5
    assert torch.equal(got[~dropped], labels[~dropped])
    part = slice(501, 901)
    again = conditioner(batch_of_labels(positions[part], labels[part]), random(positions[part]))["class_labels"]
    assert torch.equal(again, got[part])
    other = conditioner(batch_of_labels(positions, labels), random(positions + 1))["class_labels"]
    assert not torch.equal(other, got), "negative control: other positions, other dropout"


def batch_of_labels(positions, labels):
    from finetune.batching import Batch

    pixels = torch.zeros(len(positions), 1, 1, 1)
    return Batch(pixels=pixels, captions=None, class_labels=labels, rows=positions, positions=positions)


@pytest.mark.parametrize("cls", [PooledText, TextSequence])
def test_what_dropout_trains_is_what_sampling_calls_unconditional(parts, cls):  # noqa: F811
    captions = [f"caption {'abcdefghij'[i % 10]}" for i in range(40)]
    kept = text(parts, cls, dropout=0.0)(batch(range(40), captions), random(range(40)))
    half = text(parts, cls, dropout=0.5)
    got = half(batch(range(40), captions), random(range(40)))[half.argument]
    null = half.unconditional(40)[half.argument]
    dropped = (got == null).flatten(1).all(1)
    assert torch.equal(dropped, random(range(40)).uniform("condition_dropout") < 0.5)
    assert torch.equal(got[~dropped], kept[half.argument][~dropped])
    assert torch.equal(null[0], half.condition([""])[half.argument][0])
    everything = text(parts, cls, dropout=1.0)(batch(range(40), captions), random(range(40)))
    assert torch.equal(everything[half.argument], null)


def test_the_null_class_is_no_class():
    conditioner = ClassLabel(3, dropout=1.0)
    got = conditioner(batch(range(3), class_labels=[0, 1, 2]), random(range(3)))["class_labels"]
    assert torch.equal(got, conditioner.unconditional(3)["class_labels"]) and got.tolist() == [3, 3, 3]
    with pytest.raises(DataError, match=r"0\.\.2 .*got 0\.\.3"):
        conditioner(batch(range(2), class_labels=[0, 3]), random(range(2)))
    with pytest.raises(ConfigError, match="are 0..2, got 3"):
        conditioner.condition([3])


def test_truncated_captions_are_counted_and_warned_of_once(parts, caplog):  # noqa: F811
    conditioner = text(parts)
    with caplog.at_level(logging.WARNING):
        conditioner.condition(["abcdefghij", "abcdefghijk", "abcdefghijkl"])  # 10 letters and two ends fit
    assert conditioner.truncated == 2
    assert len([r for r in caplog.records if r.name == "finetune.text_conditions"]) == 1


def test_the_encoder_is_frozen_and_knows_no_autocast(parts):  # noqa: F811
    conditioner = text(parts)
    assert not conditioner.text_encoder.training
    assert not conditioner.condition(TEXTS)["encoder_hidden_states"].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        low = conditioner.condition(["red"])["encoder_hidden_states"]
    assert torch.equal(low, text(parts).condition(["red"])["encoder_hidden_states"]) and low.dtype == torch.float32


def test_build(parts):  # noqa: F811
    assert build_conditioner(config(parts)).unconditional(2) == {}
    named = build_conditioner(config(parts, condition="class_label"), ["a", "b"])
    assert (named.num_classes, named.class_names) == (3, ["a", "b"])
    pooled = build_conditioner(config(parts, condition="pooled_text"))
    assert (pooled.kind, pooled.width, pooled.dropout) == ("pooled_text", WIDTH, 0.1)
    assert pooled.parameters_frozen == sum(p.numel() for p in pooled.text_encoder.parameters())


def test_classes_must_be_known_and_enough(parts):  # noqa: F811
    with pytest.raises(ConfigError, match="num_classes is 3, but the data has 4"):
        build_conditioner(config(parts, condition="class_label"), list("abcd"))
    with pytest.raises(ConfigError, match="num_classes must be set"):
        build_conditioner(config(parts, condition="class_label", conditioning={"num_classes": None}))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"tokenizer": "{parts}/text_encoder"}, "conditioning.tokenizer: no vocabulary"),
        ({"text_encoder": "{parts}/vae"}, "conditioning.text_encoder"),
        ({"text_encoder": "{parts}/nowhere"}, "neither a folder"),
    ],
)
def test_parts_that_are_not_there_are_refused(parts, section, message):  # noqa: F811
    section = {key: value.format(parts=parts) for key, value in section.items()}
    with pytest.raises(ConfigError, match=message):
        build_conditioner(config(parts, condition="text", model_kind="unet2d_condition", conditioning=section))


def test_a_tokenizer_of_another_encoder_is_refused(parts):  # noqa: F811
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder")
    long = CLIPTokenizer.from_pretrained(parts / "tokenizer", model_max_length=77)
    with pytest.raises(ConfigError, match="model_max_length is 77, the encoder reads 12"):
        TextSequence(encoder, long)
    encoder.config.eos_token_id = 5
    with pytest.raises(ConfigError, match="ends a text with id 53, the encoder looks for 5"):
        TextSequence(encoder, CLIPTokenizer.from_pretrained(parts / "tokenizer"))
