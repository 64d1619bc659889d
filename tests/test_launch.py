"""The front door, as users open it: real `accelerate launch`, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from finetune.config_io import dump
from forked import last_step, log, run, state
from tiny import ROOT, config

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]


def start(tmp_path, *options, accelerate="cpu", extra=(), **sections) -> subprocess.Popen:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(config(tmp_path / "run", **sections)))
    command = [*LAUNCH, "--config_file", str(ROOT / "configs" / "accelerate" / f"{accelerate}.yaml"), *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": "0"}
    return subprocess.Popen(
        [*command, "train_unet.py", "--config", str(recipe), *options],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def test_whole_run_over_two_processes(tmp_path):
    """With the precision that the launcher was asked for."""
    extra = ["--main_process_port", "0", "--mixed_precision", "bf16"]
    output = finish(start(tmp_path, "--max_train_steps", "4", accelerate="cpu_2", extra=extra))
    run = tmp_path / "run"
    assert json.loads((run / "pipeline" / "model_index.json").read_text())["_class_name"] == "UNetPipeline"
    assert f"samples: {run}/samples/step-00000004.png" in output
    assert f"pipeline: {run}/pipeline" in output
    assert (run / "samples" / "step-00000004.png").stat().st_size > 0
    assert output.count("per micro-step") == 1  # the plan, by one process
    assert "x 2 processes" in output and "2 x cpu, network in bf16" in output


def test_two_processes_on_the_cpu_see_no_gpu_and_the_precision(tmp_path):
    script = tmp_path / "script.py"
    line = "' '.join(f'{k}={os.environ[k]};' for k in ('RANK', 'CUDA_VISIBLE_DEVICES', 'ACCELERATE_MIXED_PRECISION'))"
    script.write_text(f"import os; os.write(1, {line}.encode() + bytes([10]))")  # at once: both write to one pipe
    file = ROOT / "configs" / "accelerate" / "cpu_2.yaml"
    options = ["--main_process_port", "0", "--mixed_precision", "bf16"]
    command = [*LAUNCH, "--config_file", str(file), *options, str(script)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = "CUDA_VISIBLE_DEVICES=-1,-1; ACCELERATE_MIXED_PRECISION=bf16;"
    assert {f"RANK=0; {seen}", f"RANK=1; {seen}"} == set(output.splitlines())


def test_another_precision_than_the_launchers_is_refused(tmp_path, monkeypatch):
    """By what the launcher leaves in the environment: the test above."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    agreed = config(tmp_path / "agreed", train={"mixed_precision": "bf16", "max_train_steps": 1})
    assert run(agreed) == [0], log(agreed)
    contradicting = config(tmp_path / "run", train={"mixed_precision": "fp16"})
    assert run(contradicting) == [2]
    assert "fp16" in log(contradicting) and "bf16" in log(contradicting)


def test_configuration_error_is_said_once_and_comes_first(tmp_path):
    process = start(tmp_path, "--train.learning_rat", "1", accelerate="cpu_2", extra=["--main_process_port", "0"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert output.count("--train.learning_rat: no such option") == 1
    assert "local_rank: 1" in output  # of the launcher, about the second process
    assert not (tmp_path / "run").exists()


def test_terminating_the_launcher_saves_and_leaves_nothing_running(tmp_path):
    process = start(tmp_path, "--max_train_steps", "100000", "--checkpointing_steps", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)  # ends when the last holder of the pipe has ended
    assert "SIGTERM: saved at step" in output
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def torchrun(recipe, *options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    assert (share := "TORCH_DISABLE_SHARE_RDZV_TCP_STORE") in (ROOT / "configs/accelerate/elastic.sh").read_text()
    environment[share] = "1"
    return subprocess.Popen(
        [*TORCHRUN, *options, "train_unet.py", "--config", str(recipe)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_torchrun_restarts_what_lost_a_process_and_fewer_go_on(tmp_path):
    """One of two processes is killed: the run resumes by itself; another number of processes finishes it."""
    steps = {"max_train_steps": 30, "global_batch_size": 8}
    cfg = config(tmp_path / "run", train=steps, checkpoint={"checkpointing_steps": 5})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump(cfg))
    process = torchrun(recipe, "--nproc-per-node", "2", "--max-restarts", "1")
    deadline = time.monotonic() + 120
    while last_step(cfg) < 8 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output = finish(process)
    assert "per micro-step" in output and output.count("resumes at step") == 1, output
    plain = config(tmp_path / "plain", train=steps, checkpoint={"checkpointing_steps": 100})
    assert run(plain, processes=2) == [0, 0], log(plain)
    assert state(cfg, 30) == state(plain, 30)
    longer = replace(cfg, train=replace(cfg.train, max_train_steps=31), allow_change=("train.max_train_steps",))
    assert run(longer) == [0], log(longer)
    assert last_step(longer) == 31


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_reads_each_of_its_configurations(path):
    cfg = load_config_from_file(str(path))
    assert cfg.num_processes >= 1
    assert f"configs/accelerate/{path.name}" in path.read_text()
    assert set(yaml.safe_load(path.read_text())) <= set(cfg.to_dict())
