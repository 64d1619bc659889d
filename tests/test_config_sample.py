"""What of sampling goes with what: said when the configuration is read, with the place and the reason."""

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from finetune.config import TrainConfig
from finetune.config_io import dump, load_text
from finetune.config_objective import PLAIN

TYPE = TypeAdapter(TrainConfig)
CLASSES = {"kind": "class_label"}


def config(**sections) -> TrainConfig:
    return TYPE.validate_python({"output_dir": "run", "data": {"resolution": 8}, **sections})


@pytest.mark.parametrize(
    ("objective", "sample", "sampler", "steps"),
    [
        ({"kind": "ddpm"}, {}, "ddpm", 1000),
        ({"kind": "ddpm", "num_train_timesteps": 100}, {}, "ddpm", 100),
        ({"kind": "ddpm", "respacing": "10,20"}, {}, "ddpm", 30),
        ({"kind": "ddpm", "respacing": "ddim50"}, {"respacing": "ddim10", "scheduler": "ddim"}, "ddim", 10),
        ({"kind": "ddpm"}, {"num_inference_steps": 30, "scheduler": "ddim"}, "ddim", 30),
        ({"kind": "edm"}, {}, "edm_heun", 50),
        ({"kind": "flow"}, {"num_inference_steps": 20}, "flow_euler", 20),
        ({"kind": "edm"}, {"scheduler": "edm_euler", "s_churn": 40, "s_noise": 1.003}, "edm_euler", 50),
    ],
)
def test_what_is_unset_follows_from_the_objective(objective, sample, sampler, steps):
    cfg = config(objective=objective, sample=sample)
    assert (cfg.sampler, cfg.sampling_steps) == (sampler, steps)
    assert load_text(dump(cfg)) == cfg


STABLE_DIFFUSION = {
    "space": {"kind": "latent", "vae": "v"},
    "conditioning": {"kind": "text", "text_encoder": "t", "tokenizer": "t"},
    "model": {"kind": "pretrained", "pretrained_model_name_or_path": "p"},
}


@pytest.mark.parametrize(
    ("sections", "sample", "sampler", "steps", "guidance"),
    [
        ({}, {}, "dpmsolver++", 25, 7.5),
        ({}, {"guidance_scale": 1.0}, "dpmsolver++", 25, 1.0),
        ({}, {"scheduler": "unipc"}, "unipc", 1000, 7.5),
        ({}, {"scheduler": "ddim", "num_inference_steps": 50}, "ddim", 50, 7.5),
        ({"objective": {"kind": "ddpm", "num_train_timesteps": 10}}, {}, "dpmsolver++", 10, 7.5),
        ({"objective": {"kind": "ddpm", "respacing": "250"}}, {}, "ddpm", 250, 7.5),
        ({"objective": {"kind": "ddpm", "clip_sample": True}}, {}, "ddpm", 1000, 7.5),
        ({"objective": {"kind": "flow"}}, {}, "flow_euler", 50, 7.5),
        ({"conditioning": CLASSES}, {}, "dpmsolver++", 25, 1.0),
        ({"space": {"kind": "pixel"}}, {}, "ddpm", 1000, 1.0),
        ({"model": {"kind": "unet2d_condition"}}, {}, "ddpm", 1000, 1.0),
    ],
)
def test_a_pretrained_latent_model_is_sampled_as_its_users_expect(sections, sample, sampler, steps, guidance):
    sections = STABLE_DIFFUSION | sections
    prompts = {"prompts": ["a"]} if sections["conditioning"]["kind"] == "text" else {}
    cfg = config(**sections, sample=sample | prompts)
    assert (cfg.sampler, cfg.sampling_steps, cfg.sample.guidance_scale) == (sampler, steps, guidance)
    assert load_text(dump(cfg)) == cfg


def test_what_the_few_steps_do_not_use_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"sample.eta: dpmsolver\+\+ does not use it, only ddim: .* change the samp"):
        config(**STABLE_DIFFUSION, objective={"kind": "ddpm", **PLAIN}, sample={"prompts": ["a"], "eta": 0.5})


GUIDED = {"guidance_scale": 3.0}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"objective": {"kind": "edm"}, "sample": {"scheduler": "ddim"}}, "use one of edm_heun, edm_euler"),
        ({"objective": {"kind": "flow"}, "sample": {"scheduler": "edm_heun"}}, "use one of flow_euler, flow_heun"),
        ({"sample": {"scheduler": "flow_heun"}}, "use one of ddpm, ddim, dpmsolver"),
        ({"sample": {"eta": 0.5}}, "sample.eta: ddpm does not use it, only ddim"),
        ({"sample": {"s_churn": 2.0}}, "sample.s_churn: ddpm does not use it, only edm_euler and edm_heun"),
        ({"objective": {"kind": "flow"}, "sample": {"s_churn": 2.0}}, "sample.s_churn: flow_euler does not use it"),
        ({"objective": {"kind": "edm"}, "sample": {"s_noise": 1.1}}, "sample.s_noise: .* s_churn, which is 0"),
        ({"objective": {"kind": "edm"}, "sample": {"respacing": "5"}}, "sample.respacing: edm_heun does not use it"),
        ({"sample": {"scheduler": "unipc", "respacing": "50"}}, "sample.respacing: unipc does not use it"),
        ({"sample": {"respacing": "50", "num_inference_steps": 50}}, "respacing .* give one of them"),
        ({"sample": {"respacing": "ddim333"}}, "respacing: no integer stride gives 333"),
        ({"objective": {"kind": "edm"}, "sample": {"s_churn": 1.0, "s_tmin": 5, "s_tmax": 1}}, "s_tmin must"),
        ({"objective": {"respacing": "50"}, "sample": {"scheduler": "euler"}}, "euler visits timesteps that objective"),
        ({"objective": {"respacing": "50"}, "sample": {"respacing": "ddim50"}}, "which objective.respacing does not"),
        ({"objective": {"respacing": "50"}, "sample": {"num_inference_steps": 51}}, "objective.respacing keeps, 50"),
        ({"objective": {"clip_sample": True}, "sample": {"scheduler": "unipc"}}, "unipc does not clip"),
        ({"objective": {"prediction_type": "sample"}, "sample": {"scheduler": "euler_ancestral"}}, "cannot sample"),
        (
            {
                "objective": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
                "sample": {"scheduler": "heun"},
            },
            "heun cannot start at zero terminal SNR",
        ),
        ({"conditioning": CLASSES, "sample": {"guidance_rescale": 0.7}}, "guidance_scale 1 is none"),
        ({"conditioning": CLASSES, "sample": {"guidance_interval": [1, 2]}}, "guidance_scale 1 is none"),
        ({"conditioning": CLASSES, "sample": {**GUIDED, "guidance_interval": [2, 1]}}, "low below high"),
        ({"conditioning": CLASSES, "sample": {**GUIDED, "guidance_interval": [1]}}, "two numbers"),
        ({"sample": {"autoguidance": "runs/weak"}}, "sample.autoguidance: guidance_scale 1 is no guidance"),
        ({"sample": GUIDED}, "there is no condition to guide with"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(sections, message):
    if "objective" in sections:
        sections = sections | {"objective": {"kind": "ddpm"} | sections["objective"]}
    with pytest.raises(ValueError, match=message):
        config(**sections)


def test_autoguidance_needs_no_condition():
    assert config(sample={**GUIDED, "autoguidance": "runs/weak"}).sample.autoguidance == "runs/weak"


def test_the_command_line_takes_the_new_settings():
    from finetune.config_io import load

    words = "--output_dir run --dataset_name a/b --resolution 8 --conditioning.kind class_label".split()
    interval = ["--guidance_scale", "3", "--sample.guidance_interval", "0.3", "5"]
    cfg = load([*words, *interval, "--sample.guidance_rescale", "0.7"])
    assert cfg.sample.guidance_interval == (0.3, 5.0) and cfg.sample.guidance_rescale == 0.7


def test_help_of_sample_is_light():
    code = (
        "import sys\nfrom finetune.sample_command import sample_main\n"
        "try: sample_main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "--guidance_interval LOW HIGH" in done.stdout
