"""Long texts in pieces of 75 tokens, against what transformers' CLIPTextModel gives by hand; and how many are cut."""

import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from finetune.conditioning import assembled
from finetune.data import open_data
from finetune.pipelines import UNetPipeline, build_pipeline
from finetune.plan import captions_line
from finetune.text_conditions import PooledText, TextSequence, with_token_facts
from test_data import TEXT, _private_caches, config, png  # noqa: F401
from tiny_models import batch, build, parts, scheduler  # noqa: F401
from tiny_models import config as tiny_config

torch.set_num_threads(1)
START, END, PADDING = 52, 53, 54
COUNTS = [0, 1, 74, 75, 76, 77, 78, 149, 150, 151, 225, 226]  # tokens of a text, without its start and end


def text_of(n: int) -> str:
    return " ".join(string.ascii_lowercase[i * i % 26] for i in range(n))


def encoder(pad: str) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """CLIP's 77 tokens; pad: "<|endoftext|>" as SD 1.x, or another token as SD 2.x."""
    letters = [c + end for c in string.ascii_lowercase for end in ("</w>", "")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>", "!"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, pad_token=pad)
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = CLIPTextModel(CLIPTextConfig(vocab_size=55, max_position_embeddings=77, bos_token_id=START,
                                         eos_token_id=END, pad_token_id=PADDING, **shape))  # fmt: skip
    return model.eval(), tokenizer


def cut_up(tokenizer: CLIPTokenizer, text: str, chunks: int) -> list[list[int]]:
    """The pieces as sd-scripts cuts them: out of one long padded text, whose ends are then mended."""
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=75 * chunks + 2).input_ids
    pieces = []
    for k in range(chunks):
        piece = [ids[0], *ids[1 + 75 * k : 76 + 75 * k], ids[-1]]
        if piece[-2] not in (END, tokenizer.pad_token_id):
            piece[-1] = END
        if piece[1] == tokenizer.pad_token_id:
            piece[1] = END
        pieces.append(piece)
    return pieces


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
@pytest.mark.parametrize("n", COUNTS)
def test_pieces_are_those_of_sd_scripts(pad, n):
    model, tokenizer = encoder(pad)
    assert tokenizer.pad_token_id == (END if pad != "!" else PADDING)
    for chunks in (1, 2, 3):
        text = TextSequence(model, tokenizer, chunks=chunks)
        assert text.tokens([text_of(n)]).tolist() == [cut_up(tokenizer, text_of(n), chunks)]
        assert text.lengths([text_of(n)]) == [n + 2] and text.longest == 75 * chunks + 2
    one = TextSequence(model, tokenizer).tokens([text_of(n)])[:, 0]
    stock = tokenizer([text_of(n)], padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(one, stock.input_ids), "one piece is what StableDiffusionPipeline reads"


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_states_by_hand(chunks):
    """Each piece alone through CLIPTextModel; the first start, the words of all pieces, the last end."""
    model, tokenizer = encoder("<|endoftext|>")
    texts = [text_of(n) for n in COUNTS]
    found = TextSequence(model, tokenizer, chunks=chunks).condition(texts)["encoder_hidden_states"]
    assert found.shape == (len(texts), 75 * chunks + 2, 8)
    for text, states in zip(texts, found, strict=True):
        alone = [model(torch.tensor([piece])).last_hidden_state[0] for piece in cut_up(tokenizer, text, chunks)]
        by_hand = torch.cat([alone[0][:1], *(piece[1:-1] for piece in alone), alone[-1][-1:]])
        assert torch.allclose(states, by_hand, atol=1e-5)
    whole, longer = found[COUNTS.index(150)], found[COUNTS.index(151)]
    assert torch.equal(whole, longer) == (chunks < 3), "the last token counts only if it is read"


def test_the_unconditional_case_and_dropout_have_the_same_shape():
    model, tokenizer = encoder("<|endoftext|>")
    text = TextSequence(model, tokenizer, chunks=2, dropout=0.5)
    empty = text.unconditional(2)["encoder_hidden_states"]
    assert empty.shape == (2, 152, 8) and torch.equal(empty, text.condition(["", ""])["encoder_hidden_states"])
    assert PooledText(model, tokenizer).condition(["a"])["class_labels"].shape == (1, 8)


def test_a_pipeline_reads_as_many_pieces_as_the_training(parts, tmp_path):  # noqa: F811
    """12 tokens here: pieces of 10. A stock pipeline would cut the prompt, so that it is not the one exported."""
    prompts = {"prompts": ["a b c d e f g h i j k l", "a b c d e f g h i j"]}
    made = {}
    for chunks in (1, 2):
        cfg = tiny_config(parts, "latent", "text", "unet2d_condition", conditioning={"chunks": chunks}, sample=prompts)
        unet, space, conditioner = build(cfg)
        made[chunks] = build_pipeline(unet, space, conditioner, scheduler(), cfg)
    assert type(made[1]).__name__ == "StableDiffusionPipeline" and isinstance(made[2], UNetPipeline)
    made[2].save_pretrained(tmp_path)
    again = UNetPipeline.from_pretrained(tmp_path)
    states = {}
    for name, pipeline in (("built", made[2]), ("loaded", again)):
        states[name] = pipeline.conditioner().condition(prompts["prompts"])["encoder_hidden_states"]
    assert torch.equal(states["built"], states["loaded"]) and states["built"].shape[1] == 22
    assert not torch.equal(states["built"][0], states["built"][1])
    one = TextSequence(again.text_encoder, again.tokenizer).condition(prompts["prompts"])["encoder_hidden_states"]
    assert torch.equal(one[0], one[1]), "negative control: in one piece both prompts are the same"
    drawn = [p(prompts["prompts"], num_inference_steps=2, output_type="pt", generator=torch.Generator().manual_seed(0))
             for p in (made[2], again)]  # fmt: skip
    assert torch.equal(drawn[0].images, drawn[1].images)


def test_how_many_are_cut_is_counted_once(caplog):
    captions = [text_of(n) for n in (3, 75, 76, 76, 151)] + [text_of(151) + " z"]
    dataset = Dataset.from_dict({"image": [{"bytes": png(n), "path": None} for n in range(6)], "text": captions})
    cfg = config("text")
    data = open_data(cfg, dataset=dataset, progress=False)
    text = PooledText(*encoder("<|endoftext|>"))
    known, texts = with_token_facts(data, assembled({"pooled_text": text}))
    facts = known.facts["captions"]
    assert texts == set(captions)
    assert (facts["texts"], facts["truncated"], facts["tokens"]) == (5, 3, {"limit": 77, "longest": 154})
    line = captions_line(known.facts, cfg)
    assert line == "3 of 5 different captions are cut to 77 tokens, the longest has 154"
    by_cross_attention = replace(cfg, model={"kind": "unet2d_condition"}, conditioning={**TEXT, "kind": "text"})
    assert captions_line(known.facts, by_cross_attention) == f"{line}; raise conditioning.chunks"
    assert "truncated" not in data.facts["captions"] and captions_line(data.facts, cfg) == "" and not caplog.records
    long = TextSequence(*encoder("<|endoftext|>"), chunks=3)
    assert with_token_facts(data, assembled({"text": long}))[0].facts["captions"]["truncated"] == 0
    assert with_token_facts(data, assembled({})) == (data, None)
    assert np.array_equal(known.rows, data.rows)
