"""What is imported before the first step, as sets of modules; a time would fail on a busy machine."""

import json
import os
import subprocess
import sys

from PIL import Image

import tiny
import tiny_pipelines
from finetune.config_io import dump

pretrained = tiny_pipelines.pretrained
HEAVY = {"torch", "numpy", "diffusers", "transformers", "datasets", "accelerate", "matplotlib", "PIL", "peft", "pandas"}
LIGHT = """
import contextlib, io, json, sys
heavy, found, codes = set(json.load(sys.stdin)), {}, []
for module in ("config", "config_io", "hub", "cli", "run"):
    __import__("finetune." + module)
    found[module] = sorted(heavy & set(sys.modules))
from finetune.cli import main
for words in (["train", "--help"], ["train", "--train.max_train_step", "1"]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            codes.append(main(words))
        except SystemExit as stop:
            codes.append(stop.code)
found["commands"] = sorted(heavy & set(sys.modules))
from finetune.seeding import permutation
permutation(0, "order", 0, 9)
found["seeding"] = sorted(heavy & set(sys.modules))
json.dump({"found": found, "codes": codes}, sys.stdout)
"""


def in_a_new_process(code: str, given: object) -> dict:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_help_and_a_mistake_import_nothing_heavy():
    seen = in_a_new_process(LIGHT, sorted(HEAVY))
    assert seen["codes"] == [0, 2]
    assert seen["found"].pop("seeding") == ["numpy"]  # so a module that comes is seen
    assert not any(seen["found"].values()), seen["found"]


STEP = """
import gc, json, sys
from finetune.config_io import load_text
from finetune.run import heavy_imports

def step(text):
    trainer = Trainer(load_text(text))
    trainer.pipeline(hollow=True)
    assert trainer.train_step(iter(trainer.loader()), Meter(trainer.accelerator, trainer.modules.objective))
    return sorted(sys.modules)

with heavy_imports():
    collector = [gc.isenabled(), gc.get_freeze_count() > 100_000]
    from finetune.meter import Meter
    from finetune.trainer import Trainer
    seen = {kind: step(text) for kind, text in json.load(sys.stdin).items()}
    import finetune.plots
    seen["control"] = sorted(sys.modules)
    with heavy_imports():  # everything is there: nothing to be done, and the end of this one changes nothing
        pass
    collector.append(gc.get_freeze_count() > 0)
print(json.dumps(seen | {"collector": [*collector, gc.get_freeze_count()]}))
"""
NEVER = {
    "matplotlib", "tensorboard", "wandb", "torchmetrics", "bitsandbytes", "finetune.cli", "finetune.evaluate",
    "finetune.export", "finetune.importers", "finetune.lora_export", "finetune.lora_proof", "finetune.merge_command",
    "finetune.plots", "finetune.posthoc", "finetune.sample_command",
}  # fmt: skip


def test_no_recipe_imports_what_comes_after_its_first_step(tmp_path, pretrained):
    """All recipes in one process: what none of them has imported is not there.

    diffusers' UNets import peft, scipy, torchvision and transformers, whoever uses them: nothing can be saved there.
    """
    (tmp_path / "images").mkdir()
    for shade in (50, 200):
        Image.new("RGB", (64, 64), (shade, 0, 0)).save(tmp_path / "images" / f"{shade}.png")
        (tmp_path / "images" / f"{shade}.txt").write_text("red")
    shared = {"train": {"max_train_steps": 2, "global_batch_size": 2}, "optimizer": {"learning_rate": 1e-4}}
    shared |= {"tracking": {"report_to": "none"}, "model": {"kind": "pretrained"}}
    shared["model"]["pretrained_model_name_or_path"] = str(pretrained("sd15"))
    shared["data"] = {"train_data_dir": str(tmp_path / "images"), "resolution": 64, "center_crop": True}
    shared["cache"] = {"latents": True, "text": True, "folder": str(tmp_path / "cache")}
    recipes = {
        "pixel": dump(tiny.config(tmp_path / "pixel")),
        "text": json.dumps(shared | {"output_dir": str(tmp_path / "text")}),
        "lora": json.dumps(shared | {"output_dir": str(tmp_path / "lora"), "lora": {"rank": 2}}),
    }
    seen = in_a_new_process(STEP, recipes)
    assert seen.pop("collector") == [True, True, True, 0]  # spared in there, and as it was afterwards
    assert NEVER & set(seen.pop("control")) == {"matplotlib", "finetune.plots"}  # so what comes is seen
    for recipe, modules in seen.items():
        assert not NEVER & set(modules), recipe
    assert "peft" in seen["lora"] and "transformers.models.clip.modeling_clip" in seen["text"]
