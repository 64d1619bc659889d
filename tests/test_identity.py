"""What makes two starts the same run: each setting never changes, changes if asked for, or changes freely."""

import dataclasses
from fnmatch import fnmatchcase

import pytest

import tiny
from finetune.config_tree import SETTINGS
from finetune.identity import RULES, changes, rule_of, run_settings

FACTS = {"global_batch": 8, "steps": 9, "mixed_precision": "no", "fingerprint": "f"}


def settings(folder, **sections):
    return run_settings(tiny.config(folder, **sections), **FACTS)


def test_every_setting_has_a_rule_and_every_rule_a_setting():
    rules = {name: rule_of(name) for name in [*SETTINGS, "data.content"]}
    assert set(rules.values()) == {"fixed", "asked", "free"}
    with pytest.raises(StopIteration):
        rule_of("train.something_new")  # negative control: a new setting has to be thought about
    fits = {name: next(pattern for pattern, _ in RULES if fnmatchcase(name, pattern)) for name in rules}
    assert {pattern for pattern, _ in RULES} == set(fits.values()), "a rule that no setting falls under"


@pytest.mark.parametrize(
    ("change", "rule", "name"),
    [
        ({"seed": 1}, "fixed", "seed"),
        ({"model": {"layers_per_block": 2}}, "fixed", "model.layers_per_block"),
        ({"model": {"norm_num_groups": 2}}, "fixed", "model.norm_num_groups"),
        ({"conditioning": {"null": "zero"}}, "fixed", "conditioning.null"),
        ({"ema": {"ema_max_decay": [0.9]}}, "fixed", "ema.ema_max_decay"),
        ({"objective": {"kind": "ddpm", "prediction_type": "v_prediction"}}, "fixed", "objective.prediction_type"),
        ({"optimizer": {"learning_rate": 5e-4}}, "asked", "optimizer.learning_rate"),
        ({"optimizer": {"adam_weight_decay": 0.2}}, "asked", "optimizer.adam_weight_decay"),
        ({"objective": {"kind": "ddpm", "noise_offset": 0.1}}, "asked", "objective.noise_offset"),
        ({"conditioning": {"condition_dropout": 0.2}}, "asked", "conditioning.condition_dropout"),
        ({"model": {"dropout": 0.2}}, "asked", "model.dropout"),
        ({"ema": {"ema_power": 0.5}}, "asked", "ema.ema_power"),
        ({"ema": {"update_every": 2}}, "asked", "ema.update_every"),
        ({"train": {"max_grad_norm": 2.0}}, "asked", "train.max_grad_norm"),
        ({"data": {"random_flip": False}}, "asked", "data.random_flip"),
        ({"data": {"buckets": "auto"}}, "asked", "data.buckets"),
        ({"data": {"image_interpolation_mode": "box"}}, "asked", "data.image_interpolation_mode"),
        ({"data": {"variants": 2}}, "asked", "data.variants"),
        ({"sample": {"num_images": 3}}, "free", "sample.num_images"),
        ({"tracking": {"log_every": 5}}, "free", "tracking.log_every"),
        ({"checkpoint": {"checkpointing_steps": 3}}, "free", "checkpoint.checkpointing_steps"),
        ({"train": {"channels_last": True}}, "free", "train.channels_last"),
        ({"data": {"dataloader_num_workers": 1}}, "free", "data.dataloader_num_workers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_changed_setting_falls_under_its_rule(tmp_path, change, rule, name):
    then, now = settings(tmp_path), settings(tmp_path, **change)
    found = dataclasses.asdict(changes(then, now, allow=[]))
    assert found == {"fixed": [], "asked": [], "allowed": [], "free": [], rule: [name]}
    assert not any(dataclasses.asdict(changes(then, then, allow=[])).values())
    allowed = changes(then, now, allow=[name.split(".")[0]])
    assert allowed.allowed == ([name] if rule == "asked" else []) and not allowed.asked


def test_what_the_launcher_and_the_data_decide_counts(tmp_path):
    cfg = tiny.config(tmp_path)
    then = run_settings(cfg, **FACTS)
    for fact, value, rule, name in [
        ("global_batch", 16, "fixed", "train.global_batch_size"),
        ("fingerprint", "g", "asked", "data.content"),
        ("mixed_precision", "bf16", "asked", "train.mixed_precision"),
        ("steps", 10, "asked", "train.max_train_steps"),
    ]:
        assert getattr(changes(then, run_settings(cfg, **FACTS | {fact: value}), allow=[]), rule) == [name]
    constant = tiny.config(tmp_path, optimizer={"lr_scheduler": "constant_with_warmup"})
    longer = run_settings(constant, **FACTS | {"steps": 10})
    assert longer == run_settings(constant, **FACTS), "a constant learning rate does not follow the length"


def test_the_same_files_may_have_been_moved_but_not_replaced_by_others(tmp_path):
    def of(folder, vae):
        return settings(folder, space={"kind": "latent", "vae": str(folder / vae)})

    there, moved, other = of(tmp_path, "vae"), of(tmp_path / "elsewhere", "vae"), of(tmp_path, "vae2")
    assert not any(dataclasses.asdict(changes(there, moved, allow=[])).values())
    assert changes(there, other, allow=[]).fixed == ["space.vae"]


def test_a_setting_that_came_later_counts_only_where_it_is_not_at_its_default(tmp_path):
    now = settings(tmp_path)
    then = {name: value for name, value in now.items() if name not in ("data.buckets", "optimizer.kind")}
    assert not any(dataclasses.asdict(changes(then, now, allow=[])).values())
    assert changes(then, now | {"data.buckets": "auto"}, allow=[]).asked == ["data.buckets"], "negative control"
