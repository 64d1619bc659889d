"""UNets that fit their space and condition: built from a seed, or pretrained and checked."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention

from finetune.conditioning import build_conditioner
from finetune.config_choices import Pretrained, UNet2D
from finetune.errors import ConfigError
from finetune.models import bind, build_unet
from finetune.pipelines import build_pipeline
from finetune.seeding import PositionRandom
from finetune.space import build_space
from tiny_models import COMBINATIONS, CONDITION, CROSS, PROMPTS, UNET2D, WIDTH, batch, build, config, parts, scheduler  # noqa: F401


@pytest.mark.parametrize(("space_kind", "condition", "model_kind"), COMBINATIONS)
def test_every_combination_runs_on_one_code_path(parts, space_kind, condition, model_kind):  # noqa: F811
    unet, space, conditioner = build(config(parts, space_kind, condition, model_kind))
    data = batch(range(2), captions=list(PROMPTS), class_labels=[0, 2])
    random = PositionRandom(0, data.positions)
    x0 = space.encode(data.pixel_values, random)
    assert x0.shape == (2, space.channels, space.size, space.size)
    network = bind(unet, conditioner(data, random))
    output = network(x0, torch.tensor([3, 7]))
    assert output.shape == x0.shape and torch.isfinite(output).all()
    assert {p.dtype for p in unet.parameters()} == {torch.float32} and all(p.requires_grad for p in unet.parameters())
    guidance = bind(unet, conditioner.unconditional(2))(x0, torch.tensor([3, 7]))
    wanted = conditioner.condition(list(PROMPTS) if "text" in condition else [0, 2])
    wanted = bind(unet, wanted)(x0, torch.tensor([3, 7]))
    if condition == "none":
        assert torch.equal(guidance, wanted)
    else:
        assert (guidance - wanted).abs().max() > 1e-5, "the condition must matter"


def test_weights_are_a_function_of_the_seed_alone(parts):  # noqa: F811
    cfg = config(parts)
    space, conditioner = build_space(cfg), build_conditioner(cfg)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_unet(cfg, space, conditioner, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = (build_unet(cfg, space, conditioner, seed=seed) for seed in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_a_learned_variance_takes_as_many_channels_again(parts, tmp_path):  # noqa: F811
    learned = {"kind": "ddpm", "variance": {"kind": "learned_range"}}
    unet = saved(parts, tmp_path, objective=learned)
    assert (unet.config.in_channels, unet.config.out_channels) == (3, 6)
    loaded, *_ = pretrained(parts, tmp_path, objective=learned)
    assert loaded.config.out_channels == 6
    with pytest.raises(ConfigError, match="out_channels 6, .* needs 3: .* objective.variance"):
        pretrained(parts, tmp_path)


def test_class_embedding(parts):  # noqa: F811
    unet, *_ = build(config(parts, condition="class_label"))
    assert unet.config.num_class_embeds == 4 and unet.class_embedding.weight.shape[0] == 4
    unet, *_ = build(config(parts, condition="pooled_text"))
    assert (unet.config.class_embed_type, unet.config.time_embedding_dim) == ("identity", WIDTH)


def test_scale_shift_keeps_the_norm_of_the_middle_attention(parts):  # noqa: F811
    unet, *_ = build(config(parts, model={"resnet_time_scale_shift": "scale_shift"}))
    assert unet.mid_block.attentions[0].group_norm is not None


def test_zero_init_starts_as_nothing(parts):  # noqa: F811
    noise = PositionRandom(0, torch.arange(2)).normal("x", (3, 16, 16))
    for zero, condition in ((True, "none"), (True, "class_label"), (False, "none")):
        unet, *_ = build(config(parts, condition=condition, model={"zero_init": zero, "add_attention": True}))
        labels = {"class_labels": torch.tensor([0, 1])} if condition == "class_label" else {}
        output = bind(unet, labels)(noise, torch.tensor([3, 900]))
        assert output.any() != zero
        output.sum().backward()
        assert unet.conv_out.weight.grad.any(), "it must be able to leave zero"
        inner = [p for name, p in unet.named_parameters() if "conv2" in name or "to_out" in name]
        assert len(inner) == 2 * (8 + 4) and any(p.any() for p in inner) != zero


def test_number_of_heads_over_one_width_and_over_two(parts):  # noqa: F811
    """One width is stock diffusers' attention_head_dim; over two, the same weights with other heads differ."""
    heads = {"num_heads": 2, "attention_head_dim": None}
    unet, *_ = build(config(parts, model=heads))
    assert unet.config.attention_head_dim == 8 and "num_attention_heads" not in unet.config  # 16 channels attend
    two = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}
    unet, *_ = build(config(parts, model={**two, **heads}))
    attention = [m for m in unet.modules() if isinstance(m, Attention)]
    assert {(m.heads, m.inner_dim, round(m.scale**-2)) for m in attention} == {(2, 8, 4), (2, 16, 8)}
    one, *_ = build(config(parts, model={**two, "attention_head_dim": None}))
    x = (PositionRandom(0, torch.arange(2)).normal("x", (3, 16, 16)), torch.tensor([3, 900]))
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), one.parameters(), strict=True))
    assert (bind(unet, {})(*x) - bind(one, {})(*x)).abs().max() > 1e-6


def test_number_of_heads_survives_saving(parts, tmp_path):  # noqa: F811
    heads = {"num_heads": 2, "attention_head_dim": None}
    two = {"down_block_types": ["AttnDownBlock2D"] * 2, "up_block_types": ["AttnUpBlock2D"] * 2}
    unet = saved(parts, tmp_path, "pixel", "none", "unet2d", model={**two, **heads})
    loaded, *_ = pretrained(parts, tmp_path)
    x = (PositionRandom(0, torch.arange(2)).normal("x", (3, 16, 16)), torch.tensor([3, 900]))
    assert torch.equal(bind(loaded.eval(), {})(*x), bind(unet, {})(*x))


def test_default_model_has_the_parameters_of_train_unconditional(parts):  # noqa: F811
    cfg = config(parts, data={"resolution": 64})
    cfg = type(cfg)(output_dir="x", data=cfg.data, model=UNet2D())
    with torch.device("meta"):
        unet = build_unet(cfg, build_space(cfg), build_conditioner(cfg), seed=0)
        stock = UNet2DModel(
            sample_size=64,
            layers_per_block=2,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=(*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
        )
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (unet, stock)]
    assert shapes[0] == shapes[1] and sum(p.numel() for p in unet.parameters()) == 113_673_219


@pytest.mark.parametrize(
    ("model", "condition", "resolution", "message"),
    [
        ({**UNET2D, "down_block_types": ["DownBlock2D"]}, "none", 16, "down_block_types must name one block per level"),
        ({**UNET2D, "norm_num_groups": 6}, "none", 16, "norm_num_groups must divide .* 6 and 8"),
        ({**UNET2D, "num_heads": 2}, "none", 16, "num_heads .2. and model.attention_head_dim .8. both set"),
        ({**UNET2D, "num_heads": 3, "attention_head_dim": None}, "none", 16, "3 attention heads do not divide the 16"),
        ({**UNET2D, "attention_head_dim": 5}, "none", 16, "attention_head_dim must divide .* 5 and 16"),
        ({**UNET2D, "down_block_types": ["DownBlock2D", "NoBlock"]}, "none", 16, "diffusers cannot build .*NoBlock"),
        (UNET2D, "none", 15, "multiple of 2 .*got 15 .*: use 14 or 16"),
        (CROSS, "none", 16, "CrossAttnDownBlock2D reads a text sequence, but conditioning.kind is none"),
        ({**CONDITION, "mid_block_type": "UNetMidBlock2DCrossAttn"}, "class_label", 16, "UNetMidBlock2DCrossAttn"),
        (CONDITION, "text", 16, "conditioning.kind text needs cross-attention"),
        ({**UNET2D, "time_embedding_dim": 64}, "pooled_text", 16, "width of the pooled text, 16, .*got 64"),
    ],
)
def test_models_that_cannot_work_are_refused(parts, model, condition, resolution, message):  # noqa: F811
    cfg = config(parts, condition=condition, model_kind=model["kind"], model=model, data={"resolution": resolution})
    with pytest.raises(ConfigError, match=message):
        build(cfg)


def saved(parts, tmp_path, *combination, **sections):  # noqa: F811
    """A UNet of this combination saved as a pipeline saves it."""
    unet, *_ = build(config(parts, *combination, **sections))
    unet.save_pretrained(tmp_path / "unet")
    return unet


def pretrained(parts, tmp_path, *combination, subfolder="unet", **sections):  # noqa: F811
    """What build makes of a config whose model is the saved one."""
    model = Pretrained(kind="pretrained", pretrained_model_name_or_path=str(tmp_path), subfolder=subfolder)
    return build(replace(config(parts, *combination, **sections), model=model))


@pytest.mark.parametrize(("space_kind", "condition", "model_kind"), COMBINATIONS)
def test_pretrained_is_what_was_saved(parts, tmp_path, space_kind, condition, model_kind):  # noqa: F811
    unet = saved(parts, tmp_path, space_kind, condition, model_kind)
    loaded, *_ = pretrained(parts, tmp_path, space_kind, condition, model_kind)
    assert type(loaded) is type(unet)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), loaded.parameters(), strict=True))


def test_pretrained_takes_the_size_of_the_run(parts, tmp_path):  # noqa: F811
    saved(parts, tmp_path, "latent", "text", "unet2d_condition")
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_diffusers_version": "0.6.0"}))  # as SD 1.5 says
    combination = ("latent", "text", "unet2d_condition")
    unet, space, conditioner = pretrained(parts, tmp_path, *combination, data={"resolution": 32})
    cfg = config(parts, *combination, data={"resolution": 32})
    pipeline = build_pipeline(unet, space, conditioner, scheduler(), cfg)
    assert pipeline("a", num_inference_steps=1).images[0].size == (32, 32) and unet.config.sample_size == 8
    unet.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["sample_size"] == 8


@pytest.mark.parametrize(
    ("has", "wanted", "message"),
    [
        (("pixel", "none", "unet2d"), ("latent", "none", "unet2d"), "in_channels 3, x0 has 4"),
        (("pixel", "none", "unet2d"), ("pixel", "class_label", "unet2d"), "no class embedding, .* needs 4 class embed"),
        (("pixel", "class_label", "unet2d"), ("pixel", "none", "unet2d"), "4 class embeddings .* needs no class"),
        (("pixel", "pooled_text", "unet2d"), ("pixel", "class_label", "unet2d"), "class vector of width 16"),
        (("pixel", "text", "unet2d_condition"), ("pixel", "none", "unet2d"), "has cross-attention"),
        (("pixel", "none", "unet2d"), ("pixel", "text", "unet2d_condition"), "has no cross-attention"),
    ],
)
def test_pretrained_that_does_not_fit_is_refused(parts, tmp_path, has, wanted, message):  # noqa: F811
    saved(parts, tmp_path, *has)
    with pytest.raises(ConfigError, match=message):
        pretrained(parts, tmp_path, *wanted)


def test_pretrained_cross_attention_of_another_width_is_refused(parts, tmp_path):  # noqa: F811
    UNet2DConditionModel(**shape(CROSS), in_channels=3, out_channels=3, cross_attention_dim=24).save_pretrained(
        tmp_path / "unet"
    )
    with pytest.raises(ConfigError, match="reads text of width 24 .*is 16"):
        pretrained(parts, tmp_path, "pixel", "text", "unet2d_condition")


def shape(model):
    return {key: value for key, value in model.items() if key != "kind"}


def test_pretrained_that_is_not_there_or_no_unet_is_refused(parts, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match="has no folder 'unet': correct the subfolder, or set it to null"):
        pretrained(parts, tmp_path)
    with pytest.raises(ConfigError, match="holds a AutoencoderKL: only UNet2DModel and UNet2DConditionModel"):
        pretrained(parts, parts, subfolder="vae")
    with pytest.raises(ConfigError, match="no UNet2DModel could be loaded"):
        pretrained(parts, parts, subfolder="tokenizer")
