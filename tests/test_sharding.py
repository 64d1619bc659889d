"""FSDP2 on two CPU processes: the same run as without sharding, in checkpoints of the same format."""

import os
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import finetune.run
import tiny
from finetune.errors import ConfigError
from finetune.processes import check_sharding
from forked import log, metrics, run, state

torch.set_num_threads(1)
WRAP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP",
    "FSDP_MIN_NUM_PARAMS": "1000",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def sharded(cfg):
    """A `body`: what `accelerate launch --config_file configs/accelerate/fsdp2.yaml` makes of a run."""
    os.environ |= WRAP
    finetune.run.train(cfg)


def plain(cfg):
    finetune.run.train(cfg)


def config(folder, **sections):
    """Four steps without dropout, whose masks would follow the number of processes; micro-batches are accumulated, and
    held-out images measured."""
    sections |= {"train": {"max_train_steps": 4, "gradient_accumulation_steps": 2}}
    sections |= {"validation": {"held_out": 0.3, "every": 2}, "conditioning": {"kind": "none"}}
    return tiny.config(folder, model={"dropout": 0.0}, **sections)


def losses(cfg, name="loss"):
    return [line[name] for line in metrics(cfg) if name in line]


def weights(cfg, step=4, part="model"):
    return load_file(Path(cfg.output_dir) / "checkpoints" / f"step-{step:08d}" / f"{part}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run on two processes, with and without sharding."""
    folder = tmp_path_factory.mktemp("sharding")
    with_fsdp, without = config(folder / "fsdp"), config(folder / "ddp")
    assert run(with_fsdp, processes=2, body=sharded) == [0, 0], log(with_fsdp)
    assert run(without, processes=2, body=plain) == [0, 0], log(without)
    return with_fsdp, without


def test_sharding_does_not_change_the_run(runs):
    with_fsdp, without = runs
    assert losses(with_fsdp) == pytest.approx(losses(without), rel=1e-5)
    for name, count in (("grad_norm", 4), ("validation_loss", 3)):
        ours, theirs = (losses(cfg, name) for cfg in runs)
        assert len(ours) == count and ours == pytest.approx(theirs, rel=1e-4)
    for part in ("model", "ema_0.9", "ema_0.5", "optimizer"):
        ours, theirs = weights(with_fsdp, part=part), weights(without, part=part)
        assert ours.keys() == theirs.keys() and all(not isinstance(t, DTensor) for t in ours.values())
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=2e-6, msg=f"{part}: {name}")
    early = weights(without, step=2)  # negative control: two steps move the weights by far more
    assert any((early[name] - tensor).abs().max() > 1e-4 for name, tensor in weights(with_fsdp).items())


def test_the_export_holds_the_averaged_weights(runs):
    cfg = runs[0]
    pipeline = DDPMPipeline.from_pretrained(Path(cfg.output_dir) / "pipeline")
    exported, averaged = pipeline.unet.state_dict(), weights(cfg, part="ema_0.9")
    assert all(torch.equal(exported[name], tensor) for name, tensor in averaged.items())
    assert not all(torch.equal(exported[name], tensor) for name, tensor in weights(cfg).items()), "negative control"
    assert (Path(cfg.output_dir) / "samples" / "step-00000004.png").is_file()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_sharded_run_goes_on_with_another_number_of_processes(tmp_path, runs, processes):
    """From its second step, on one process without sharding, or on two with it; the latter bit for bit."""
    cfg = replace(runs[0], output_dir=str(tmp_path / "run"))
    half = "checkpoints/step-00000002"
    shutil.copytree(Path(runs[0].output_dir) / half, tmp_path / "run" / half)
    assert run(cfg, processes=processes, body=plain if processes == 1 else sharded) == [0] * processes, log(cfg)
    assert losses(cfg) == pytest.approx(losses(runs[0])[-2:], rel=1e-5)
    assert (state(cfg, 4) == state(runs[0], 4)) is (processes == 2)


@pytest.mark.parametrize(
    ("sections", "version", "precision", "says"),
    [
        ({"train": {"channels_last": True}}, 2, "no", "train.channels_last: does not go with FSDP2"),
        ({"ema": {"relative_widths": [0.1], "snapshot_every": 2}}, 2, "no", "ema.snapshot_every: does not go with"),
        ({}, 1, "no", "fsdp_version 1 is not supported"),
        ({}, 2, "fp16", "fp16 does not go with FSDP2"),
        ({}, 2, "bf16", None),
    ],
)
def test_what_does_not_go_with_sharding_is_refused(tmp_path, sections, version, precision, says):
    plugin = SimpleNamespace(fsdp_version=version)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision=precision)
    with pytest.raises(ConfigError, match=says) if says else nullcontext():
        check_sharding(accelerator, tiny.config(tmp_path / "run", **sections))
