"""Images belong to their seeds; grids; the command."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler
from PIL import Image

from finetune import checkpoint
from finetune.errors import ConfigError
from finetune.sample import captions_of, draw, generate, grid, load_pipeline, wanted_conditions, write_grid
from finetune.sample_command import sample_main
from test_pipelines import pipeline_of
from tiny_models import PROMPTS, config, parts  # noqa: F401

KINDS = {
    "ddpm": (("pixel", "none"), {}),
    "ddim": (("pixel", "none"), {"scheduler": "ddim"}),
    "stable diffusion": (("latent", "text", "unet2d_condition"), {"scheduler": "euler_ancestral"}),
    "ours": (("latent", "class_label"), {"scheduler": "ddpm"}),
}


def made(parts, kind):  # noqa: F811
    combination, sections = KINDS[kind]
    return pipeline_of(config(parts, *combination, sample=sections), prediction_type="v_prediction")


def arrays(images):
    return np.stack([np.asarray(image) for image in images]).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_belongs_to_its_seed_whatever_the_batch(parts, kind):  # noqa: F811
    pipeline = made(parts, kind)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0 if "dd" in kind else 2.0}
    options |= {"prompts": PROMPTS} if kind == "stable diffusion" else {}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole = arrays(generate(pipeline, num_images=8, seed=3, batch_size=8, **options))
    assert torch.equal(torch.get_rng_state(), state), "the global random state must not move"
    torch.manual_seed(6)
    for batch_size in (1, 3, None):
        images = arrays(generate(pipeline, num_images=8, seed=3, batch_size=batch_size, **options))
        assert np.abs(images - whole).max() <= 1
    shift = {"class_labels": [1, 2, 0]} if kind == "ours" else {}  # the condition of image i + 1
    shift = {"prompts": PROMPTS[::-1]} if kind == "stable diffusion" else shift
    later = arrays(generate(pipeline, num_images=7, seed=4, **{**options, **shift}))
    assert np.abs(later - whole[1:]).max() <= 1, "image i uses seed + i"
    assert np.abs(whole[0] - whole[6]).max() > 5, "negative control: another seed is another image"


def test_ddim_re_derives_the_noise_from_the_clipped_image(parts, monkeypatch):  # noqa: F811
    seen = []
    step = DDIMScheduler.step

    def spy(*positional, **named):
        seen.append(named["use_clipped_model_output"])
        return step(*positional, **named)

    monkeypatch.setattr(DDIMScheduler, "step", spy)
    generate(made(parts, "ddim"), num_images=1, seed=0, num_inference_steps=2)
    assert seen == [True] * 2


def test_conditions_fill_the_images(parts):  # noqa: F811
    classes, text = made(parts, "ours"), made(parts, "stable diffusion")
    assert wanted_conditions(classes, 5) == {"class_labels": [0, 1, 2, 0, 1]}
    assert wanted_conditions(classes, 3, class_labels=[2]) == {"class_labels": [2, 2, 2]}
    assert captions_of(classes, {"class_labels": [2, 0]}) == ["two", "zero"]
    assert wanted_conditions(text, 3, prompts=["a", "b"]) == {"prompt": ["a", "b", "a"]}
    assert captions_of(text, {"prompt": ["a", "b"]}) == ["a", "b"]
    assert wanted_conditions(made(parts, "ddpm"), 3) == {} and captions_of(classes, {}) is None


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("ddpm", {"prompts": ["a"]}, "takes no prompts"),
        ("ddpm", {"class_labels": [1]}, "takes no class labels"),
        ("ddpm", {"guidance_scale": 2}, "no condition to guide with"),
        ("ddpm", {"num_inference_steps": 2000}, "lie in 1..1000"),
        ("ddim", {"num_inference_steps": 30}, "use 25 or 40"),
        ("ddim", {"eta": 0.5}, "a DDIMPipeline takes no eta"),
        ("ours", {"s_churn": 2.0}, "ddpm does not use it"),
        ("stable diffusion", {}, "at least one prompt"),
        ("stable diffusion", {"prompts": ["a"], "guidance_scale": 0.5}, "ignores a guidance_scale below 1"),
        ("ours", {"class_labels": [3]}, "are 0..2, got 3"),
        ("ours", {"num_images": 0}, "at least 1"),
    ],
)
def test_what_a_pipeline_cannot_take_is_refused(parts, kind, arguments, message):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        generate(made(parts, kind), **{"num_images": 1, "seed": 0, **arguments})


def test_grid_places_enlarges_and_labels():
    colours = ["red", "lime", "blue", "black", "white"]
    images = [Image.new("RGB", (32, 32), colour) for colour in colours]
    plain = grid(images)
    assert plain.size == (3 * 100 + 4, 2 * 100 + 4)
    for i in range(5):
        assert plain.getpixel((4 + 100 * (i % 3) + 50, 4 + 100 * (i // 3) + 50)) == images[i].getpixel((0, 0))
    labelled = grid(images, [*colours[:4], "a very long prompt " * 9], columns=5)
    assert labelled.size == (5 * 100 + 4, 96 + 28 + 8)
    strips = [np.asarray(labelled.crop((4 + 100 * i, 101, 100 + 100 * i, 128))) for i in range(5)]
    assert all(strip.min() < 100 for strip in strips), "every label is drawn"
    assert np.asarray(labelled.crop((401, 101, 404, 128))).min() == 255, "a long label stays in its cell"
    dots = np.zeros((2, 2), "uint8")
    dots[0, 0] = 255
    enlarged = np.asarray(grid([Image.fromarray(dots)]))[4:100, 4:100, 0]
    assert set(np.unique(enlarged)) == {0, 255} and (enlarged[:48, :48] == 255).all()
    assert grid([Image.new("L", (200, 100))]).size == (208, 108)


def test_grid_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="all of one size"):
        grid([Image.new("L", (4, 4)), Image.new("L", (5, 4))])
    with pytest.raises(ValueError, match="one label per image, got 2 for 1"):
        grid([Image.new("L", (4, 4))], ["a", "b"])


def test_a_grid_is_the_images_of_generate(parts, tmp_path):  # noqa: F811
    cfg = config(parts, condition="class_label", sample={"num_images": 4, "sample_seed": 9, "num_inference_steps": 3})
    pipeline = pipeline_of(cfg)
    drawn = draw(pipeline, cfg)
    assert list(drawn) == [0, 1, 2, 3]
    write_grid(pipeline, cfg, tmp_path / "samples" / "step-00000003.png", list(drawn.values()))
    images = generate(pipeline, num_images=4, seed=9, num_inference_steps=3, guidance_scale=1.0)
    expected = grid(images, ["zero", "one", "two", "zero"], columns=3)  # one per class
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / "step-00000003.png")), np.asarray(expected))


# -- the command -------------------------------------------------------------------------------------------------------


def saved_run(parts, tmp_path, kind) -> Path:  # noqa: F811
    made(parts, kind).save_pretrained(tmp_path / "run" / "pipeline")
    (tmp_path / "run" / "config.yaml").write_text("sample: {num_inference_steps: 4, guidance_scale: 1.0}\n")
    return tmp_path / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_command_draws_from_a_run(parts, tmp_path, kind, capsys):  # noqa: F811
    run = saved_run(parts, tmp_path, kind)
    words = {"stable diffusion": ["--prompt", *PROMPTS], "ours": ["--class_label", "two", "0"]}.get(kind, [])
    words += ["--steps", "4"] if kind == "ours" else []  # ours has its own default, the stock ones the run's
    sample_main([str(run), *words, "--seed", "2", "--num_images", "3", "--out", str(tmp_path / "out")])
    given = {"stable diffusion": {"prompts": PROMPTS}, "ours": {"class_labels": [2, 0]}}.get(kind, {})
    expected = generate(made(parts, kind), num_images=3, seed=2, num_inference_steps=4, guidance_scale=1.0, **given)
    for i, image in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / f"{i:04d}.png")), np.asarray(image))
    assert (tmp_path / "out" / "grid.png").is_file() and "3 images and grid.png in" in capsys.readouterr().out


def drawn(run, tmp_path, *words):
    """The first image that the command draws."""
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    sample_main([str(run), "--num_images", "1", "--out", str(out), *words])
    return np.asarray(Image.open(out / "0000.png")).astype(int)


def test_command_takes_the_further_settings(parts, tmp_path):  # noqa: F811
    """Each changes the image; a stock pipeline becomes ours for it."""
    run = saved_run(parts, tmp_path, "ddim")
    plain = drawn(run, tmp_path)
    for words in (["--eta", "1"], ["--respacing", "7"], ["--steps", "30"], ["--scheduler", "heun", "--steps", "7"]):
        if words == ["--steps", "30"]:
            with pytest.raises(ConfigError, match="divides num_train_timesteps 1000, got 30"):
                drawn(run, tmp_path, *words)
            words += ["--scheduler", "ddim"]
        assert np.abs(drawn(run, tmp_path, *words) - plain).max() > 5
    assert np.abs(drawn(run, tmp_path, "--eta", "0") - plain).max() <= 1
    ours, label = saved_run(parts, tmp_path / "b", "ours"), ["--class_label", "two", "--steps", "4"]
    guided = drawn(ours, tmp_path, *label, "--guidance_scale", "4")
    for words in (["--guidance_rescale", "0.9"], ["--guidance_interval", "0.1", "2"]):
        assert np.abs(drawn(ours, tmp_path, *label, "--guidance_scale", "4", *words) - guided).max() > 0
    for words, message in (
        (["--eta", "0.5"], "eta: ddpm does not use it"),
        (["--guidance_rescale", "0.5"], "guidance_scale 1 is none"),
        (["--guidance_interval", "2", "1", "--guidance_scale", "3"], "low below high"),
        (["--scheduler", "edm_heun"], "does not remove the noise of objective.kind ddpm"),
    ):
        with pytest.raises(ConfigError, match=message):
            drawn(ours, tmp_path, *label, *words)


def test_command_guides_by_a_weaker_model(parts, tmp_path):  # noqa: F811
    """A pipeline, its UNet, a checkpoint with the same weights: all the same guide; itself is no guide."""
    run = saved_run(parts, tmp_path, "ours")
    unet = made(parts, "ours").unet
    with torch.no_grad():
        for weight in unet.parameters():
            weight.mul_(0.8)
    weaker = tmp_path / "weaker"
    unet.save_pretrained(weaker / "pipeline" / "unet")
    state = {name: tensor for name, tensor in unet.state_dict().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    save = {"state": {"step": 3}}
    plain = checkpoint.save(tmp_path / "a", parts={"model": state}, **save)
    averaged = checkpoint.save(tmp_path / "b", parts={"model": zeros, "ema_0.9": state, "ema_0.5": zeros}, **save)
    words = ["--class_label", "0", "--steps", "4", "--guidance_scale", "3"]
    images = [drawn(run, tmp_path, *words, "--autoguidance", str(path))
              for path in (weaker, weaker / "pipeline", weaker / "pipeline" / "unet", plain, averaged)]  # fmt: skip
    assert all(np.array_equal(image, images[0]) for image in images)
    none, itself = drawn(run, tmp_path, *words[:4]), drawn(run, tmp_path, *words, "--autoguidance", str(run))
    assert np.abs(itself - none).max() <= 1 < np.abs(images[0] - none).max()
    other = saved_run(parts, tmp_path / "c", "ddpm")
    empty = tmp_path / "empty"
    empty.mkdir()
    (plain / "model.safetensors").write_bytes(b"broken")
    of_edm, of_noise = tmp_path / "edm", tmp_path / "noise"
    for folder, trained in ((of_edm, EDMEulerScheduler()), (of_noise, DDPMScheduler())):
        unet.save_pretrained(folder / "unet")
        trained.save_pretrained(folder / "scheduler")
    with pytest.raises(ConfigError, match="--guidance_scale other than 1"):
        drawn(run, tmp_path, *words[:4], "--guidance_scale", "1", "--autoguidance", str(weaker))
    for path, message in (
        (other, "both must take the same input and condition"),
        (empty, "holds no UNet"),
        (tmp_path / "nowhere", "neither a folder"),
        (plain, "is not a whole checkpoint"),
        (of_edm, "removes the noise of EDM, the model that of DDPM"),
        (of_noise, "has prediction_type epsilon, the model v_prediction"),
    ):
        with pytest.raises(ConfigError, match=message):
            drawn(run, tmp_path, *words, "--autoguidance", str(path))


def test_command_refuses_to_guide_from_what_was_never_trained(parts, tmp_path):  # noqa: F811
    run = saved_run(parts, tmp_path, "ours")
    words = ["--class_label", "0", "--steps", "2", "--guidance_scale", "2"]
    drawn(run, tmp_path, *words)
    index = run / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"dropped": ""}))
    with pytest.raises(ConfigError, match="condition_dropout 0"):
        drawn(run, tmp_path, *words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["ddpm", "unipc"])
def test_command_changes_the_scheduler(parts, tmp_path, kind, name):  # noqa: F811
    words = ["--prompt", "a"] if kind == "stable diffusion" else []
    words += ["--scheduler", name, "--steps", "2", "--num_images", "1"]
    sample_main([str(saved_run(parts, tmp_path, kind) / "pipeline"), *words, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "0000.png").is_file()


def command(*words) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "finetune.cli", "sample", *words], capture_output=True, text=True)


def test_command_refuses_before_torch_is_loaded(tmp_path):
    code = (
        "import sys\nfrom finetune.sample_command import sample_main\nfrom finetune.errors import ConfigError\n"
        "try: sample_main(sys.argv[1:])\n"
        "except ConfigError as error: print(error); sys.exit('torch' in sys.modules)\n"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for words, message in {
        (str(tmp_path / "none"), "--out", "x"): "is neither a folder",
        (str(tmp_path), "--out", "x"): "holds no pipeline",
        ("a/b", "--out", str(tmp_path / "full")): "not empty",
        ("a/b", "--out", "x", "--num_images", "0"): "--num_images must be at least 1",
        ("a/b", "--out", "x", "--num_images", "1", "--prompt", "a", "b"): "less than the 2 prompts",
        ("a/b", "--out", "x", "--guidance_scale", "-1"): "--guidance_scale must be at least 0",
    }.items():
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0 and message in done.stdout, (words, done.stdout, done.stderr)


def test_command_exits_with_2(tmp_path):
    done = command(str(tmp_path / "none"), "--out", "x")
    assert done.returncode == 2 and "neither a folder" in done.stderr and "Traceback" not in done.stderr


def test_pipelines_of_others_are_refused(parts, tmp_path):  # noqa: F811
    run = saved_run(parts, tmp_path, "ddpm")
    index = run / "pipeline" / "model_index.json"
    original = index.read_text()
    index.write_text(original.replace("DDPMPipeline", "LDMPipeline"))
    with pytest.raises(ConfigError, match="holds a LDMPipeline: only"):
        load_pipeline(str(run))
    index.write_text(original.replace('"diffusers",\n    "UNet2DModel"', '"antigravity",\n    "UNet2DModel"'))
    with pytest.raises(ConfigError, match="antigravity"):
        load_pipeline(str(run))
    assert "antigravity" not in sys.modules
    index.write_text(original)
    load_pipeline(str(run))
    weights = run / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_pipeline(str(run))


def test_command_refuses_labels_that_are_none(parts, tmp_path):  # noqa: F811
    run = saved_run(parts, tmp_path, "ours")
    for word, message in (("seven", "is not a number or one of zero, one, two"), ("3", "are 0..2, got 3")):
        with pytest.raises(ConfigError, match=message):
            sample_main([str(run), "--class_label", word, "--steps", "1", "--out", str(tmp_path / "out")])
