"""A text encoder that is trained with the UNet, whole or by a LoRA: gradients, learning rate, resume, export."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

import finetune.stepping
from finetune import checkpoint
from finetune.conditioning import Unconditional, assembled, text_encoders
from finetune.config import AdamW, Ema, Train
from finetune.config_lora import Lora
from finetune.ema import by_module
from finetune.errors import ConfigError
from finetune.evaluate import load_subject
from finetune.modules import choose_trained, kept_modules
from finetune.pipeline_conditions import text_modules
from finetune.plan import model_line, optimizer_line
from finetune.posthoc import ema_main
from finetune.sample import load_pipeline
from finetune.text_conditions import PooledText, TextSequence
from finetune.trainer import Trainer
from forked import last_step, log, metrics, run, state, whole
from tiny import config, steps
from tiny_models import LENGTH, PROMPTS, build, parts  # noqa: F401
from tiny_models import config as tiny_config

STEPS = 9
WAYS = {"whole": {}, "lora": {"lora": {"rank": 2}}}


def text_config(parts, folder, *, trained=True, train=None, **sections):  # noqa: F811
    """The tiny run, conditioned by its captions, with the text encoder trained."""
    text = {"text_encoder": str(parts / "text_encoder"), "tokenizer": str(parts / "tokenizer")}
    return config(
        folder,
        conditioning={"kind": "pooled_text", **text},
        train={"train_text_encoder": trained, **(train or {})},
        **{"sample": {"prompts": PROMPTS}, **sections},
    )


def copies(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(module, before):
    return max(float((tensor - before[name]).abs().max()) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("condition", ["pooled_text", "text"])
def test_embeddings_and_gradients_are_those_of_transformers(parts, condition):  # noqa: F811
    model = "unet2d" if condition == "pooled_text" else "unet2d_condition"
    cfg = tiny_config(parts, condition=condition, model_kind=model, train={"train_text_encoder": True})
    unet, _, conditioner = build(cfg)
    frozen = conditioner.condition(PROMPTS)[conditioner.argument]
    choose_trained(cfg, unet, conditioner)
    texts = [*PROMPTS, PROMPTS[0], ""]
    rows = conditioner.condition(texts)[conditioner.argument]
    encoder = CLIPTextModel.from_pretrained(parts / "text_encoder").eval()
    ids = conditioner.tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    output = encoder(ids)
    expected = output.pooler_output if condition == "pooled_text" else output.last_hidden_state
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows[:2], frozen, rtol=1e-5, atol=1e-6)
    weights = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    (rows * weights).sum().backward()
    (expected * weights).sum().backward()
    own = dict(conditioner.text_encoder.named_parameters())
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=1e-4, atol=1e-5)
        assert parameter.grad.any()


def test_what_changes_is_not_remembered(parts):  # noqa: F811
    for trained in (False, True):
        cfg = tiny_config(parts, condition="pooled_text", train={"train_text_encoder": trained})
        unet, _, conditioner = build(cfg)
        choose_trained(cfg, unet, conditioner)
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                first = conditioner.condition(PROMPTS)["class_labels"]
                assert first.requires_grad == (trained and torch.is_grad_enabled())
                with torch.no_grad():
                    conditioner.text_encoder.final_layer_norm.bias += 1
                second = conditioner.condition(PROMPTS)["class_labels"]
            assert torch.equal(first, second) != trained


def test_shared_and_several_encoders_have_the_names_of_a_pipeline(parts):  # noqa: F811
    one, other = (CLIPTextModel.from_pretrained(parts / "text_encoder") for _ in range(2))
    tokenizer = CLIPTokenizer.from_pretrained(parts / "tokenizer")
    for second, expected in ((one, {"text_encoder": one}), (other, {"text_encoder": one, "text_encoder_2": other})):
        conditioner = assembled({"pooled_text": PooledText(second, tokenizer), "text": TextSequence(one, tokenizer)})
        assert text_encoders(conditioner) == text_modules_of(conditioner) == expected
        cfg = tiny_config(parts, condition="text", model_kind="unet2d_condition", train={"train_text_encoder": True})
        unet = build(cfg)[0]
        choose_trained(cfg, unet, conditioner)
        assert list(kept_modules(unet, conditioner)) == ["model", *expected]
        assert all(part.trained for part in conditioner.parts.values()) and conditioner.parameters_frozen == 0
    assert text_encoders(Unconditional()) == {}


def text_modules_of(conditioner):
    return {name: part for name, part in text_modules(conditioner).items() if name.startswith("text_encoder")}


def test_frozen_unless_asked(parts, tmp_path):  # noqa: F811
    trainer = Trainer(text_config(parts, tmp_path, trained=False))
    encoder = trainer.modules.conditioner.text_encoder
    before, unet = copies(encoder), copies(trainer.modules.unet)
    steps(trainer, 3)
    assert moved(encoder, before) == 0 < moved(trainer.modules.unet, unet)
    assert not trainer.modules.text and "text_encoder" not in trainer.state.parts()
    assert "text encoder" not in model_line(trainer.modules)


@pytest.mark.parametrize("way", WAYS)
def test_its_learning_rate_is_its_own(parts, tmp_path, way):  # noqa: F811
    def far(rate):
        optimizer = {"learning_rate": 1e-3, "lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_weight_decay": 0}
        cfg = text_config(parts, tmp_path, optimizer={**optimizer, "text_encoder_lr": rate}, **WAYS[way])
        trainer = Trainer(cfg)
        encoder, unet = trainer.modules.conditioner.text_encoder, trainer.modules.unet
        before, other = copies(encoder), copies(unet)
        steps(trainer, 1)
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == [1e-3, pytest.approx(rate or 1e-3)]
        assert moved(unet, other) == pytest.approx(1e-3, rel=0.01)  # a first step of Adam is as long as its rate
        trained = {name for name, p in encoder.named_parameters() if p.requires_grad}
        still = {name: tensor for name, tensor in before.items() if name not in trained}
        assert all(torch.equal(encoder.state_dict()[name], tensor) for name, tensor in still.items())
        assert (len(trained) == len(before)) == (way == "whole")
        return moved(encoder, before)

    assert far(None) == pytest.approx(1e-3, rel=0.01)
    assert far(2e-5) == pytest.approx(2e-5, rel=0.01)


def test_it_is_clipped_with_the_others(parts, tmp_path):  # noqa: F811
    def far(norm):
        optimizer = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "adam_epsilon": 1.0, "learning_rate": 1.0}
        optimizer["adam_weight_decay"] = 0.0
        trainer = Trainer(text_config(parts, tmp_path, optimizer=optimizer, train={"max_grad_norm": norm}))
        encoder = trainer.modules.conditioner.text_encoder
        before = copies(encoder)
        assert steps(trainer, 1) > 1e-3
        return moved(encoder, before)

    assert far(1e-6) < 1e-5 and far(0) > 10 * far(1e-6)


@pytest.fixture(scope="module")
def references(parts, tmp_path_factory):  # noqa: F811
    """The finished runs, by the way of training the encoder."""
    found = {}
    for way, lora in WAYS.items():
        ema = {"ema_max_decay": [0.5], "relative_widths": [0.1]}
        ema |= {} if lora else {"snapshot_every": 3}
        found[way] = text_config(parts, tmp_path_factory.mktemp(way) / "run", ema=ema, **lora)
        assert run(found[way], body=whole) == [0], log(found[way])
    return found


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_is_bit_equal(references, tmp_path, way):
    """Samples are drawn meanwhile: the pipeline around the encoder must not freeze it, nor anything remember it."""
    sample = replace(references[way].sample, sample_every=2)
    cfg = replace(references[way], output_dir=str(tmp_path / "run"), sample=sample)
    assert run(cfg, stop=(5, signal.SIGKILL)) == [-signal.SIGKILL] and 5 <= last_step(cfg) < STEPS
    assert run(cfg) == [0], log(cfg)
    parts_of_it = state(cfg, STEPS)
    assert "text_encoder.safetensors" in parts_of_it and parts_of_it == state(references[way], STEPS)


@pytest.mark.parametrize("way", WAYS)
def test_checkpoint_export_and_evaluation_hold_the_trained_encoder(references, parts, way):  # noqa: F811
    cfg = references[way]
    found = checkpoint.latest(Path(cfg.output_dir) / "checkpoints")
    average = by_module(found.tensors("ema_0.5"))
    lora = [".lora_" in name for name in found.shapes("text_encoder")]
    assert all(lora) if way == "lora" else not any(lora)
    assert average["text_encoder"].keys() == found.shapes("text_encoder").keys()
    trainer = Trainer(cfg)
    assert "the text encoder too" in model_line(trainer.modules)
    with torch.no_grad(), trainer.averaged_weights():
        expected = trainer.modules.conditioner.condition(PROMPTS)["class_labels"]
    original = CLIPTextModel.from_pretrained(parts / "text_encoder")
    conditioner = load_pipeline(cfg.output_dir).conditioner()
    exported = conditioner.condition(PROMPTS)["class_labels"]
    subject = load_subject(Path(cfg.output_dir))
    measured = subject.conditioner.condition(PROMPTS)["class_labels"]
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-6)
    assert not measured.requires_grad
    conditioner.text_encoder = original.eval()  # negative control
    conditioner._cache.clear()
    assert (conditioner.condition(PROMPTS)["class_labels"] - expected).abs().max() > 1e-4


def test_averages_after_the_training_hold_the_encoder_too(references, tmp_path):
    cfg = references["whole"]
    ema_main([cfg.output_dir, "--relative_width", "0.1", "--out", str(tmp_path / "post")])
    found = checkpoint.latest(Path(cfg.output_dir) / "checkpoints")
    expected = by_module(found.tensors("ema_width_0.1"))["text_encoder"]
    written = CLIPTextModel.from_pretrained(tmp_path / "post" / "text_encoder").state_dict()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


def test_two_processes_give_the_losses_of_one(parts, tmp_path):  # noqa: F811
    def diverging(cfg):
        finetune.stepping.average_gradients = lambda accelerator, parameters: None
        Trainer(cfg).fit()

    still = {"model": {"dropout": 0.0}}
    one, two, apart = (text_config(parts, tmp_path / name, **still) for name in ("one", "two", "apart"))
    assert run(one) == [0], log(one)
    assert run(two, processes=2) == [0, 0], log(two)
    assert run(apart, processes=2, body=diverging) == [0, 0], log(apart)
    losses = [[line["loss"] for line in metrics(cfg)] for cfg in (one, two, apart)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] != pytest.approx(losses[0], rel=1e-5), "negative control: gradients that are not averaged"


def test_what_makes_no_sense_is_refused(parts, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=r"train\.train_text_encoder: conditioning\.kind is class_label"):
        config(tmp_path, train={"train_text_encoder": True})
    with pytest.raises(ValueError, match=r"optimizer\.text_encoder_lr: the text encoder is frozen"):
        text_config(parts, tmp_path, trained=False, optimizer={"text_encoder_lr": 1e-5})
    cfg = replace(config(tmp_path), train=Train(max_train_steps=1))
    object.__setattr__(cfg.train, "train_text_encoder", True)  # as of a pretrained model, which is looked at later
    with pytest.raises(ConfigError, match="conditioning none has no text encoder"):
        choose_trained(cfg, torch.nn.Linear(1, 1), Unconditional())


def test_words(parts, tmp_path):  # noqa: F811
    cfg = text_config(parts, tmp_path, optimizer={"text_encoder_lr": 5e-6})
    assert "learning rate 0.001 (text encoder 5e-06)" in optimizer_line(cfg)
    assert "text encoder" not in optimizer_line(replace(cfg, optimizer=AdamW(), ema=Ema(), lora=Lora()))
