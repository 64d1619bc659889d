"""Make the tiny CLIP tokenizer and text encoder: the text part of `make_assets.py`.

The encoder is trained to know, at every position of a sequence, which digit has been named so far (or none). So the
pooled embedding at the end-of-text token tells the digits apart, and so does every later hidden state that
cross-attention may look at; words and numerals of one digit lie together, whatever stands around them.
"""

import json
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NONE = len(DIGITS)  # class of a text that names no digit
PHRASINGS = (
    "a handwritten {word}",
    "a handwritten {numeral}",
    "the digit {word}",
    "a photo of the number {word}",
    "{word}",
    "{numeral}",
)
OTHER_WORDS = (
    "a an and background black blurry bold by clear dark digit digits draw drawing drawn figure from gray grey hand "
    "handwriting handwritten image in ink is it large light messy neat number numeral of on paper pen pencil "
    "photo photograph picture please scan scanned show sketch small style that the thick thin this white with write "
    "writing written"
).split()
LENGTH = 77  # tokens, CLIP's
STEPS, BATCH, LR = 300, 48, 2e-3
CONTRAST = 10.0  # inverse temperature of the cosine between hidden state and class direction


def caption(label: int, phrasing: int) -> str:
    """The caption of digit `label` in PHRASINGS[phrasing]; the canonical one is phrasing 0, "a handwritten seven"."""
    return PHRASINGS[phrasing].format(word=DIGITS[label], numeral=label)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016), most frequent pair first, until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for word in pieces for pair in zip(word, word[1:], strict=False)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = ["".join(best)]
                at += 1
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's layout: 256 byte symbols, the same ending a word, the merges, then the two special tokens."""
    symbols = sorted(ByteLevel.alphabet())
    merges = learn_merges([*DIGITS, *OTHER_WORDS])
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    assert len(set(tokens)) == len(tokens), "two merges give one token"
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=LENGTH)


def write_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save as transformers does, and the vocab.json, merges.txt, special_tokens_map.json that older readers want."""
    tokenizer.save_pretrained(folder)
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    special = {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n", encoding="utf-8")


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A fresh two-layer CLIPTextModel of width 64 for the tokenizer."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Token ids [N,77] of `texts`, padded as Stable Diffusion pads."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids


class Texts:
    """Random texts to train on: half the phrasings of the data set, half a digit (or none) among arbitrary tokens."""

    def __init__(self, tokenizer: CLIPTokenizer, generator: torch.Generator) -> None:
        self.end, self.generator = tokenizer.eos_token_id, generator
        self.digit_of = torch.full((len(tokenizer),), NONE)
        for label, word in enumerate(DIGITS):
            self.digit_of[tokenizer.convert_tokens_to_ids([f"{word}</w>", f"{label}</w>"])] = label
        texts = [caption(label, phrasing) for label in range(10) for phrasing in range(len(PHRASINGS))]
        self.captions = tokenize(tokenizer, texts)
        plain = torch.nonzero(self.digit_of == NONE)[:, 0]
        self.plain = plain[plain < tokenizer.bos_token_id]
        self.words = tokenize(tokenizer, list(OTHER_WORDS))[:, 1]

    def integer(self, high: int) -> int:
        """A random integer in [0, high)."""
        return int(torch.randint(high, (), generator=self.generator))

    def draw(self) -> Tensor:
        """One text, ids [77]."""
        if self.integer(2):
            return self.captions[self.integer(len(self.captions))]
        ids = self.captions[0].clone()
        length = self.integer(9)
        pool = self.words if self.integer(4) else self.plain
        ids[1 : 1 + length] = pool[torch.randint(len(pool), (length,), generator=self.generator)]
        ids[1 + length :] = self.end
        if length and self.integer(6):
            spellings = torch.nonzero(self.digit_of != NONE)[:, 0]
            ids[1 + self.integer(length)] = spellings[self.integer(len(spellings))]
        return ids

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Ids [count,77], and for every position the digit named up to there, or NONE."""
        ids = torch.stack([self.draw() for _ in range(count)])
        return ids, self.digit_of[ids].cummin(dim=1).values


def train_encoder(encoder: CLIPTextModel, texts: Texts) -> None:
    """Cross-entropy of the digit named so far at every position, from the cosine to a learned direction per class."""
    directions = nn.Parameter(torch.randn(NONE + 1, encoder.config.hidden_size))
    encoder.final_layer_norm.requires_grad_(False)  # `level_features` sets it afterwards
    optimizer = torch.optim.Adam([*(p for p in encoder.parameters() if p.requires_grad), directions], lr=LR)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 50) * (1 - step / STEPS)
        ids, digits = texts.batch(BATCH)
        hidden = encoder(ids).last_hidden_state
        cosine = F.normalize(hidden, dim=-1) @ F.normalize(directions, dim=-1).T
        loss = F.cross_entropy(CONTRAST * cosine.flatten(0, 1), digits.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"text step {step}: loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def level_features(encoder: CLIPTextModel, captions: Tensor) -> None:
    """Give every feature of the pooled embedding mean 0 and std 1 over `captions`, by the last layer norm's affine."""
    pooled = encoder(captions).pooler_output
    norm = encoder.final_layer_norm
    norm.weight /= pooled.std(0)
    norm.bias.copy_((norm.bias - pooled.mean(0)) / pooled.std(0))


def make_text(out: Path) -> None:
    """Write tokenizer/ and text_encoder/."""
    tokenizer = build_tokenizer()
    write_tokenizer(tokenizer, out / "tokenizer")
    torch.manual_seed(0)
    texts = Texts(tokenizer, torch.Generator().manual_seed(1))
    encoder = build_encoder(tokenizer)
    train_encoder(encoder, texts)
    level_features(encoder.eval(), texts.captions)
    encoder.requires_grad_(True).save_pretrained(out / "text_encoder")
