"""A file that turns bad in the course of a run: no hang, nothing silent, the same decisions after a resume."""

import itertools
import logging
import pickle
import signal
import time
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from finetune.batching import make_loader
from finetune.data import REPLACEMENTS, TrainData, open_data
from finetune.errors import DataError
from finetune.samples import report_replaced
from finetune.trainer import Trainer
from forked import last_step, log, metrics, run, state
from tiny import config

STEPS, SPOILED_AT, ROWS = 9, 3, 20
BAD = b"\x89PNG\r\n\x1a\n and no more"


@pytest.fixture(autouse=True)
def _private_caches(tmp_path, monkeypatch):
    for name in ("HF_CACHE_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "caches" / name)


def folder_config(at, *, on_error="skip"):
    """The tiny run on its own copy of 20 pictures of noise."""
    folder = at / "images"
    folder.mkdir(parents=True)
    for number in range(ROWS):
        noise = np.random.RandomState(number).randint(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")
    data = {
        "dataset_name": None, "train_data_dir": str(folder), "max_train_samples": None, "on_error": on_error,
        "dataloader_num_workers": 0,
    }  # fmt: skip
    return config(at / "run", data=data, conditioning={"kind": "none"}, train={"max_train_steps": STEPS})


def images(cfg) -> Path:
    return Path(cfg.data.train_data_dir)


def spoil(cfg, names=("07.png",)):
    for name in names:
        (images(cfg) / name).write_bytes(BAD)


def training(spoiled_at):
    """A body for `run`: trains, spoils a file before step `spoiled_at`, and writes down which rows were used."""

    class Watched(Trainer):
        def train_step(self, batches, meter):
            if self.step >= spoiled_at and self.accelerator.is_main_process:
                spoil(self.cfg)
            self.accelerator.wait_for_everyone()
            return super().train_step(self.watched(batches), meter)

        def watched(self, batches):
            for batch in batches:
                rank = self.accelerator.process_index
                with (self.output_dir / "rows").open("a") as file:
                    file.write(f"step {self.step} process {rank}: {batch.rows.tolist()} {len(batch.replaced)}\n")
                yield batch

    def body(cfg):
        Watched(cfg).fit()

    return body


def rows_used(cfg) -> list[str]:
    """The rows of each step and process; those of a step that was done again were the same ones."""
    lines = sorted(set((images(cfg).parent / "run" / "rows").read_text().splitlines()))
    assert len({line.split(":")[0] for line in lines}) == len(lines)
    return lines


def course(cfg):
    return state(cfg, STEPS), [(line["step"], line["loss"], line["lr"]) for line in metrics(cfg)], rows_used(cfg)


def test_two_processes_go_on_and_a_resume_repeats_their_decisions(tmp_path):
    straight, stopped, good = (folder_config(tmp_path / name) for name in ("straight", "stopped", "good"))
    for cfg, at in ((straight, SPOILED_AT), (good, STEPS)):
        assert run(cfg, processes=2, body=training(at), seconds=60) == [0, 0], log(cfg)
    killed = run(stopped, processes=2, body=training(SPOILED_AT), stop=(5, signal.SIGKILL), seconds=60)
    assert killed == [-signal.SIGKILL] * 2 and 5 <= last_step(stopped) < STEPS
    assert run(stopped, processes=2, body=training(SPOILED_AT), seconds=60) == [0, 0], log(stopped)
    assert course(stopped) == course(straight)
    assert course(good)[0] != course(straight)[0]  # negative control: the file mattered
    assert log(straight).count("07.png is not a PNG") in (1, 2)  # once per process that drew it
    replaced = [line for line in rows_used(straight) if not line.endswith(" 0")]
    assert replaced and not any(" 7," in line or "[7," in line or " 7]" in line for line in replaced)
    assert [line for line in rows_used(good) if line not in rows_used(straight)]


def test_two_processes_end_at_a_bad_file_if_it_is_an_error(tmp_path):
    cfg = folder_config(tmp_path, on_error="error")
    begin = time.monotonic()
    codes = run(cfg, processes=2, body=training(SPOILED_AT), seconds=60)
    assert 4 in codes and 0 not in codes, log(cfg)
    assert "07.png cannot be decoded" in log(cfg) or "07.png is not a PNG" in log(cfg)
    assert time.monotonic() - begin < 30


def spoiled(tmp_path, names=("07.png",), **options) -> TrainData:
    """Data in which the files turned bad after the check."""
    cfg = folder_config(tmp_path, **options)
    data = open_data(cfg, progress=False)
    spoil(cfg, names)
    return data


def test_the_row_in_place_is_a_function_of_seed_epoch_and_row(tmp_path):
    data = spoiled(tmp_path)
    used = []
    for epoch in range(30):
        (one,), (again, other) = data.samples([7], [epoch]), data.samples([7, 3], [epoch, epoch])
        assert one.replaced == again.replaced and torch.equal(one.pixels, again.pixels)
        assert one.replaced.row == 7 and one.replaced.used == one.row != 7 and "07.png" in one.replaced.reason
        assert torch.equal(one.pixels, data.samples([one.row], [epoch])[0].pixels) and other.replaced is None
        used.append(one.row)
    assert len(set(used)) > 8
    assert used != [replace(data, seed=1).samples([7], [epoch])[0].row for epoch in range(30)]


def test_if_all_rows_turn_bad_the_run_ends(tmp_path):
    data = spoiled(tmp_path, [f"{number:02d}.png" for number in range(ROWS)])
    with pytest.raises(DataError, match=f"07.png .*nor can any of the {REPLACEMENTS} rows"):
        data.samples([7], [0])


def test_batches_carry_what_was_replaced_and_it_is_said_once(tmp_path, caplog):
    data = spoiled(tmp_path)
    layout = {"start": 0, "rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 5, "pin_memory": False}
    three_epochs = list(itertools.islice(make_loader(data, config(tmp_path / "run"), **layout), 12))
    batches = pickle.loads(pickle.dumps(three_epochs))  # the way out of a loader process
    replaced = [one for batch in batches for one in batch.replaced]
    assert len(replaced) == 3 and {one.row for one in replaced} == {7}
    assert not any(7 in batch.rows for batch in batches)
    told: set[int] = set()
    with caplog.at_level(logging.WARNING):
        for batch in batches:
            report_replaced(batch.replaced, told)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR and "07.png is not" in caplog.text and told == {7}


def test_the_order_of_the_start_is_kept_when_rows_turn_unusable(tmp_path):
    data = spoiled(tmp_path)
    cfg = config(tmp_path / "run", data=dict(vars(data.rules)), conditioning={"kind": "none"})
    now = open_data(cfg, progress=False)
    assert len(now) == ROWS - 1 and now.fingerprint != data.fingerprint
    kept = now.with_order_of({"digests": data.digests})
    assert kept.rows.tolist() == data.rows.tolist() and kept.fingerprint == data.fingerprint
    assert kept.samples([7], [4])[0].replaced == data.samples([7], [4])[0].replaced
    (tmp_path / "images" / "08.png").write_bytes((tmp_path / "images" / "09.png").read_bytes())
    with pytest.raises(AssertionError):
        open_data(cfg, progress=False).with_order_of({"digests": data.digests})
