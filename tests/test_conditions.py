"""Several conditions at once: their dropout, their unconditional cases, and how they enter a UNet."""


import numpy as np
import pytest
import torch
from diffusers.models.embeddings import Timesteps
from torch.nn import functional

from finetune.conditioning import Several, assembled, build_conditioner
from finetune.conditions import ClassLabel, LowRes, Single, Size, without
from finetune.config_choices import CONDITIONS
from finetune.errors import ConfigError
from finetune.models import bind, build_unet
from finetune.pipelines import UNetPipeline, build_pipeline
from finetune.sample import load_pipeline
from finetune.seeding import PositionRandom
from finetune.space import build_space
from golden_numbers import arrays, compare
from tiny_models import CONDITION, CROSS, NAMES, PROMPTS, UNET2D, WIDTH, batch, config, parts, scheduler  # noqa: F401

N = 20_000
RATES = {"class_label": 0.1, "low_res": 0.3, "size": 0.2}


class Stub(Single):
    """Embeddings that are given, dropped to zero."""

    null = "zero"

    def __init__(self, kind, name, values, dropout=0.0):
        self.kind, self.name, self.values, self.dropout = kind, name, values, dropout

    def of(self, batch, random):
        return {self.name: self.values}

    def unconditional(self, n):
        return {self.name: torch.zeros_like(self.values[:n])}


def ones(**rates):
    """A condition of ones per kind, so that a zero is a dropped one."""
    names = {"class_label": "class_labels", "low_res": "low_res", "size": "time_ids"}
    return {kind: Stub(kind, names[kind], torch.ones(N, 1), rate) for kind, rate in rates.items()}


def drawn(draws, positions, **rates):
    """Which positions lose which condition."""
    several = Several(ones(**rates), dropout_draws=draws)
    positions = torch.as_tensor(positions)
    for part in several.parts.values():
        part.values = part.values[: len(positions)]
    found = several(positions, PositionRandom(3, positions))  # of a batch the stubs read the length alone
    return torch.cat([found[name] == 0 for name in ("class_labels", "low_res", "time_ids") if name in found], dim=1)


@pytest.mark.parametrize("draws", ["joint", "independent"])
def test_dropout_has_the_joint_frequencies_of_its_draws(draws):
    dropped = drawn(draws, range(N), **RATES).double()
    rates = torch.tensor(list(RATES.values()), dtype=torch.float64)
    together = rates.min() if draws == "joint" else rates.prod()

    def near(found, rate):
        return abs(found - rate) < 4 * (rate * (1 - rate) / N) ** 0.5

    assert all(near(dropped[:, i].mean(), rate) for i, rate in enumerate(rates))
    assert near(dropped.prod(1).mean(), together)
    other = rates.prod() if draws == "joint" else rates.min()
    assert not near(dropped.prod(1).mean(), other), "negative control: the other rule is told apart"
    if draws == "joint":  # who has the lower rate is never dropped alone
        assert not (dropped[:, 0] > dropped[:, 1]).any() and not (dropped[:, 2] > dropped[:, 1]).any()


@pytest.mark.parametrize("draws", ["joint", "independent"])
def test_dropout_belongs_to_the_position_whatever_the_batch(draws):
    whole = drawn(draws, range(40), **RATES)
    pieces = [drawn(draws, range(start, stop), **RATES) for start, stop in ((0, 7), (7, 8), (8, 40))]
    assert torch.equal(torch.cat(pieces), whole)
    assert not torch.equal(drawn(draws, range(1, 41), **RATES), whole)


def test_one_condition_draws_as_it_always_did():
    rate, positions = 0.4, torch.arange(300)
    data = batch(positions, class_labels=positions % 3)
    got = ClassLabel(3, dropout=rate)(data, PositionRandom(7, positions))["class_labels"]
    old = PositionRandom(7, positions).uniform("condition_dropout") < rate
    assert torch.equal(got == 3, old)
    joint = Several({"class_label": ClassLabel(3, dropout=rate), "low_res": LowRes(channels=3, side=4)})
    assert torch.equal(joint(data, PositionRandom(7, positions))["class_labels"], got)


def test_masks_and_embeddings_of_generative_models():
    """Its GeneralConditioner with the masks that it drew: a mask per output, and zero for what is dropped."""
    golden = arrays("sgm_conditioner")
    embed = Timesteps(8, True, 0)
    table = torch.cat([torch.as_tensor(golden["class_table"]), torch.zeros(1, 4)])  # null zero: the last row
    sequence = torch.tensor([[len(text), sum(map(ord, text)) % 97] for text in golden["txt"].tolist()]).float()
    parts_ = {
        "text": Stub("text", "encoder_hidden_states", sequence[:, None].expand(-1, 3, -1), 0.3),
        "pooled_text": Stub("pooled_text", "pooled", sequence, 0.3),
        "class_label": ClassLabel(6, dropout=0.5, null="zero"),
    }
    data = batch(range(4), class_labels=torch.as_tensor(golden["cls"]))
    dropped = torch.as_tensor(golden["masks"] == 0).T  # one row per draw
    found = {}
    for i, part in enumerate(parts_.values()):
        found |= without(part.of(data, None), part.unconditional(4), dropped[:, i])
    sizes = embed(torch.as_tensor(golden["sizes"]).flatten()).reshape(4, -1)
    crops = embed(torch.as_tensor(golden["crops"]).flatten()).reshape(4, -1) * ~dropped[:, 3:]
    vector = torch.cat([found["pooled"], table[found["class_labels"]], sizes, crops], dim=1)
    compare("sgm_conditioner", "crossattn", found["encoder_hidden_states"])
    compare("sgm_conditioner", "vector", vector, floor=1.0)  # sines
    whole = {name: rows for part in parts_.values() for name, rows in part.of(data, None).items()}
    compare("sgm_conditioner", "c_crossattn", whole["encoder_hidden_states"], rtol=0)
    fully = torch.cat([whole["pooled"], table[whole["class_labels"]]], dim=1)
    compare("sgm_conditioner", "c_vector", fully, golden["c_vector"][:, :6])
    null = {name: rows for part in parts_.values() for name, rows in part.unconditional(4).items()}
    for name in ("uc_crossattn", "uc_txtonly_crossattn"):
        compare("sgm_conditioner", name, null["encoder_hidden_states"], rtol=0)
    nothing = torch.cat([null["pooled"], table[null["class_labels"]]], dim=1)
    compare("sgm_conditioner", "uc_vector", nothing, golden["uc_vector"][:, :6], rtol=0)
    kept = torch.cat([null["pooled"], table[torch.as_tensor(golden["cls"])], sizes], 1)  # guidance by the text alone
    compare("sgm_conditioner", "uc_txtonly_vector", kept, golden["uc_txtonly_vector"][:, :22], floor=1.0)


def test_sizes_are_embedded_as_in_sdxl(parts):  # noqa: F811
    golden = arrays("sgm_conditioner")
    unet, conditioner = made(parts, ["class_label", "size"])
    seen = []
    unet.add_embedding.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    condition = conditioner.condition({"class_label": [0, 1], "size": golden["sdxl_time_ids_in"]})
    bind(unet, condition)(torch.zeros(2, 3, 16, 16), torch.tensor([1, 2]))
    assert seen[0].shape == (2, 1536)
    # The sine of 1344 in float32: its argument is 1e-4 off if its frequency is in the last bit.
    compare("sgm_conditioner", "sdxl_time_ids_256", seen[0], rtol=1e-4, floor=1.0)


def test_the_small_image_is_that_of_improved_diffusion():
    golden = {name: torch.as_tensor(array) for name, array in arrays("iddpm_data").items()}
    large = torch.stack([golden[f"out_{i}"] for i in sorted({k[4:] for k in golden if k.startswith("out_")})])
    data = batch(range(3))
    low_res = LowRes(channels=3, side=4).of(replaced(data, pixels=large), None)
    compare("iddpm_data", "low_res_area_4", low_res["low_res"], rtol=0)
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, t):
            seen.append(x)
            return type("Out", (), {"sample": x[:, :3]})

    from finetune import models

    x_t = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "set_heads", lambda unet: None)
        patch.setattr(models, "extract_model_from_parallel", lambda unet: unet)
        assert torch.equal(bind(Net(), low_res)(x_t, torch.tensor([1])), x_t)
    assert torch.equal(seen[0][:, :3], x_t)
    compare("iddpm_data", "low_res_up_bilinear_16", seen[0][:, 3:], rtol=0)


def replaced(data, **fields):
    from dataclasses import replace

    return replace(data, **fields)


def test_noise_augmentation_has_its_level_and_belongs_to_the_position():
    data = replaced(batch(range(400)), pixels=torch.zeros(400, 3, 16, 16))
    part = LowRes(channels=3, side=8, noise_augmentation=0.4)
    noisy = part.of(data, PositionRandom(1, data.positions))["low_res"]
    stds = noisy.flatten(1).std(1)
    levels = PositionRandom(1, data.positions).uniform("low_res_noise_level") * 0.4
    assert (stds - levels).abs().max() < 0.06 and abs(float(stds.mean()) - 0.2) < 0.02
    again = part.of(replaced(data, pixels=torch.zeros(5, 3, 16, 16)), PositionRandom(1, data.positions[9:14]))
    assert torch.equal(again["low_res"], noisy[9:14])
    assert not LowRes(channels=3, side=8).of(data, PositionRandom(1, data.positions))["low_res"].any()


@pytest.mark.parametrize("shape", [(1, 3, 6, 6), (1, 3, 8, 4), (1, 1, 4, 4), (1, 3, 2, 2)])
def test_small_images_of_another_shape_are_refused(shape):
    with pytest.raises(ConfigError, match="must be 4x4 pixels, or square and a whole multiple"):
        LowRes(channels=3, side=4).condition(torch.zeros(shape))
    assert LowRes(channels=3, side=4).condition(torch.ones(1, 3, 12, 12))["low_res"].shape == (1, 3, 4, 4)


# -- in a UNet ---------------------------------------------------------------------------------------------------------


def several(parts, kinds, space_kind="pixel", *, model=None, rates=None, **more):  # noqa: F811
    """A config of these conditions in a model that takes them."""
    text = {"text_encoder": str(parts / "text_encoder"), "tokenizer": str(parts / "tokenizer")}
    sections = {"class_label": {"num_classes": 3}, "pooled_text": text, "text": text, "low_res": {}, "size": {}}
    chosen = {kind: sections[kind] | {"condition_dropout": (rates or {}).get(kind, 0.1)} for kind in kinds}
    small = {"class_label", "low_res"} >= set(kinds)
    shape = model or (CROSS if "text" in kinds else UNET2D if small else CONDITION)
    prompts = PROMPTS if {"text", "pooled_text"} & set(kinds) and "low_res" not in kinds else ()
    section = {"kind": "several", **chosen}
    return config(parts, space_kind, conditioning=section, model=shape, sample={"prompts": prompts}, **more)


def made(parts, kinds, **more):  # noqa: F811
    cfg = several(parts, kinds, **more)
    conditioner = build_conditioner(cfg, NAMES)
    return build_unet(cfg, build_space(cfg), conditioner, seed=0).eval(), conditioner


COMBINATIONS = [
    ["class_label", "low_res"],
    ["class_label", "pooled_text"],
    ["class_label", "text", "size"],
    ["pooled_text", "text"],
    ["pooled_text", "text", "size"],
    ["class_label", "pooled_text", "text", "low_res", "size"],
    ["size"],
]


def wanted(kinds, n=2):
    values = {"class_label": [0, 2], "size": [(16, 16, 0, 0, 16, 16), (64, 32, 8, 0, 16, 16)]}
    values |= {"low_res": torch.linspace(-1, 1, 96).reshape(2, 3, 4, 4)}
    values |= {"text": list(PROMPTS), "pooled_text": list(PROMPTS)}
    return {kind: values[kind][:n] for kind in kinds}


@pytest.mark.parametrize("space_kind", ["pixel", "latent"])
@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_each_condition_of_several_matters(parts, kinds, space_kind):  # noqa: F811
    unet, conditioner = made(parts, kinds, space_kind=space_kind)
    assert list(conditioner.parts) == [kind for kind in CONDITIONS if kind in kinds]
    side, channels = (16, 3) if space_kind == "pixel" else (4, 4)
    assert unet.config.in_channels == channels + 3 * ("low_res" in kinds) and unet.config.out_channels == channels
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    asked = wanted(kinds)
    condition = conditioner.condition(asked if len(kinds) > 1 else asked[kinds[0]])
    null = conditioner.unconditional(2)
    assert condition.keys() == null.keys()
    with torch.no_grad():
        full = bind(unet, condition)(x, torch.tensor([3, 7]))
        for name in condition:
            one_less = bind(unet, condition | {name: null[name]})(x, torch.tensor([3, 7]))
            assert (one_less - full).abs().max() > 1e-6, name


@pytest.mark.parametrize("kinds", COMBINATIONS, ids="+".join)
def test_what_dropout_trains_is_what_sampling_calls_unconditional(parts, kinds):  # noqa: F811
    _, conditioner = made(parts, kinds, rates=dict.fromkeys(kinds, 1.0))
    data = replaced(
        batch(range(2), captions=list(PROMPTS), class_labels=[0, 2]), time_ids=torch.ones(2, 6), small=None
    )
    trained = conditioner(data, PositionRandom(0, data.positions))
    null = conditioner.unconditional(2)
    asked = wanted(kinds)
    guided = conditioner.guided_from(conditioner.condition(asked if len(kinds) > 1 else asked[kinds[0]]))
    assert trained.keys() == null.keys()
    assert all(torch.equal(trained[name], null[name]) and torch.equal(guided[name], null[name]) for name in null)


def test_guidance_keeps_what_training_never_dropped(parts):  # noqa: F811
    _, conditioner = made(parts, ["class_label", "low_res"], rates={"class_label": 0.1, "low_res": 0.0})
    condition = conditioner.condition(wanted(["class_label", "low_res"]))
    guided = conditioner.guided_from(condition)
    assert torch.equal(guided["low_res"], condition["low_res"]) and guided["class_labels"].tolist() == [3, 3]
    assert not conditioner.unconditional(2)["low_res"].any()


def test_a_text_encoder_of_two_conditions_is_loaded_once(parts):  # noqa: F811
    _, conditioner = made(parts, ["pooled_text", "text"])
    assert conditioner.parts["text"].text_encoder is conditioner.parts["pooled_text"].text_encoder
    assert conditioner.parameters_frozen == conditioner.parts["text"].parameters_frozen


@pytest.mark.parametrize(
    ("kinds", "model", "message"),
    [
        (["class_label", "pooled_text"], UNET2D, "one class embedding, for either class_label or pooled_text"),
        (["class_label", "size"], UNET2D, "no embedding of sizes"),
        (["class_label", "text"], UNET2D, "no cross-attention"),
        ([], UNET2D, "needs at least one of class_label"),
    ],
)
def test_what_a_unet_cannot_take_is_refused_before_torch(parts, kinds, model, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        several(parts, kinds, model=model)


def test_zero_classes_stay_zero_and_frozen_classes_stay(parts, tmp_path):  # noqa: F811
    section = {"null": "zero", "condition_dropout": 0.5}
    cfg = config(parts, condition="class_label", conditioning=section)
    unet, conditioner = rebuilt(cfg)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1, weight_decay=0.1)
    before = unet.class_embedding.weight.detach().clone()
    for _ in range(2):
        labels = {"class_labels": torch.tensor([0, 3, 3, 1])}
        bind(unet, labels)(x, torch.tensor([1, 2, 3, 4])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = unet.class_embedding.weight
    assert not weight[3].any() and (weight[0] - before[0]).abs().max() > 0.01
    unet.save_pretrained(tmp_path / "unet")
    again, _ = rebuilt(replaced(cfg, model=pretrained(tmp_path)))
    assert again.class_embedding.padding_idx == 3 and torch.equal(again.class_embedding.weight, weight)
    fixed, _ = rebuilt(config(parts, condition="class_label", conditioning={"trainable": False}))
    assert [name for name, p in fixed.named_parameters() if not p.requires_grad] == ["class_embedding.weight"]
    index, _ = rebuilt(config(parts, condition="class_label"))
    assert index.class_embedding.weight[3].any(), "negative control: an index is learned"
    index.save_pretrained(tmp_path / "unet")
    with pytest.raises(ConfigError, match='learned an embedding for "no class"'):
        rebuilt(replaced(cfg, model=pretrained(tmp_path)))


def pretrained(folder):
    from finetune.config_choices import Pretrained

    return Pretrained(kind="pretrained", pretrained_model_name_or_path=str(folder))


def rebuilt(cfg):
    conditioner = build_conditioner(cfg, NAMES)
    return build_unet(cfg, build_space(cfg), conditioner, seed=0), conditioner


@pytest.mark.parametrize("kinds", [k for k in COMBINATIONS if k != ["size"]], ids="+".join)
def test_a_pretrained_unet_must_have_the_same_conditions(parts, tmp_path, kinds):  # noqa: F811
    unet, _ = made(parts, kinds)
    unet.save_pretrained(tmp_path / "unet")
    cfg = several(parts, kinds)
    again, _ = rebuilt(replaced(cfg, model=pretrained(tmp_path)))
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))
    other = several(parts, kinds[1:])
    with pytest.raises(ConfigError, match="the pretrained UNet has|a UNet2DModel has"):
        rebuilt(replaced(other, model=pretrained(tmp_path)))


@pytest.mark.parametrize("model", [UNET2D, CONDITION])
def test_a_pretrained_unet_without_room_for_small_images_gets_it(parts, tmp_path, model):  # noqa: F811
    plain = build_unet(cfg := config(parts, model=model), build_space(cfg), build_conditioner(cfg), seed=0).eval()
    plain.save_pretrained(tmp_path / "unet")
    wide, conditioner = rebuilt(replaced(config(parts, condition="low_res"), model=pretrained(tmp_path)))
    assert wide.config.in_channels == wide.conv_in.in_channels == 6
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    low_res = conditioner.condition(wanted(["low_res"])["low_res"])
    with torch.no_grad():
        a, b = bind(plain, {})(x, torch.tensor([1, 2])), bind(wide.eval(), low_res)(x, torch.tensor([1, 2]))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    bind(wide, low_res)(x, torch.tensor([1, 2])).sum().backward()
    assert wide.conv_in.weight.grad[:, 3:].any(), "it can learn to read them"


# -- pipelines ---------------------------------------------------------------------------------------------------------


def call(kinds, n=2):
    given = {"class_labels": [0, 2], "prompt": list(PROMPTS), "image": torch.linspace(0, 1, 96).reshape(2, 3, 4, 4)}
    names = {"class_label": "class_labels", "text": "prompt", "pooled_text": "prompt", "low_res": "image"}
    return {names[kind]: given[names[kind]][:n] for kind in kinds if kind in names} or {"batch_size": n}


@pytest.mark.parametrize("kinds", [*COMBINATIONS, ["low_res"]], ids="+".join)
def test_a_pipeline_reloads_and_draws_the_same(parts, tmp_path, kinds):  # noqa: F811
    space_kind = "latent" if "text" in kinds else "pixel"
    cfg = several(parts, kinds, space_kind, rates={"low_res": 0.0, "size": 0.0} if len(kinds) > 1 else {})
    conditioner = build_conditioner(cfg, NAMES)
    space = build_space(cfg)
    unet = build_unet(cfg, space, conditioner, seed=0).eval()
    pipeline = build_pipeline(unet, space, conditioner, scheduler(), cfg)
    assert isinstance(pipeline, UNetPipeline) and pipeline.config.conditioning == "+".join(conditioner.parts)
    pipeline.save_pretrained(tmp_path / "p")
    again = load_pipeline(str(tmp_path / "p"))
    images = []
    for one in (pipeline, again):
        one.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        draw = {"num_inference_steps": 2, "output_type": "np", "generator": generators, "guidance_scale": 3.0}
        images.append(one(**call(kinds), **draw).images)
    assert images[0].shape == (2, 16, 16, 3) and np.abs(images[0] - images[1]).max() < 1e-6
    assert again.conditioner().guided_from is not None and again.config.dropped == pipeline.config.dropped


def test_the_unconditional_half_of_guidance_keeps_the_small_image(parts):  # noqa: F811
    cfg = several(parts, kinds := ["class_label", "low_res"], rates={"class_label": 0.1, "low_res": 0.0})
    conditioner = build_conditioner(cfg, NAMES)
    unet = build_unet(cfg, space := build_space(cfg), conditioner, seed=0).eval()
    pipeline = build_pipeline(unet, space, conditioner, scheduler(), cfg)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    unet.register_forward_pre_hook(lambda _, inputs, named: seen.append((inputs[0], named)), with_kwargs=True)
    pipeline(**call(kinds), num_inference_steps=1, guidance_scale=2.0)
    x, named = seen[0]
    assert named["class_labels"].tolist() == [3, 3, 0, 2] and torch.equal(x[:2], x[2:]) and x[0, 3:].any()
    small = wanted(kinds)["low_res"]
    torch.testing.assert_close(x[:2, 3:], functional.interpolate(small, 16, mode="bilinear"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": [0, 1]}, "needs image"),
        ({"class_labels": [0, 1], "image": torch.zeros(3, 3, 4, 4)}, "must be the number of class_labels"),
        ({"class_labels": 0, "image": torch.zeros(3, 5, 5)}, "must be 4x4 pixels"),
        ({"class_labels": 0, "image": 3 + torch.zeros(3, 4, 4)}, r"must lie in \[0, 1\], got 3"),
        ({"class_labels": 0, "image": ["small.png"]}, "PIL images or tensors, got str"),
        ({"class_labels": 0, "image": torch.zeros(3, 4, 4), "prompt": "a"}, "takes class_labels and image .* not prom"),
        ({"class_labels": 0, "image": torch.zeros(3, 4, 4), "target_size": (4, 4)}, "takes no sizes"),
    ],
)
def test_contradicting_calls_are_refused(parts, arguments, message):  # noqa: F811
    cfg = several(parts, ["class_label", "low_res"])
    conditioner = build_conditioner(cfg, NAMES)
    unet = build_unet(cfg, space := build_space(cfg), conditioner, seed=0)
    with pytest.raises(ConfigError, match=message):
        build_pipeline(unet, space, conditioner, scheduler(), cfg)(**arguments)


def test_sizes_of_a_call_are_those_of_the_image_unless_given(parts):  # noqa: F811
    cfg = several(parts, ["class_label", "size"])
    conditioner = build_conditioner(cfg, NAMES)
    unet = build_unet(cfg, space := build_space(cfg), conditioner, seed=0)
    pipeline = build_pipeline(unet, space, conditioner, scheduler(), cfg)
    pipeline.set_progress_bar_config(disable=True)
    seen = []
    unet.register_forward_pre_hook(lambda _, a, named: seen.append(named["added_cond_kwargs"]), with_kwargs=True)
    pipeline(class_labels=1, num_inference_steps=1)
    pipeline(class_labels=1, num_inference_steps=1, original_size=(64, 32), crops_coords_top_left=(2, 3))
    assert [s["time_ids"].tolist() for s in seen] == [[[16, 16, 0, 0, 16, 16]], [[64, 32, 2, 3, 16, 16]]]
    assert seen[0]["text_embeds"].shape == (1, 0)


def test_assembled_is_none_one_or_several():
    label, size = ClassLabel(3), Size()
    assert assembled({}).kind == "none" and assembled({"size": size}) is size
    assert assembled({"size": size, "class_label": label}).kind == "class_label+size"


def test_width_of_the_added_embedding(parts):  # noqa: F811
    unet, _ = made(parts, ["pooled_text", "text", "size"])
    assert unet.config.addition_embed_type == "text_time" and unet.config.class_embed_type is None
    assert unet.config.projection_class_embeddings_input_dim == WIDTH + 6 * 256
    alone, _ = made(parts, ["pooled_text", "text"])
    assert (alone.config.addition_embed_type, alone.config.class_embed_type) == (None, "projection")
