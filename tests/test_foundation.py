"""What a pretrained pipeline decides; the loss of a step beside one computed by hand with diffusers' own classes."""

import hashlib
import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DModel
from PIL import Image

import tiny_pipelines
from finetune.batching import make_loader
from finetune.config_choices import SDXL, LatentSpace, TextSequence
from finetune.config_io import dump, load, load_text
from finetune.conversion import as_unet_pipeline
from finetune.data import open_data
from finetune.errors import ConfigError
from finetune.foundation import resolve, with_prompts
from finetune.models import bind
from finetune.modules import build_modules
from finetune.run import train
from finetune.sample import generate, load_pipeline
from finetune.schedulers import with_scheduler
from finetune.seeding import PositionRandom

pretrained, RESOLUTION = tiny_pipelines.pretrained, tiny_pipelines.RESOLUTION
CAPTIONS = ["a red three", "a blue seven", "five, green", "a quite pale one"]
POSITIONS = torch.arange(4)


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of noise images of several sizes with captions."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(4):
        noise = torch.randint(0, 256, (81 + 9 * i, 102, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    return folder


def configured(pipeline, images, *options):
    """The settings of one of diffusers' documented commands."""
    words = f"""--pretrained_model_name_or_path={pipeline} --train_data_dir={images} --resolution={RESOLUTION}
        --train_batch_size=4 --gradient_accumulation_steps=1 --max_train_steps=2 --learning_rate=1e-3 --max_grad_norm=1
        --lr_scheduler=constant --lr_warmup_steps=0 --report_to=none --seed=3 --mixed_precision=no
        --sample.num_inference_steps=2 --num_images=2 --output_dir={images.parent / "run"}""".split()
    return load([*words, *options], env={})


class Step:
    """The first step of the run that a config describes."""

    def __init__(self, cfg):
        self.cfg = cfg = resolve(cfg)
        data = open_data(cfg)
        options = {"rank": 0, "world_size": 1, "accumulation": 1, "micro_batch": 4, "pin_memory": False}
        self.batch = next(iter(make_loader(data, cfg, start=0, **options)))
        self.modules = build_modules(cfg, data, torch.device("cpu"), global_batch=4)

    @torch.no_grad()
    def loss(self, change=lambda condition: condition):
        """Per sample; change: of the condition."""
        random, modules = PositionRandom(self.cfg.seed, self.batch.positions), self.modules
        x0, condition = modules.space.encode(self.batch.pixel_values, random), modules.conditioner(self.batch, random)
        return modules.objective.loss(bind(modules.unet.eval(), change(condition)), x0, random).per_sample


@torch.no_grad()
def by_hand(folder, batch, seed, clip_skip=0):
    """The same loss from diffusers' classes: only the draws of posterior, noise, timesteps and dropout are ours."""
    pipeline, random = DiffusionPipeline.from_pretrained(folder), PositionRandom(seed, batch.positions)
    posterior = pipeline.vae.encode(batch.pixel_values).latent_dist
    latents = posterior.mean + posterior.std * random.normal("posterior", (4, 8, 8))
    latents = latents * pipeline.vae.config.scaling_factor
    noise, timesteps = random.normal("noise", (4, 8, 8)), random.integers("level", 1000)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    v = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if v else noise
    dropped = random.uniform("condition_dropout") < 0.1
    added = None
    if pipeline.config.get("force_zeros_for_empty_prompt"):
        text, null, pooled, pooled_null = pipeline.encode_prompt(batch.captions, clip_skip=clip_skip or None)
        pooled = torch.where(dropped[:, None], pooled_null, pooled)
        added = {"text_embeds": pooled, "time_ids": batch.time_ids}
    elif clip_skip:  # encode_prompt fails with transformers 5
        tokens = pipeline.tokenizer([*batch.captions, *[""] * 4], padding="max_length", return_tensors="pt").input_ids
        states = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states[-1 - clip_skip]
        text, null = pipeline.text_encoder.final_layer_norm(states).chunk(2)
    else:
        text, null = pipeline.encode_prompt(batch.captions, "cpu", 1, True)
    text = torch.where(dropped[:, None, None], null, text)
    predicted = pipeline.unet(noisy, timesteps, text, added_cond_kwargs=added).sample
    return (predicted - target).square().flatten(1).mean(1)


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_loss_is_the_one_computed_by_hand(pretrained, images, kind):
    step = Step(configured(pretrained(kind), images))
    truth = by_hand(pretrained(kind), step.batch, seed=3)
    torch.testing.assert_close(step.loss(), truth, rtol=1e-5, atol=1e-6)

    def other(loss):
        return (loss / truth - 1).abs().max() > 1e-4

    skipped = Step(configured(pretrained(kind), images, "--clip_skip=1"))
    torch.testing.assert_close(skipped.loss(), by_hand(pretrained(kind), step.batch, 3, clip_skip=1))
    assert other(skipped.loss())
    assert other(step.loss(lambda c: c | {"encoder_hidden_states": c["encoder_hidden_states"].roll(1, 0)}))
    if kind == "sdxl":
        assert other(step.loss(lambda c: c | {"time_ids": c["time_ids"][:, [2, 3, 0, 1, 4, 5]]}))
        assert other(step.loss(lambda c: c | {"text_embeds": torch.zeros_like(c["text_embeds"])}))


def test_some_captions_were_dropped_in_that_test(pretrained, images):
    step = Step(configured(pretrained("sdxl"), images, "--condition_dropout=0.6"))
    dropped = PositionRandom(3, step.batch.positions).uniform("condition_dropout") < 0.6
    condition = step.modules.conditioner(step.batch, PositionRandom(3, step.batch.positions))
    assert 0 < dropped.sum() < 4
    for name in ("encoder_hidden_states", "text_embeds"):  # both, and to zero: force_zeros_for_empty_prompt
        assert torch.equal(condition[name].flatten(1).any(1), ~dropped)
    assert torch.equal(condition["time_ids"], step.batch.time_ids) and condition["time_ids"].dtype == torch.float32


def test_sizes_are_those_of_the_crop(pretrained, images):
    batch = Step(configured(pretrained("sdxl"), images)).batch
    originals = {CAPTIONS[i]: [81 + 9 * i, 102] for i in range(4)}
    assert batch.time_ids[:, :2].tolist() == [originals[caption] for caption in batch.captions]
    assert batch.time_ids[:, 4:].unique().tolist() == [RESOLUTION]
    assert batch.time_ids[:, 2:4].any()  # random crops


@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_only_the_unet_differs_in_the_export(pretrained, images, tmp_path, kind, capsys):
    folder, cfg = pretrained(kind), configured(pretrained(kind), images, f"--output_dir={tmp_path / 'run'}")
    exported = train(cfg)

    def hashes(root, part):
        files = [path for path in (root / part).glob("*.safetensors")]
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    before, after = DiffusionPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(exported)
    assert type(before) is type(after)
    for part in [name for name in ("vae", "text_encoder", "text_encoder_2") if name in before.components]:
        mine, theirs = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
        if part == "vae":
            assert hashes(folder, part) == hashes(exported, part)
    trained, original = after.unet.state_dict(), before.unet.state_dict()
    assert all(not torch.equal(trained[name], original[name]) for name in ("conv_in.weight", "conv_out.weight"))
    for name in ("prediction_type", "beta_start", "beta_end", "beta_schedule", "num_train_timesteps"):
        assert after.scheduler.config[name] == before.scheduler.config.get(name, "epsilon")
    written = load_text((tmp_path / "run" / "config.yaml").read_text())
    assert not written.is_open and set(written.sample.prompts) <= set(CAPTIONS)  # of the data, as none were given
    load_pipeline(str(exported))
    # A second run, from what the first one made
    again = resolve(configured(exported, images))
    assert replace(again.conditioning, **_names(written.conditioning)) == written.conditioning
    assert again.objective == written.objective


def _names(section):
    return {name: value for name, value in vars(section).items() if isinstance(value, str)}


def test_what_the_name_decides(pretrained, images):
    cfg = configured(pretrained("sd21"), images)
    assert cfg.is_open and load_text(dump(cfg)) == cfg
    found, name = resolve(cfg), str(pretrained("sd21"))
    assert found.space == LatentSpace(kind="latent", vae=name, subfolder="vae")
    assert isinstance(found.conditioning, TextSequence) and found.conditioning.condition_dropout == 0.1
    assert (found.objective.prediction_type, found.objective.beta_schedule) == ("v_prediction", "scaled_linear")
    assert resolve(found) == found and not found.is_open and load_text(dump(found)) == found
    xl = resolve(configured(pretrained("sdxl"), images, "--proportion_empty_prompts=0.2", "--variant=fp16"))
    assert xl.conditioning == SDXL(kind="sdxl", pipeline=str(pretrained("sdxl")), condition_dropout=0.2, variant="fp16")
    assert xl.space.variant == "fp16"
    own = resolve(configured(pretrained("sdxl"), images, f"--pretrained_vae_model_name_or_path={name}/vae"))
    assert own.space == LatentSpace(kind="latent", vae=f"{name}/vae")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--prediction_type=epsilon", "objective.prediction_type: epsilon, but .* was trained with v_prediction"),
        ("--beta_end=0.02 --beta_start=0.0001", "beta_start: 0.0001.*\nobjective.beta_end: 0.02"),
        ("--rescale_betas_zero_snr", "rescale_betas_zero_snr: True, but"),
        ("--objective.kind=edm", "objective.kind is edm, but .* was trained with ddpm: write ddpm"),
        ("--prediction_type=epsilon --rescale_betas_zero_snr --change_objective", "epsilon says nothing of the image"),
        ("--sample.scheduler=heun --rescale_betas_zero_snr --change_objective", "heun cannot start at zero terminal"),
        ("--class_labels=3", "conditioning.kind is text, which takes no labels"),
    ],
)
def test_refused(pretrained, images, options, problem):
    with pytest.raises(ConfigError, match=problem):
        resolve(configured(pretrained("sd21"), images, *options.split()))


def test_another_objective_if_it_is_asked_for(pretrained, images):
    cfg = configured(pretrained("sd21"), images, "--prediction_type=epsilon", "--change_objective")
    assert resolve(cfg).objective.prediction_type == "epsilon" and resolve(cfg).objective.beta_end == 0.012
    same = configured(pretrained("sd21"), images, "--prediction_type=v_prediction", "--beta_end=0.012")
    assert resolve(same) == resolve(configured(pretrained("sd21"), images))


def test_pipelines_that_are_not_known(pretrained, images, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(pretrained("sd15"), folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "KandinskyPipeline"}))
    with pytest.raises(ConfigError, match="is a KandinskyPipeline: what it is trained with is known of Stable"):
        resolve(configured(folder, images))
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text())
    for change in ({"trained_betas": [0.1, 0.2]}, {"beta_schedule": "laplace"}, {"_class_name": "LCMScheduler"}):
        scheduler.write_text(json.dumps(settings | change))
        with pytest.raises(ConfigError, match="is not known here"):
            resolve(configured(folder, images))
    scheduler.unlink()
    with pytest.raises(ConfigError, match=r"no scheduler/scheduler_config.json"):
        resolve(configured(folder, images))


def test_of_a_lone_unet_nothing_is_known(tmp_path, images, caplog):
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    UNet2DModel(sample_size=RESOLUTION, **shape, **blocks).save_pretrained(tmp_path / "unet")
    with caplog.at_level(logging.WARNING):
        cfg = resolve(configured(tmp_path / "unet", images, "--model.subfolder=null"))
    assert (cfg.space.kind, cfg.conditioning.kind, cfg.objective.beta_schedule) == ("pixel", "none", "linear")
    assert "nothing says with which noise and prediction its UNet was trained: taken is prediction_type" in caplog.text
    with pytest.raises(ConfigError, match="choose conditioning.kind"):
        resolve(configured(tmp_path / "unet", images, "--condition_dropout=0.2"))


def test_prompts_that_are_given_stay(pretrained, images):
    cfg = resolve(configured(pretrained("sd15"), images, "--validation_prompt=a cat"))
    assert with_prompts(cfg, open_data(cfg)) == cfg
    without = replace(cfg, sample=replace(cfg.sample, prompts=()))
    assert with_prompts(without, open_data(cfg)).sample.prompts == tuple(CAPTIONS[:2])  # two images


def test_the_export_reads_text_as_diffusers_does(pretrained, images):
    modules = Step(configured(pretrained("sdxl"), images)).modules
    pipeline = DiffusionPipeline.from_pretrained(pretrained("sdxl"))
    text, null, pooled, pooled_null = pipeline.encode_prompt(CAPTIONS)
    prompts = {"text": CAPTIONS, "pooled_text": CAPTIONS, "size": [[64] * 6] * 4}
    for ours, theirs in (
        (modules.conditioner.condition(prompts), (text, pooled)),
        (modules.conditioner.unconditional(4), (null, pooled_null)),
    ):
        for name, expected in zip(("encoder_hidden_states", "text_embeds"), theirs, strict=True):
            torch.testing.assert_close(ours[name], expected)
    with pytest.raises(ConfigError, match="clip_skip must be below the 3 layers"):
        Step(configured(pretrained("sdxl"), images, "--clip_skip=3"))


def test_a_run_with_clip_skip_keeps_it(pretrained, images, tmp_path):
    cfg = configured(pretrained("sd15"), images, "--clip_skip=1", f"--output_dir={tmp_path / 'run'}")
    pipeline = load_pipeline(str(train(cfg)))
    assert pipeline.config.clip_skip == 1 and pipeline.conditioner().parts["text"].clip_skip == 1
    assert resolve(configured(tmp_path / "run" / "pipeline", images)).conditioning.clip_skip == 1
    assert isinstance(StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "pipeline").unet, torch.nn.Module)


def test_xl_draws_the_same_in_diffusers_pipeline_and_in_ours(pretrained, tmp_path):
    stock = load_pipeline(str(pretrained("sdxl")))
    stock.register_modules(scheduler=with_scheduler(stock.scheduler, "ddim", clip_sample=False))
    ours = as_unet_pipeline(stock)
    ours.save_pretrained(tmp_path)
    options = {"num_images": 2, "seed": 0, "prompts": CAPTIONS[:2], "num_inference_steps": 4}

    def draw(pipeline, scale):
        pipeline.set_progress_bar_config(disable=True)
        images = generate(pipeline, guidance_scale=scale, **options)
        return torch.stack([torch.from_numpy(np.array(image)).int() for image in images])

    guided = draw(stock, 3.0)
    assert (draw(ours, 3.0) - guided).abs().max() <= 1
    assert torch.equal(draw(load_pipeline(str(tmp_path)), 3.0), draw(ours, 3.0))
    assert (draw(ours, 1.0) - guided).abs().max() > 1


def test_sizes_stay_exact_in_half_precision(pretrained):
    pipeline, seen = as_unet_pipeline(load_pipeline(str(pretrained("sdxl")))), []
    pipeline.unet.to(torch.bfloat16).add_time_proj.register_forward_pre_hook(lambda _, ids: seen.append(ids[0]))
    pipeline(CAPTIONS[:1], original_size=(1023, 257), num_inference_steps=1, output_type="latent")
    assert seen[0].tolist()[:2] == [1023, 257]
