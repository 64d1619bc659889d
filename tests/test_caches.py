"""Cached latents and embeddings: what training sees is what it would see without them, and nothing is loaded for it."""

import os
import pickle
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from finetune import caches
from finetune.batching import collate
from finetune.cached import latent_keys
from finetune.caches import fill_caches
from finetune.data import open_data
from finetune.errors import DataError, ProcessError
from finetune.images import decode, normalised, prepare, strict_pillow
from finetune.modules import build_modules
from finetune.processes import build_accelerator
from finetune.rows import Rows
from finetune.seeding import PositionRandom
from finetune.space import build_space
from finetune.trainer import Trainer
from forked import log, metrics, run, state, whole
from tiny_models import config, make_parts, parts  # noqa: F401  (a fixture)

COLOURS = {
    "red": (220, 20, 30), "green": (20, 190, 40), "blue": (30, 40, 210), "white": (250, 250, 250),
    "yellow": (230, 220, 30), "cyan": (30, 220, 220), "pink": (230, 40, 200), "black": (5, 5, 5),
}  # fmt: skip


def pictures(folder: Path, n: int = 12, sizes=((24, 20),)) -> Path:
    """n pictures of these sizes, of a colour that its caption names, darker towards one corner: crops differ."""
    folder.mkdir(parents=True)
    for i in range(n):
        width, height = sizes[i % len(sizes)]
        ramp = np.linspace(1, 0.2, width)[None, :, None] * np.linspace(1, 0.5, height)[:, None, None]
        name, colour = list(COLOURS.items())[i % len(COLOURS)]
        pixels = ramp * np.array(colour) * (1 - i / (4 * n))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02}.png")
        (folder / f"{i:02}.txt").write_text(f"a {name}")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture
def make(parts, images, tmp_path):  # noqa: F811
    """make(name, **sections): a run in tmp_path/name on the pictures, in latent space and by text."""

    def config_of(name="run", *, dtype="float32", latents=True, text=True, **sections):
        cache = {"latents": latents, "text": text, "folder": str(tmp_path / "cache"), "dtype": dtype}
        settings = {
            "data": {"train_data_dir": str(images), "random_flip": True, "variants": 2, "dataloader_num_workers": 0},
            "conditioning": {"condition_dropout": 0.2},
            "train": {"max_train_steps": 6, "global_batch_size": 4},
            "optimizer": {"learning_rate": 1e-3, "lr_warmup_steps": 2},
            "checkpoint": {"checkpointing_steps": 100},
            "tracking": {"log_every": 1, "report_to": "none"},
            "sample": {"num_images": 2, "num_inference_steps": 2},
            "cache": cache if latents or text else {},
        }
        for section, values in sections.items():
            settings[section] = {**settings.get(section, {}), **values}
        return replace(config(parts, "latent", "text", "unet2d_condition", **settings), output_dir=str(tmp_path / name))

    return config_of


def opened(cfg):
    """The data of a run with its caches filled, its modules, and what was done."""
    accelerator = build_accelerator(cfg)
    data = open_data(cfg, progress=False)
    modules = build_modules(cfg, data, accelerator.device, global_batch=4)
    return *fill_caches(cfg, data, modules, accelerator), modules


def losses(cfg, body=None) -> np.ndarray:
    """The loss of each step of a real training."""
    assert run(cfg, body=body) == [0], log(cfg)
    return np.array([line["loss"] for line in metrics(cfg)])


def test_fifty_losses_with_and_without_the_caches(make):
    long = {"train": {"max_train_steps": 50}}
    off = losses(make("off", latents=False, text=False, **long))
    assert len(off) == 50
    assert np.abs(losses(make("float32", **long)) - off).max() < 1e-6
    assert 0 < np.abs(losses(make("float16", dtype="float16", **long)) - off).max() < 1e-4

    def of_other_rows(cfg):
        trainer = Trainer(cfg)
        latents = replace(trainer.data.latents, places=np.roll(trainer.data.latents.places, 1, 0))
        trainer.data = replace(trainer.data, latents=latents)
        trainer.fit()

    for name, control, body in (("draws", {"seed": 1}, None), ("rows", {}, of_other_rows)):
        cfg = replace(make(name, train={"max_train_steps": 5}), **control)
        assert np.abs(losses(cfg, body) - off[:5]).max() > 1e-3, f"negative control: other {name}, other losses"


def test_the_posterior_is_drawn_anew_in_every_step(make):
    data, _, modules = opened(make())
    row = int(data.rows[0])
    [sample] = data.samples([row], [0])
    batch = collate([((position, 0, row), sample) for position in range(3)])
    x0 = modules.space.x0(batch, PositionRandom(0, batch.positions), "cpu")
    assert not torch.equal(x0[0], x0[1]) and batch.pixel_values is None
    again = modules.space.x0(batch, PositionRandom(0, batch.positions), "cpu")
    assert torch.equal(x0, again)


def test_variants_take_turns_without_a_cache_too_and_captions_do_not(make, images):
    rules = {"caption_column": ["text", "more"]}
    cfg = make(latents=False, text=False, data={"variants": 3, **rules})
    frames = [{"bytes": file.read_bytes(), "path": None} for file in sorted(images.glob("*.png"))]
    words = {"text": [f"a{i}" for i in range(12)], "more": [f"b{i}" for i in range(12)]}
    dataset = Dataset.from_dict({"image": frames, **words})
    rows = list(range(12))
    cfg = replace(cfg, data=replace(cfg.data, train_data_dir=None))
    turns = [open_data(cfg, dataset=dataset, progress=False).samples(rows, [epoch] * 12) for epoch in range(6)]
    pixels = [torch.stack([sample.pixels for sample in turn]) for turn in turns]
    captions = [[sample.caption for sample in turn] for turn in turns]
    for epoch in range(3):
        assert torch.equal(pixels[epoch], pixels[epoch + 3]) and captions[epoch] != captions[epoch + 3]
        assert not torch.equal(pixels[epoch], pixels[(epoch + 1) % 3])
    endless = open_data(replace(cfg, data=replace(cfg.data, variants=None)), dataset=dataset, progress=False)
    plain = [torch.stack([s.pixels for s in endless.samples(rows, [epoch] * 12)]) for epoch in (0, 3)]
    assert torch.equal(plain[0], pixels[0]) and not torch.equal(plain[1], pixels[3])


def check_batches(trainer: Trainer) -> int:
    """Compare each sample of an epoch and a half with its own row: caption, crop, latent. Returns how many."""
    plain = open_data(trainer.cfg, progress=False)
    plain = plain.in_buckets(trainer.modules.side_multiple)
    order = plain.order(global_batch=trainer.global_batch)
    vae = build_space(replace(trainer.cfg, cache=replace(trainer.cfg.cache, latents=False)))
    loader, seen = iter(trainer.loader()), 0
    for _ in range(trainer.steps):
        batch = next(loader)
        assert batch.pixel_values is None
        for i, (row, position) in enumerate(zip(batch.rows.tolist(), batch.positions.tolist(), strict=True)):
            epoch, due = order.place(position)
            assert row == due
            with strict_pillow():
                image = decode(plain.image_bytes(row), plain.rules).image
            shape = {"shape": plain.shape(row)}
            made = prepare(image, plain.rules, seed=plain.seed, epoch=epoch % 2, row=row, **shape)
            assert batch.captions[i] in plain.captions(row)
            assert batch.time_ids[i].tolist() == list(made.time_ids)
            expected = vae.moments(normalised(made.pixels)[None])[0]
            torch.testing.assert_close(batch.moments[i], expected, rtol=0, atol=1e-5)
            other = prepare(image, plain.rules, seed=plain.seed, epoch=(epoch + 1) % 2, row=row, **shape)
            if other.time_ids != made.time_ids:  # negative control: the other variant is another latent
                another = vae.moments(normalised(other.pixels)[None])[0]
                assert not torch.allclose(batch.moments[i], another, rtol=0, atol=1e-3)
                seen += 1
    return seen


def test_each_latent_comes_with_its_own_caption_and_crop(make, monkeypatch):
    read, texts = [], Rows.texts
    monkeypatch.setattr(Rows, "texts", lambda self, numbers: read.append(len(numbers)) or texts(self, numbers))
    assert check_batches(Trainer(make(train={"max_train_steps": 9}))) > 5
    assert read == [12], "once, for what the plan says of them and for their embeddings"


def test_no_image_is_read_for_its_latents(make, images):
    frames = [{"bytes": file.read_bytes(), "path": file.name} for file in sorted(images.glob("*.png"))]
    dataset = Dataset.from_dict({"image": frames, "text": [f"a {i}" for i in range(12)]})
    cfg = make(text=False)
    cfg = replace(cfg, data=replace(cfg.data, train_data_dir=None))
    plain = open_data(cfg, dataset=dataset, progress=False)
    accelerator = build_accelerator(cfg)
    modules = build_modules(cfg, plain, accelerator.device, global_batch=4)
    data, _ = fill_caches(cfg, plain, modules, accelerator)
    for light, row in zip(data.latents.table.read(range(12)), data.table.read(range(12)), strict=True):
        assert row.content and light == replace(row, content=None) and light.path == row.path
    assert "image" not in data.latents.table.dataset[[3]] and "image" in data.table.dataset[[3]]
    captions = [[sample.caption for sample in each.samples(range(12), [0] * 12)] for each in (plain, data)]
    assert captions[0] == captions[1] == [f"a {i}" for i in range(12)]


@pytest.fixture
def in_buckets(tmp_path):
    """The settings of data of three shapes."""
    folder = pictures(tmp_path / "mixed", 18, sizes=((24, 20), (60, 18), (18, 60)))
    return {"train_data_dir": str(folder), "buckets": "auto"}


@pytest.mark.parametrize("processes", [1, 2])
def test_so_it_does_in_buckets(make, in_buckets, processes):
    cfg = make(data=in_buckets, train={"max_train_steps": 9})
    assert run(cfg, processes=processes, body=probe) == [0] * processes, log(cfg)
    counts = [int(count) for count in re.findall(r"checked (\d+)", log(cfg))]
    assert len(counts) == processes and sum(counts) > 5
    shapes = re.search(r"shapes (.*)", log(cfg))[1]
    assert shapes == "[(8, 32), (16, 16), (32, 8)]"


def probe(cfg):
    """Of a process of two: fill the caches together, then look at the samples of its own."""
    trainer = Trainer(cfg)
    print("checked", check_batches(trainer), trainer.cached)
    print("shapes", sorted({trainer.data.shape(int(row)) for row in trainer.data.rows}))
    trainer.fit()


def test_records_are_bit_for_bit_those_of_a_plain_loop(make, in_buckets, monkeypatch):
    """Whatever is overlapped: batches of one shape in the order of the rows, filled up with their first picture."""
    monkeypatch.setattr(caches, "encode_batch", lambda resolution: 5)
    cfg = make(dtype="float16", text=False, data=in_buckets)
    accelerator, plain = build_accelerator(cfg), open_data(cfg, progress=False)
    modules = build_modules(cfg, plain, accelerator.device, global_batch=4)
    plain = plain.in_buckets(modules.side_multiple)
    data, _ = fill_caches(cfg, plain, modules, accelerator)
    alike, others = {}, 0
    for row, variant in latent_keys(plain)[0].tolist():
        alike.setdefault(plain.shape(row), []).append((row, variant))
    for same in alike.values():
        for start in range(0, len(same), 5):
            batch = same[start : start + 5]
            pixels = [normalised(plain.samples([row], [variant])[0].pixels) for row, variant in batch]
            moments = modules.space.moments(torch.stack(pixels + pixels[:1] * (5 - len(batch)))).half()
            for (row, variant), record in zip(batch, moments, strict=False):
                assert torch.equal(data.samples([row], [variant])[0].moments, record)
                others += not torch.equal(data.samples([row], [1 - variant])[0].moments, record)
    assert others > 9, "negative control: the other variant"
    assert len(alike) == 3 and any(len(same) % 5 for same in alike.values())


def test_two_processes_make_and_read_them(make):
    cfg = make(train={"max_train_steps": 6})
    assert run(cfg, processes=2, body=probe) == [0, 0]
    assert log(cfg).count("checked") == 2 and "latents: 0 reused, 24 made" in log(cfg)
    alone = make("alone")
    assert run(alone) == [0]
    assert "cache hit: latents, all 24 found" in log(alone)
    for one, two in zip(metrics(alone), metrics(cfg), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_copies_of_an_image_share_one_record(make, images, tmp_path):
    twice = tmp_path / "twice"
    shutil.copytree(images, twice)
    for file in images.glob("0*.png"):
        shutil.copy(file, twice / f"copy{file.name}")
        (twice / f"copy{file.stem}.txt").write_text("a copy")
    data, line, _ = opened(make(data={"train_data_dir": str(twice), "center_crop": True, "random_flip": False,
                                      "variants": None}))  # fmt: skip
    assert "latents: 0 reused, 12 made" in line and len(data) == 22
    places = data.latents.places[:, 0]
    assert len(np.unique(places, axis=0)) == 12
    assert all(sample.moments is not None for sample in data.samples(range(22), [0] * 22))


def test_loader_processes_are_given_where_to_read_and_no_model(make):
    data, _, _ = opened(make())
    sent = pickle.dumps(data)
    [here], [there] = data.samples([5], [1]), pickle.loads(sent).samples([5], [1])
    assert torch.equal(here.moments, there.moments) and len(sent) < 50_000


def test_a_second_start_loads_neither_vae_nor_text_encoder(make, parts, images, tmp_path):  # noqa: F811
    own = tmp_path / "parts"
    shutil.copytree(parts, own)
    places = {"space": {"vae": str(own / "vae")}, "conditioning": {"text_encoder": str(own / "text_encoder")}}
    assert run(make("first", **places), body=whole) == [0]
    second = make("second", **places)
    assert run(second, body=lambda cfg: print(Trainer(cfg).cached)) == [0]
    assert "cache hit: latents, all 24 found" in log(second) and "is loaded" not in log(second)

    def without_weights(cfg):
        """The files of weights have the size and the time of those that were hashed, and hold nothing."""
        for file in own.rglob("*.safetensors"):
            state, kept = file.stat(), file.read_bytes()
            file.write_bytes(bytes(len(kept)))
            os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
            spoiled.append((file, kept, state))
        try:
            trainer = Trainer(cfg)
            trainer.sample = lambda **_: None
            trainer.fit()
        finally:
            for file, kept, state in spoiled:
                file.write_bytes(kept)
                os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))

    spoiled = []

    third = make("third", **places)
    assert run(third, body=without_weights) == [0], log(third)
    fourth = make("fourth", data={"variants": 3}, **places)  # negative control: one more variant needs the VAE
    assert run(fourth, body=without_weights) == [2] and "no AutoencoderKL could be loaded" in log(fourth)
    pictures_too = make("fifth", **places)
    assert run(pictures_too) == [0]
    assert "vae is loaded (for pictures and the export)" in log(pictures_too)
    assert [line["loss"] for line in metrics(pictures_too)] == [line["loss"] for line in metrics(third)]


def test_resume_with_a_warm_cache_is_bit_for_bit(make):
    saved = {"checkpoint": {"checkpointing_steps": 2}}
    whole_run, parted = make("whole", **saved), make("parted", **saved)
    assert run(whole_run) == [0] and run(parted, stop=(3, signal.SIGTERM)) == [75] and run(parted) == [0]
    assert "bit for bit" in log(parted) or "cache hit" in log(parted)
    assert state(parted, 6) == state(whole_run, 6) != {}


def test_only_what_changed_is_made_anew(make, images, tmp_path):
    own = tmp_path / "pictures"
    shutil.copytree(images, own)
    data = {"train_data_dir": str(own)}
    assert "latents: 0 reused, 24 made" in opened(make(data=data))[1]
    Image.new("RGB", (24, 20), "orange").save(own / "03.png")
    line = opened(make(data=data))[1]
    assert "latents: 22 reused, 2 made" in line and "text: 9 reused, 0 made" in line
    (own / "05.txt").write_text("an orange")
    line = opened(make(data=data))[1]
    assert "latents: 24 reused, 0 made" in line and "text: 8 reused, 1 made" in line
    for free in ({"optimizer": {"learning_rate": 1e-5}}, {"data": {**data, "on_error": "skip"}}):
        assert "latents: 24 reused" in opened(make(**{"data": data, **free}))[1]
    assert "latents: 12 reused, 0 made" in opened(make(data=data | {"variants": 1}))[1]
    for other in ({"data": data | {"background": "black"}}, {"data": data, "dtype": "float16"}):
        assert "latents: 0 reused, 24 made" in opened(make(**other))[1]


def test_other_weights_make_other_latents_and_a_copy_does_not(make, parts, tmp_path):  # noqa: F811
    opened(make())
    shutil.copytree(parts / "vae", tmp_path / "copy")
    assert "latents: 24 reused" in opened(make(space={"vae": str(tmp_path / "copy")}))[1]
    other = make_parts(tmp_path / "other")
    from safetensors.torch import load_file, save_file

    file = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["quant_conv.bias"] += 0.25
    save_file(weights, file, metadata={"format": "pt"})
    assert "latents: 0 reused, 24 made" in opened(make(space={"vae": str(other / "vae")}))[1]


def test_crops_count_only_where_they_are_drawn(make):
    """With the centre cropped and no flip, a latent belongs to the image alone, whichever row it is in."""
    cfg = make(data={"random_flip": False, "center_crop": True, "variants": None})
    data = open_data(cfg, progress=False)
    assert (latent_keys(data)[1] == latent_keys(replace(data, seed=7))[1]).all()
    drawn = open_data(make(), progress=False)
    assert (latent_keys(drawn)[1] != latent_keys(replace(drawn, seed=7))[1]).any(1).all()


def test_a_row_that_cannot_be_read_any_more(make, images, tmp_path, monkeypatch):
    own = tmp_path / "pictures"
    shutil.copytree(images, own)

    def spoilt(cfg):
        accelerator = build_accelerator(cfg)
        data = open_data(cfg, progress=False)
        modules = build_modules(cfg, data, accelerator.device, global_batch=4)
        (own / "04.png").write_bytes(b"no picture")
        return fill_caches(cfg, data, modules, accelerator)

    with pytest.raises(DataError, match=r"04.png was changed since it was checked"):
        spoilt(make(data={"train_data_dir": str(own)}))
    shutil.copy(images / "04.png", own / "04.png")
    data, line = spoilt(make(data={"train_data_dir": str(own), "on_error": "skip", "random_flip": False}))
    assert "made" in line
    [sample] = data.samples([4], [0])
    assert sample.replaced.row == 4 and sample.row != 4 and sample.moments is not None


def test_a_process_that_cannot_make_its_share_ends_the_others(make, images, tmp_path):
    own = tmp_path / "pictures"
    shutil.copytree(images, own)

    def spoilt(cfg):
        keys_of = caches.latent_keys

        def after_the_check(data):
            (own / "05.png").write_bytes(b"no picture")  # the share of the second process
            return keys_of(data)

        caches.latent_keys = after_the_check
        Trainer(cfg)

    cfg = make(data={"train_data_dir": str(own), "variants": 1})
    codes = run(cfg, processes=2, body=spoilt, seconds=60)
    assert codes == [ProcessError.exit_code, DataError.exit_code]
    assert "process 0 waits for nobody: process 1 ended: DataError: 05.png was changed since it was" in log(cfg)


def test_a_damaged_record_is_made_anew(make, tmp_path, caplog):
    data, _, _ = opened(make())
    before = data.samples([3], [1])[0].moments
    [file] = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    shard, index = data.latents.places[3, 1].tolist()
    content = bytearray(file.read_bytes())
    content[data.latents.records.shards[shard].starts[0] + index * before.nbytes + 9] ^= 64
    file.write_bytes(content)
    os.utime(file, (1, 1))
    data, line, _ = opened(make())
    assert "latents: 23 reused, 1 made" in line and "is damaged" in caplog.text
    assert torch.equal(data.samples([3], [1])[0].moments, before)


def test_latents_that_are_not_finite_are_refused_with_their_row(make, monkeypatch):
    from finetune.space import LatentSpace

    moments = LatentSpace.moments
    monkeypatch.setattr(LatentSpace, "moments", lambda self, pixels: moments(self, pixels) * 1e30)
    with pytest.raises(DataError, match=r"00.png: the VAE .* not finite in float16: set cache.dtype float32"):
        opened(make(dtype="float16"))


def test_a_killed_build_keeps_what_was_finished(make, monkeypatch):
    from finetune import cache_store

    monkeypatch.setattr(cache_store, "SHARD_BYTES", 4 * 2 * 4 * 4 * 4 * 4)  # of four records
    monkeypatch.setattr(caches, "encode_batch", lambda resolution: 4)

    def dies(cfg):
        import os

        write, written = cache_store._write_shard, []

        def some(folder, records):
            if len(written) == 3:
                os._exit(9)
            written.append(write(folder, records))
            return written[-1]

        cache_store._write_shard = some
        Trainer(cfg)

    cfg = make()
    assert run(cfg, body=dies) == [9]
    line = opened(cfg)[1]
    assert "latents: 12 reused, 12 made" in line
