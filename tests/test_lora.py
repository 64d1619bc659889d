"""LoRA: what it computes, what it trains, and that nothing else changes."""

import copy
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from finetune import checkpoint
from finetune.autoguidance import load_guide
from finetune.config_io import dump, load, load_text
from finetune.config_lora import Lora
from finetune.errors import ConfigError
from finetune.evaluate import load_subject
from finetune.lora import add_lora, base_dtype, has_adapter, hold_base, load_trained_state, merge, trained_state
from finetune.plan import adapter_line, checkpoints_line, model_line
from finetune.sample import load_pipeline
from finetune.trainer import Trainer
from forked import last_step, log, metrics, run, state, whole
from tiny import config, steps
from tiny_models import LENGTH, WIDTH, build, parts  # noqa: F401
from tiny_models import config as tiny_config

LORA = {"rank": 2, "target": "all", "dropout": 0.1}
STEPS = 9


def unet_of(parts, kind):  # noqa: F811
    """A tiny UNet in evaluation mode and the arguments of one call."""
    condition = "text" if kind == "unet2d_condition" else "none"
    unet, *_ = build(tiny_config(parts, condition=condition, model_kind=kind))
    generator = torch.Generator().manual_seed(1)
    arguments = {"sample": torch.randn(2, 3, 16, 16, generator=generator), "timestep": torch.tensor([3, 700])}
    if condition == "text":
        arguments["encoder_hidden_states"] = torch.randn(2, LENGTH, WIDTH, generator=generator)
    return unet, arguments


def hashes(module):
    """The bytes of every tensor but those of an adapter, by its name without one."""
    return {
        name.replace(".base_layer", ""): tensor.numpy().tobytes()
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


@pytest.mark.parametrize("kind", ["unet2d", "unet2d_condition"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "use_rslora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("target", ["attention", "attention_ff", "all"])
@torch.no_grad()
def test_at_first_it_computes_what_the_base_does(parts, kind, target, lora):  # noqa: F811
    unet, arguments = unet_of(parts, kind)
    before, weights = unet(**arguments).sample, hashes(unet)
    cfg = Lora(rank=2, target=target, **lora)
    if (kind, target) == ("unet2d", "attention_ff"):
        with pytest.raises(ConfigError, match=r"lora\.target attention_ff: the UNet2DModel has no layer ff\.net\.0"):
            add_lora(unet, cfg, seed=0)
        return
    drawn = torch.random.get_rng_state()
    add_lora(unet, cfg, seed=0)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(unet(**arguments).sample, before)
    assert hashes(unet) == weights
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trained and trained.keys() == trained_state(unet).keys()
    assert {p.dtype for p in trained.values()} == {torch.float32}
    for name, p in trained.items():  # negative control: with B set, it computes something else
        p.add_(0.1 * (".lora_B." in name))
    assert (unet(**arguments).sample - before).abs().max() > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
@torch.no_grad()
def test_a_layer_is_w_plus_s_b_a(parts, rslora):  # noqa: F811
    unet, arguments = unet_of(parts, "unet2d")
    plain = copy.deepcopy(unet)
    add_lora(unet, Lora(rank=4, alpha=6, target="all", use_rslora=rslora), seed=0)
    scale = 6 / 4**0.5 if rslora else 6 / 4
    generator, kinds = torch.Generator().manual_seed(2), set()
    for name, layer in unet.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.copy_(torch.randn(b.shape, generator=generator) / 50)
        weight = plain.get_submodule(name).weight
        weight += scale * (b.flatten(1) @ a.flatten(1)).view_as(weight)  # of a convolution, B is one of 1x1
        kinds.add(type(layer.get_base_layer()).__name__)
    assert kinds == {"Linear", "Conv2d"}
    expected = plain(**arguments).sample
    torch.testing.assert_close(unet(**arguments).sample, expected, rtol=1e-4, atol=1e-5)
    whole_unet = copy.deepcopy(unet)
    merge(whole_unet)
    torch.testing.assert_close(whole_unet(**arguments).sample, expected, rtol=1e-4, atol=1e-5)
    assert not has_adapter(whole_unet) and whole_unet.state_dict().keys() == plain.state_dict().keys()
    assert has_adapter(unet) and not hasattr(whole_unet, "peft_config")


def test_under_autocast_a_base_in_half_precision_computes_the_same_bits(parts):  # noqa: F811
    unet, arguments = unet_of(parts, "unet2d_condition")
    generator = torch.Generator().manual_seed(2)
    for parameter in unet.parameters():  # new norms are ones and zeros, which bfloat16 has
        parameter.data += torch.randn(parameter.shape, generator=generator) / 10
    add_lora(unet, Lora(target="all"), seed=0)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.1

    def step():
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(**arguments).sample
        gradients = torch.autograd.grad(output.float().square().mean(), list(trained.values()))
        return [output, *gradients]

    exact = step()
    hold_base(unet, torch.bfloat16)
    assert unet.dtype == torch.float32 and base_dtype(unet) == torch.bfloat16
    assert {p.dtype for p in trained.values()} == {torch.float32}
    held = [p for p in unet.parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in held) > 0.9 * sum(p.numel() for p in unet.parameters() if not p.requires_grad)
    assert all(map(torch.equal, step(), exact))
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.to(torch.bfloat16)
    assert not torch.equal(step()[0], exact[0]), "negative control"
    with pytest.raises(ConfigError, match=r"lora\.base_dtype: float16 has no room for the weights of .*conv2"):
        unet.mid_block.resnets[0].conv2.get_base_layer().weight.data[0, 0, 0, 0] = 1e5
        hold_base(unet, torch.float16)


def test_first_weights_are_a_function_of_the_seed(parts):  # noqa: F811
    def first(seed):
        unet, _ = unet_of(parts, "unet2d")
        torch.manual_seed(seed + 5)  # must not matter
        add_lora(unet, Lora(), seed=seed)
        return trained_state(unet)

    one, again, other = first(0), first(0), first(1)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if ".lora_A." in name)
    assert all(not one[name].any() for name in one if ".lora_B." in name)


def test_what_would_learn_nothing_is_refused(parts, tmp_path):  # noqa: F811
    unet, _ = unet_of(parts, "unet2d")
    with torch.no_grad():
        unet.conv_in.weight[:, 2] = 0  # as of channels that a pretrained UNet was given
    for target in ("attention", "all"):
        with pytest.raises(ConfigError, match="widened for a condition that it does not know"):
            add_lora(unet, Lora(target=target), seed=0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False}
    unet, *_ = build(tiny_config(parts, model_kind="unet2d", model=blocks))
    with pytest.raises(ConfigError, match=r"lora\.target attention: the UNet2DModel has no layer to_q: use all"):
        add_lora(unet, Lora(), seed=0)
    for sections, words in [
        ({"model": {"zero_init": True}}, r"model\.zero_init: .* learns nothing"),
        ({"ema": {"relative_widths": [0.1], "snapshot_every": 4}}, r"ema\.snapshot_every"),
    ]:
        with pytest.raises(ValueError, match=words):
            config(tmp_path, lora=LORA, **sections)
        config(tmp_path, **sections)


def test_another_adapter_does_not_load(parts):  # noqa: F811
    unet, other = unet_of(parts, "unet2d")[0], unet_of(parts, "unet2d")[0]
    add_lora(unet, Lora(), seed=0)
    add_lora(other, Lora(target="all"), seed=1)
    with pytest.raises(RuntimeError, match=r"names differ, such as conv_in\.lora_A"):
        load_trained_state(unet, trained_state(other))
    load_trained_state(other, trained_state(copy.deepcopy(other)))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", None),
        ("--lora {}", Lora()),
        ("--lora.rank 8", Lora(rank=8)),
        ("--rank 16 --lora_alpha 8 --lora_dropout 0.1 --use_dora", Lora(rank=16, alpha=8, dropout=0.1, use_dora=True)),
        ("--config RECIPE", Lora(rank=2)),
        ("--config RECIPE --rank 3", Lora(rank=3)),
        ("--config RECIPE --lora null", None),
    ],
)
def test_options_switch_it_on_and_off(tmp_path, options, expected):
    (tmp_path / "recipe.yaml").write_text("lora: {rank: 2}\n")
    base = ["--train_data_dir", "x", "--output_dir", "y", "--resolution", "64"]
    cfg = load([*base, *options.replace("RECIPE", str(tmp_path / "recipe.yaml")).split()], env={})
    assert cfg.lora == expected and load_text(dump(cfg)) == cfg


def test_scale():
    plain, half, stable = Lora(rank=16), Lora(rank=16, alpha=8), Lora(rank=16, alpha=8, use_rslora=True)
    assert [plain.scale, half.scale, stable.scale] == [1, 0.5, 2]
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"target": "conv"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Lora(**wrong)


# ----------------------------------------------------------------------------------------------------------- training


def trainer_of(folder, **sections):
    sections = {"lora": {"rank": 2}, **sections}
    return Trainer(config(folder, **sections))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_matrix_changes_and_the_base_does_not(tmp_path, precision):
    def body(cfg):
        trainer = Trainer(cfg)
        before = hashes(trainer.modules.unet)
        adapter = {name: p.clone() for name, p in trained_state(trainer.modules.unet).items()}
        assert {p.dtype for p in trainer.parameters.values()} == {torch.float32}
        steps(trainer, 5)
        assert hashes(trainer.modules.unet) == before
        after = trained_state(trainer.modules.unet)
        assert len(after) > 90 and not any(torch.equal(after[name], adapter[name]) for name in after)
        state = trainer.accelerator.unwrap_model(trainer.network).state_dict()
        assert all(tensor.dtype == torch.float32 for tensor in state.values())

    train = {"mixed_precision": precision}
    cfg = config(tmp_path / "run", lora=LORA, train=train, optimizer={"learning_rate": 1e-4, "lr_warmup_steps": 1})
    assert run(cfg, body=body) == [0], log(cfg)


def test_clipping_holds_the_adapter(tmp_path):
    def moved(norm):
        optimizer = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_epsilon": 1.0, "learning_rate": 1.0}
        trainer = trainer_of(tmp_path / f"{norm}", train={"max_grad_norm": norm}, optimizer=optimizer)
        before = {name: p.clone() for name, p in trained_state(trainer.modules.unet).items()}
        assert steps(trainer, 1) > 1e-3
        return max(float((p - before[name]).abs().max()) for name, p in trained_state(trainer.modules.unet).items())

    # With an epsilon of 1, a step of AdamW is as long as the gradient.
    assert moved(1e-6) < 1e-5 < 1e-3 < moved(0)


def test_recomputed_activations_give_the_same_gradients(tmp_path):
    def gradients(checkpointing):
        train = {"gradient_checkpointing": checkpointing}
        trainer = trainer_of(tmp_path / f"{checkpointing}", train=train, model={"dropout": 0.0})
        steps(trainer, 2)  # after one, B is no longer zero, and A has a gradient
        trainer.optimizer.step = lambda: None
        trainer.optimizer.zero_grad = lambda: None
        steps(trainer, 1)
        return {name: p.grad.clone() for name, p in trainer.parameters.items()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(grad.any() for grad in plain.values())
    for name in plain:
        torch.testing.assert_close(recomputed[name], plain[name], rtol=1e-5, atol=1e-8)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("lora") / "run", lora=LORA)
    assert run(cfg, body=whole) == [0], log(cfg)
    return cfg


def test_killed_and_resumed_is_bit_equal(tmp_path, reference):
    cfg = replace(reference, output_dir=str(tmp_path / "run"))
    assert run(cfg, stop=(5, signal.SIGKILL)) == [-signal.SIGKILL] and 5 <= last_step(cfg) < STEPS
    assert run(cfg) == [0], log(cfg)
    assert state(cfg, STEPS) == state(reference, STEPS)


def test_with_a_base_in_half_precision_the_run_is_the_same_and_resumes(tmp_path):
    def half(cfg):
        trainer = Trainer(cfg)
        assert base_dtype(trainer.modules.unet) == torch.bfloat16
        trainer.fit()

    train = {"mixed_precision": "bf16"}
    exact = config(tmp_path / "float32", lora=LORA, train=train)
    cfg = config(tmp_path / "bfloat16", lora={**LORA, "base_dtype": "bfloat16"}, train=train)
    assert run(exact) == [0] and run(cfg, stop=(5, signal.SIGKILL), body=half) == [-signal.SIGKILL], log(cfg)
    assert last_step(cfg) < STEPS and run(cfg, body=half) == [0], log(cfg)
    assert state(cfg, STEPS) == state(exact, STEPS)
    assert (tmp_path / "bfloat16" / "samples" / f"step-{STEPS:08d}.png").read_bytes() == (
        tmp_path / "float32" / "samples" / f"step-{STEPS:08d}.png"
    ).read_bytes()


@pytest.mark.parametrize(
    ("lora", "precision", "message"),
    [
        ({}, "no", "bfloat16 is what autocast computes in with train.mixed_precision bf16, which is no: set it to"),
        ({}, None, "which is unset"),
        ({"use_dora": True}, "bf16", "use_dora measures the base weights in float32"),
    ],
)
def test_a_base_in_half_precision_that_would_compute_something_else_is_refused(tmp_path, lora, precision, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, lora={"base_dtype": "bfloat16", **lora}, train={"mixed_precision": precision})


def test_checkpoints_hold_the_adapter_alone(reference):
    found = checkpoint.latest(Path(reference.output_dir) / "checkpoints")
    names = found.shapes("model").keys()
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert found.shapes("ema_0.9") == found.shapes("model")
    trainer = Trainer(replace(reference, output_dir=reference.output_dir))
    assert trainer.resumed.promise == "bit for bit"
    written = sum(file.stat().st_size for file in found.path.glob("*.safetensors")) / 1e6
    projected = float(checkpoints_line(trainer.modules, reference).partition(" x ")[2].partition(" MB")[0])
    assert projected == pytest.approx(written, rel=0.45)  # headers are a third of files this small
    base = sum(p.numel() for p in trainer.modules.unet.parameters())
    trained = sum(tensor.numel() for tensor in found.tensors("model").values())
    numbers = f"{trained / 1e3:.3g} k parameters trained, {(base - trained) / 1e3:.3g} k frozen"
    assert numbers in model_line(trainer.modules)
    expected = f"LoRA, of rank 2 and scale 1 on {len(names) // 2} layers (all)"
    assert adapter_line(reference, trainer.modules.unet) == expected


def test_other_adapters_do_not_resume(tmp_path, reference):
    for change in ({"rank": 4}, {"target": "attention"}, {"alpha": 1.0}):
        cfg = replace(reference, lora=Lora(**{**asdict(reference.lora), **change}))
        with pytest.raises(ConfigError, match=f"lora.{next(iter(change))}: "):
            Trainer(cfg)
    with pytest.raises(ConfigError, match="lora"):
        Trainer(replace(reference, lora=None))


def test_samples_and_export_have_the_adapter(reference):
    """What is exported, evaluated and drawn is the average of the adapter on its base."""
    trainer = Trainer(reference)
    unet = trainer.modules.unet
    with torch.no_grad(), trainer.averaged_weights():
        assert trainer.pipeline().unet is unet and not unet.training
        arguments = {"sample": torch.randn(2, 3, 8, 8), "timestep": 5, "class_labels": torch.tensor([1, 2])}
        expected = unet(**arguments).sample
        exported = load_pipeline(reference.output_dir).unet(**arguments).sample
        measured = load_subject(Path(reference.output_dir)).unet(**arguments).sample
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        last = load_subject(Path(reference.output_dir), average="weights").unet(**arguments).sample
    assert (last - expected).abs().max() > 1e-4


def test_an_earlier_adapter_guides(reference):
    """Autoguidance by a checkpoint of the same run: the base with the adapter's slowest average."""
    trainer = Trainer(reference)
    folder = Path(reference.output_dir) / "checkpoints" / "step-00000008"
    guide = load_guide(str(folder), trainer.modules.unet, trainer.modules.objective.scheduler)
    expected = checkpoint.load(folder).tensors("ema_0.9")
    live = trained_state(trainer.modules.unet)
    assert not any(p.requires_grad for p in guide.parameters())
    assert all(torch.equal(guide.state_dict()[name], expected[name]) for name in live)
    assert not any(torch.equal(live[name], expected[name]) for name in live)
    assert hashes(guide) == hashes(trainer.modules.unet)


def test_two_processes_give_the_losses_of_one(tmp_path):
    lora, still = {"rank": 2, "target": "all"}, {"dropout": 0.0}
    one = config(tmp_path / "one", lora=lora, model=still)
    two = config(tmp_path / "two", lora=lora, model=still)
    other = config(tmp_path / "other", lora={**lora, "alpha": 4.0}, model=still)
    assert run(one) == [0] and run(other) == [0], log(one)
    assert run(two, processes=2) == [0, 0], log(two)
    losses = [[line["loss"] for line in metrics(cfg)] for cfg in (one, two, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5), "negative control: twice the scale"
