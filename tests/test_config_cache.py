"""What can be cached and what not: said when the configuration is read, with the way out."""

import pytest
from pydantic import TypeAdapter, ValidationError

from finetune.config import TrainConfig
from finetune.config_io import dump, load, load_text
from finetune.provenance import published_config

TYPE = TypeAdapter(TrainConfig)
LATENT = {"kind": "latent", "vae": "some/vae"}
TEXT = {"kind": "pooled_text", "text_encoder": "some/clip", "tokenizer": "some/clip"}


def config(**sections) -> TrainConfig:
    data = {"resolution": 8, "center_crop": True, "train_data_dir": "pictures"} | sections.pop("data", {})
    return TYPE.validate_python({"output_dir": "run", "data": data, **sections})


def refusal(**sections) -> str:
    with pytest.raises(ValidationError) as raised:
        config(**sections)
    return str(raised.value)


def test_nothing_is_cached_unless_it_is_asked_for():
    cfg = config()
    assert not cfg.cache.latents and not cfg.cache.text and cfg.data.variants is None
    assert config(space=LATENT, cache={"latents": True}).cache.stored_dtype == "float16"


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"cache": {"latents": True}}, "space.kind is pixel, which has no latents"),
        (
            {"cache": {"latents": True}, "space": LATENT, "data": {"center_crop": False}},
            "set data.variants to the number of them that each image gets",
        ),
        (
            {"cache": {"latents": True}, "space": LATENT, "data": {"random_flip": True}},
            "set data.variants",
        ),
        (
            {"cache": {"latents": True}, "space": LATENT,
             "data": {"streaming": True, "dataset_name": "some/data", "train_data_dir": None}},
            "remove data.streaming, or the cache",
        ),
        (
            {"cache": {"latents": True}, "space": LATENT, "conditioning": {"kind": "low_res", "factor": 2}},
            "reads the pixels of each image",
        ),
        ({"cache": {"text": True}}, "there is no text among the conditions"),
        ({"cache": {"dtype": "float32"}}, "cache.dtype is float32, but nothing is cached"),
        ({"cache": {"folder": "caches"}}, "cache.folder is caches, but nothing is cached"),
        ({"data": {"variants": 4}}, "makes the same of an image in every epoch: remove it"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(sections, words):
    assert words in refusal(**sections)


@pytest.mark.parametrize(
    "data",
    [
        {"center_crop": False, "variants": 4},
        {"random_flip": True, "variants": 2},
        {"center_crop": False, "preparation": "iddpm"},
        {"center_crop": True},
    ],
)
def test_latents_of_a_fixed_number_of_preparations_are_cached(data):
    cfg = config(space=LATENT, conditioning=TEXT, sample={"prompts": ["a"]}, data=data,
                 cache={"latents": True, "text": True, "folder": "/some/where/caches"})  # fmt: skip
    assert load_text(dump(cfg)) == cfg
    assert published_config(cfg).cache.folder == "caches"


def test_the_flag_of_diffusers():
    words = "--output_dir run --resolution 8 --center_crop --pretrained_vae_model_name_or_path some/vae --cache_latents"
    assert load(f"{words} --train_data_dir pictures".split()).cache.latents
