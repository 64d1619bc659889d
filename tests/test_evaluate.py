"""Measuring a run: against the closed form of a model that predicts nothing, and what must not change the numbers."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import matplotlib.backends.backend_agg  # noqa: F401  imported here for the forked children
import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

from finetune.cli import main
from finetune.config_io import dump
from finetune.evaluate import bits, load_subject, mean_and_error
from finetune.models import bind
from finetune.objective.likelihood import bits_per_dim
from finetune.provenance import write_run_files
from finetune.seeding import PositionRandom
from finetune.trainer import Trainer
from forked import log, run
from tiny import config
from tiny_models import make_parts

torch.set_num_threads(1)
LEVELS = 20
OBJECTIVE = {"kind": "ddpm", "num_train_timesteps": LEVELS, "beta_schedule": "squaredcos_cap_v2"}


def just_saved(cfg) -> None:
    """What a run leaves that was stopped before its first step."""
    trainer = Trainer(cfg)
    write_run_files(cfg, data=trainer.data.facts, data_fingerprint=trainer.data.fingerprint)
    trainer.save(required=True)


@pytest.fixture(scope="module")
def nothing(tmp_path_factory):
    """An unconditional model with the output 0, by which it means that x0 is 0."""
    cfg = config(
        tmp_path_factory.mktemp("evaluate") / "nothing",
        conditioning={"kind": "none"},
        model={"zero_init": True},
        objective={**OBJECTIVE, "prediction_type": "sample"},
    )
    assert run(cfg, body=just_saved) == [0], log(cfg)
    return Path(cfg.output_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The tiny class-conditional run, with checkpoints at steps 8 and 9."""
    cfg = config(
        tmp_path_factory.mktemp("evaluate") / "trained",
        objective={**OBJECTIVE, "variance": {"kind": "learned_range"}},
        optimizer={"learning_rate": 1e-2},
        sample={"num_inference_steps": LEVELS},
    )
    assert run(cfg) == [0], log(cfg)
    return Path(cfg.output_dir)


def report(run: Path, *options: str, out: Path) -> dict:
    assert main(["evaluate", str(run), "--metrics", "bpd", "--out", str(out), *options]) == 0
    return json.loads((out / "bpd.json").read_text())


def columns(out: Path) -> dict[str, np.ndarray]:
    with (out / "bpd.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


def test_bits_of_a_model_that_predicts_zero_are_known(nothing, capsys):
    """KL(q || p) of level t is then (SNR(t-1) - SNR(t)) / 2 x0^2 nats, whatever the noise, so that the sum telescopes
    (Kingma et al. 2021, equation 13)."""
    assert main(["evaluate", str(nothing), "--metrics", "bpd"]) == 0
    out = nothing / "evaluation"
    found, by_level = json.loads((out / "bpd.json").read_text()), columns(out)
    subject = load_subject(nothing)
    x0 = torch.cat([b.pixel_values for b in subject.batches(num_samples=20, batch_size=20, seed=0)]).double().numpy()
    abar = (subject.objective.process.alpha**2).numpy()
    snr, square = abar / (1 - abar), (x0**2).mean()
    expected = (snr[:-1] - snr[1:]) / 2 * square / math.log(2)
    np.testing.assert_allclose(by_level["vb"][1:], expected, rtol=1e-4)
    np.testing.assert_allclose(by_level["x0_mse"], square, rtol=1e-6)
    prior = (abar[-1] * x0**2 - abar[-1] - np.log(1 - abar[-1])).mean() / 2 / math.log(2)
    assert found["prior"]["mean"] == pytest.approx(prior, rel=1e-3)
    assert found["total"]["mean"] == pytest.approx(prior + expected.sum() + found["vb_of_level_0"]["mean"], rel=1e-4)
    error = (x0**2).mean((1, 2, 3)).std(ddof=1) / 20**0.5
    np.testing.assert_allclose(by_level["x0_mse_standard_error"], error, rtol=1e-5)
    assert (found["images"], found["images_of_the_data"], found["levels"]) == (20, 20, LEVELS)
    assert found["is_training_data"] and found["weights"] == "ema_0.9" and by_level["timestep"].tolist() == [*range(20)]
    assert Image.open(out / "bpd.png").size[0] > 400
    total = f"bits per dimension: {found['total']['mean']:.4f} ± {found['total']['standard_error']:.4f} of 20 images"
    assert capsys.readouterr().out.startswith(total)


def test_bits_are_the_objective_s_with_noise_by_row_and_level(trained):
    """As bits_per_dim gives them, which is golden; of class labels as they are, and without dropout."""
    subject = load_subject(trained, average="weights")
    [batch] = subject.batches(num_samples=6, batch_size=6, seed=3)
    [other] = subject.batches(num_samples=6, batch_size=6, seed=4)
    assert subject.cfg.data.random_flip
    for row, pixels in zip(batch.rows.tolist(), batch.pixel_values, strict=True):
        stored = Image.open(io.BytesIO(subject.data.image_bytes(row))).convert("RGB")
        small = np.asarray(stored.resize((8, 8), Image.Resampling.BILINEAR))
        np.testing.assert_allclose(pixels, small.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6, err_msg="mirrored")
    assert len(set(batch.rows.tolist())) == 6 and batch.rows.tolist() != other.rows.tolist()
    random = PositionRandom(3, batch.rows)
    noises = [random.normal(f"bpd noise {t}", (3, 8, 8)) for t in reversed(range(LEVELS))]

    def expected(labels):
        network = bind(subject.unet, {"class_labels": labels})
        return bits_per_dim(subject.objective, network, batch.pixel_values, noises)

    bar = tqdm(disable=False, leave=False)
    got = bits(subject, iter([batch]), seed=3, clip_denoised=True, bar=bar)
    wanted = expected(batch.class_labels)
    torch.testing.assert_close(got["total"].float(), wanted["total"])
    torch.testing.assert_close(got["vb"].flip(1).float(), wanted["vb"])
    assert bar.n == 6 * LEVELS
    assert not torch.allclose(got["total"].float(), expected(batch.class_labels.roll(1))["total"], rtol=1e-5)


def test_bits_of_a_model_with_several_conditions(tmp_path):
    """Of class and small image, neither dropped nor noised: so the batch changes nothing, and other classes do."""
    cfg = config(
        tmp_path / "run",
        conditioning={
            "kind": "several",
            "class_label": {"condition_dropout": 0.9},
            "low_res": {"factor": 2, "noise_augmentation": 0.5, "condition_dropout": 0.9},
        },
        objective=OBJECTIVE,
        sample={"num_inference_steps": LEVELS},
        train={"max_train_steps": 2},
    )
    assert run(cfg, body=just_saved) == [0], log(cfg)
    subject = load_subject(tmp_path / "run")
    [batch] = subject.batches(num_samples=4, batch_size=4, seed=0)
    condition = subject.condition(batch)
    assert torch.equal(condition["class_labels"], batch.class_labels)
    small = torch.nn.functional.interpolate(batch.pixel_values, 4, mode="area")
    torch.testing.assert_close(condition["low_res"], small)
    one = report(tmp_path / "run", "--num_samples", "4", "--batch_size", "1", out=tmp_path / "one")["total"]["mean"]
    four = report(tmp_path / "run", "--num_samples", "4", "--batch_size", "4", out=tmp_path / "four")["total"]["mean"]
    assert one == pytest.approx(four, rel=1e-5)


def test_what_changes_the_numbers_and_what_does_not(trained, tmp_path):
    def total(name, *options):
        return report(trained, *options, out=tmp_path / name)["total"]["mean"]

    reference = total("reference", "--num_samples", "7", "--batch_size", "7")
    assert total("batch", "--num_samples", "7", "--batch_size", "3") == pytest.approx(reference, rel=1e-5)
    assert total("again", "--num_samples", "7", "--batch_size", "7") == reference
    checkpoints = trained / "checkpoints"
    others = {
        "seed": total("seed", "--num_samples", "7", "--seed", "1"),
        "clip": total("clip", "--num_samples", "7", "--no-clip_denoised"),
        "more": total("more"),
        "weights": total("weights", "--num_samples", "7", "--average", "weights"),
        "second average": total("second", "--num_samples", "7", "--average", "ema_0.5"),
    }
    older = report(checkpoints / "step-00000008", "--num_samples", "7", out=tmp_path / "older")
    others["older"] = older["total"]["mean"]
    assert older["step"] == 8
    newest = report(checkpoints / "step-00000009", "--num_samples", "7", "--batch_size", "7", out=tmp_path / "newest")
    assert newest["total"]["mean"] == reference
    distinct = [reference, *others.values()]
    assert all(abs(a - b) > 1e-4 * abs(a) for i, a in enumerate(distinct) for b in distinct[:i]), others


def pictures(folder: Path, images: list[np.ndarray]) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


def test_other_data_and_the_grid(nothing, tmp_path, capsys):
    """Resized 8-bit images are 8-bit images again; those of 16 bits, scaled in floating point, have no likelihood."""
    generator = np.random.RandomState(0)
    small = pictures(tmp_path / "small", [generator.randint(0, 256, (12, 20, 3), dtype=np.uint8) for _ in range(3)])
    found = report(nothing, "--data", str(small), out=tmp_path / "out")
    assert found["images"] == 3 and found["data"] == str(small) and not found["is_training_data"]
    one = report(nothing, "--data", str(small), "--num_samples", "1", out=tmp_path / "one")
    assert one["total"]["standard_error"] is None
    deep = pictures(tmp_path / "deep", [generator.randint(0, 65536, (8, 8), dtype=np.uint16)])
    assert main(["evaluate", str(nothing), "--metrics", "bpd", "--data", str(deep)]) == 4
    assert "row 0 is no 8-bit image (it has more than 8 bits" in capsys.readouterr().err


def test_class_labels_of_other_data_must_mean_the_same(trained, tmp_path, capsys):
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pets" / name / "a.png")
    assert main(["evaluate", str(trained), "--metrics", "bpd", "--data", str(tmp_path / "pets")]) == 2
    assert "the data have the classes cat, dog, the model was trained on zero, one," in capsys.readouterr().err


def test_refusals(nothing, tmp_path, capsys, monkeypatch):
    parts = make_parts(tmp_path / "parts")
    latent = {"space": {"kind": "latent", "vae": str(parts / "vae")}}
    for name, sections, problem in [
        ("latent", latent, "bits per dimension are those of 8-bit pixels, and this model draws latents"),
        ("edm", {"objective": {"kind": "edm"}}, "this model was trained with edm"),
        ("flow", {"objective": {"kind": "flow"}}, "this model was trained with flow"),
        ("new", {}, "has no checkpoint: give"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(dump(config(tmp_path / name, **sections)))
        assert main(["evaluate", str(tmp_path / name), "--metrics", "bpd"]) == 2, name
        assert problem in capsys.readouterr().err
    for options, problem in [
        (["--average", "ema_0.7"], "--average ema_0.7: the run kept ema_0.9, ema_0.5, beside weights"),
        (["--num_samples", "0"], "--num_samples must be at least 1, got 0"),
    ]:
        assert main(["evaluate", str(nothing), "--metrics", "bpd", *options]) == 2
        assert problem in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", str(nothing), "--metrics", "bpd"]) == 2
    assert "works in one process" in capsys.readouterr().err


def test_data_from_python_must_be_named(nothing, tmp_path, capsys):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "checkpoints").symlink_to(nothing / "checkpoints")
    (copy / "run.json").write_text((nothing / "run.json").read_text())
    cfg = config(copy, conditioning={"kind": "none"}, objective={**OBJECTIVE, "prediction_type": "sample"})
    cfg = replace(cfg, data=replace(cfg.data, dataset_name=None))
    (copy / "config.yaml").write_text(dump(cfg))
    assert main(["evaluate", str(copy), "--metrics", "bpd"]) == 2
    assert "passed from Python: name the data to measure on with --data" in capsys.readouterr().err


def test_mean_and_error():
    assert mean_and_error(torch.tensor([1.0, 3.0])) == {"mean": 2.0, "standard_error": pytest.approx(1.0)}
    assert mean_and_error(torch.tensor([1.0])) == {"mean": 1.0, "standard_error": None}
