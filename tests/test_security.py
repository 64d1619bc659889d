"""What strangers' files, settings and models can do (nothing), and where a secret of the user's is found (nowhere).

In the order of the rows: weights, remote code, inputs from the Hub, configurations, tokens, files. Others of them have
their place elsewhere: images test_images.py, paths of data test_data.py, cards test_card.py, what is published
test_export.py and test_hub.py, the notebook test_notebook.py, banned calls and the options test_policy.py.
"""

import io
import json
import logging
import os
import pickle
import re
import runpy
import shutil
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import diffusers
import huggingface_hub
import matplotlib.backends.backend_agg  # noqa: F401  imported here for all forked children
import numpy as np
import pytest
import torch
import torch.utils.tensorboard  # noqa: F401  as above
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file

import finetune.run
from fake_hub import WRITE_TOKEN, FakeHub
from finetune import checkpoint, cli, lock
from finetune.autoguidance import load_guide
from finetune.checkpoint import CheckpointError
from finetune.config_io import load, load_text, read
from finetune.config_tree import SETTINGS
from finetune.data import open_data
from finetune.durable import crc_of
from finetune.errors import ConfigError, FinetuneError
from finetune.importers import import_iddpm
from finetune.models import build_unet
from finetune.pretrained import commits, load_model_config, load_pretrained, pin
from finetune.redaction import secret_in, shown, without_secrets
from finetune.sample import load_pipeline
from finetune.space import PixelSpace
from forked import log, run
from test_run import combined, contents, exported, train
from tiny import ROOT, config
from tiny_models import build_conditioner, build_space, make_parts
from tiny_models import config as model_config

torch.set_num_threads(1)

# ------------------------------------------------------------------------------------------- weights: safetensors only


class Malicious:
    """Whoever unpickles it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self):
        return os.mkdir, (self.made,)


@pytest.fixture
def poison(tmp_path):
    """poison(path) writes a pickle there that makes the folder tmp_path/ran: as torch.save does, or bare."""

    def write(path: Path, *, bare: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        data = io.BytesIO()
        pickle.dump(Malicious(tmp_path / "ran"), data) if bare else torch.save({"w": Malicious(tmp_path / "ran")}, data)
        path.write_bytes(data.getvalue())
        return path

    return write


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """unet/, vae/, text_encoder/, tokenizer/ and a pipeline/, all as they should be."""
    folder = make_parts(tmp_path_factory.mktemp("models"))
    arguments = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    unet = UNet2DModel(**arguments, **blocks, add_attention=False)
    unet.save_pretrained(folder / "unet")
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(folder / "pipeline")
    return folder


WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
PICKLED = {"unet": "diffusion_pytorch_model.bin", "vae": "diffusion_pytorch_model.bin",
           "text_encoder": "pytorch_model.bin"}  # fmt: skip


def load_part(models: Path, part: str) -> None:
    """Load a UNet to train on, a VAE or a text encoder, as a run does."""
    cfg = model_config(models, "latent", "text", "unet2d_condition")
    if part == "unet":
        model = f"{{kind: pretrained, pretrained_model_name_or_path: {models / 'unet'}, subfolder: null}}"
        cfg = load_text(f"output_dir: out\ndata: {{resolution: 8}}\nmodel: {model}")
        build_unet(cfg, PixelSpace(channels=3, size=8), build_conditioner(cfg, None, "cpu"), seed=0)
    elif part == "vae":
        build_space(cfg, "cpu")
    else:
        build_conditioner(cfg, None, "cpu")


@pytest.mark.parametrize("part", WEIGHTS)
@pytest.mark.parametrize("name", ["pickle", "pickle that is called safetensors"])
def test_pickled_parts_of_a_model_are_refused(models, tmp_path, poison, part, name):
    folder = shutil.copytree(models, tmp_path / "models")
    load_part(folder, part)
    (folder / part / f"{WEIGHTS[part]}.safetensors").unlink()
    poison(folder / part / (PICKLED[part] if name == "pickle" else f"{WEIGHTS[part]}.safetensors"))
    with pytest.raises(ConfigError, match=f"could be loaded from the folder .*{part}"):
        load_part(folder, part)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"])
def test_pickled_guides_and_pipelines_are_refused(models, tmp_path, poison, name):
    folder = shutil.copytree(models / "pipeline", tmp_path / "pipeline")
    pipeline = load_pipeline(str(folder))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    poison(folder / "unet" / name)
    with pytest.raises(ConfigError, match="could be loaded"):
        load_guide(str(folder), pipeline.unet, pipeline.scheduler)
    with pytest.raises(ConfigError, match="could not be loaded"):
        load_pipeline(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_of_accelerate_or_torch_is_no_checkpoint(tmp_path, poison):
    for name in ("optimizer.bin", "scheduler.bin", "pytorch_model.bin"):
        poison(tmp_path / "accelerate" / "step-00000001" / name)
    for name in ("random_states_0.pkl", "custom_checkpoint_0.pkl"):
        poison(tmp_path / "accelerate" / "step-00000001" / name, bare=True)
    poison(tmp_path / "dcp" / "step-00000001" / ".metadata", bare=True)
    for folder in ("accelerate", "dcp"):
        with pytest.raises(CheckpointError, match="manifest.json is missing"):
            checkpoint.load(tmp_path / folder / "step-00000001")
        with pytest.raises(CheckpointError, match="no checkpoint is whole"):
            checkpoint.latest(tmp_path / folder)
    with pytest.raises(CheckpointError, match="is no folder"):
        checkpoint.load(poison(tmp_path / "model.ckpt"))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_a_checkpoint_with_a_fitting_manifest_is_not_read(tmp_path, poison):
    folder = checkpoint.save(tmp_path, parts={"model": {"w": torch.ones(2)}}, state={"step": 1})
    poison(folder / "custom_checkpoint_0.pkl", bare=True)  # what the manifest does not name is not looked at
    assert checkpoint.load(folder).tensors("model")["w"].tolist() == [1, 1]
    file = poison(folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = [file.stat().st_size, crc_of(file)]
    body = {name: value for name, value in manifest.items() if name != "checksum"}
    (folder / "manifest.json").write_text(json.dumps(body | {"checksum": checkpoint._checksum(body)}))
    with pytest.raises(CheckpointError, match="model.safetensors is no safetensors file, and nothing else is read"):
        checkpoint.load(folder).tensors("model")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("bare", [True, False])
def test_the_one_reader_of_pt_files_takes_tensors_only(tmp_path, poison, bare):
    with pytest.raises(ConfigError, match="nothing else is loaded, because it could run code"):
        import_iddpm(poison(tmp_path / "model.pt", bare=bare), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "train/data.pickle", "data.npy"])
def test_pickled_data_is_refused(tmp_path, poison, name):
    path = poison(tmp_path / "data" / name, bare=True)
    for named in (path, tmp_path / "data"):
        cfg = config(tmp_path / "run", data={"dataset_name": str(named)})
        with pytest.raises(FinetuneError, match="not a file that is read|holds no images"):
            open_data(cfg)
    assert not (tmp_path / "ran").exists()


def test_the_pickles_are_dangerous(tmp_path, poison):
    """Negative control."""
    pickle.loads(poison(tmp_path / "x.pkl", bare=True).read_bytes())
    (tmp_path / "ran").rmdir()
    torch.load(poison(tmp_path / "x.pt"), weights_only=False)
    (tmp_path / "ran").rmdir()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to its end, with all trackers that are there, under a umask that others would notice."""
    cfg = combined(tmp_path_factory.mktemp("finished") / "run")

    def body(cfg):
        os.umask(0o027)
        finetune.run.train(cfg)

    assert run(cfg, body=body) == [0], log(cfg)
    return cfg


def test_no_file_of_a_run_is_a_pickle(finished):
    """No file begins as a pickle or as what torch.save writes, and none holds the opcodes that would name code."""
    found = contents(Path(finished.output_dir))
    assert len(found) > 15
    for name, data in found.items():
        assert not data.startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), name
        assert b"cbuiltins\n" not in data and b"cposix\n" not in data, name


# ---------------------------------------------------------------------------------------- no code from a repository


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_diffusers_is_told_to_run_no_code(monkeypatch):
    """Before it is imported, by a variable that it reads then."""
    name = "DIFFUSERS_DISABLE_REMOTE_CODE"
    lines = "import os, sys\nfrom finetune.cli import guarded\nguarded(lambda argv: None, [])\n"
    command = [sys.executable, "-c", f"{lines}print(os.environ['{name}'], 'diffusers' in sys.modules)"]
    environment = {key: value for key, value in os.environ.items() if key != name}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"PYTHONPATH": str(ROOT / "src")})
    assert done.stdout == "1 False\n", done.stderr
    for value in ("1", "0"):  # the second is the negative control
        monkeypatch.setenv(name, value)
        assert runpy.run_module("diffusers.utils.constants")[name] == (value == "1")
    assert '"diffusers>=0.42' in (ROOT / "pyproject.toml").read_text()  # of which on other modules are refused too


def repository(models: Path, folder: Path, *, harm: str) -> Path:
    """A pipeline folder with something in it that a loader might run."""
    shutil.copytree(models / "pipeline", folder)
    body = f"import os\nos.mkdir({str(folder.parent / 'ran')!r})\n"
    for name in ("pipeline.py", "unet/my_unet.py", "unet/model.py", "__init__.py", "unet/__init__.py", "harm.py"):
        (folder / name).write_text(body + "class UNet2DModel: pass\nclass DDPMPipeline: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    settings = json.loads((folder / "unet" / "config.json").read_text())
    index |= {
        "custom class": {"_class_name": ["pipeline", "DDPMPipeline"]},
        "module": {"unet": ["harm", "UNet2DModel"]},
        "own file": {"unet": ["my_unet", "UNet2DModel"]},
        "auto map": {},
    }[harm]
    if harm == "auto map":
        settings |= {"auto_map": {"AutoModel": "model.UNet2DModel"}, "_class_name": "UNet2DModel"}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unet" / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("harm", ["custom class", "module", "own file", "auto map"])
def test_code_in_a_model_repository_is_not_run(models, tmp_path, monkeypatch, harm):
    folder = repository(models, tmp_path / "repo", harm=harm)
    monkeypatch.chdir(folder)  # and not found by the working directory either
    if harm == "auto map":
        load_pipeline(str(folder))  # inert: the class is chosen by us
    else:
        with pytest.raises(ConfigError, match="only .* can be drawn from|no code is taken from a model repository"):
            load_pipeline(str(folder))
    load_pretrained(UNet2DModel, str(folder), setting="model", subfolder="unet")
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------- a repository is read at one commit, or not


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for this process, which is offline else, and for those that it starts."""
    with FakeHub() as server:
        for name, value in server.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        server.lead(tmp_path / "hf", monkeypatch.setattr)
        pin({})
        yield server
        pin({})


def test_a_branch_that_moves_while_it_is_loaded_gives_no_mixture(models, hub, tmp_path, monkeypatch):
    """diffusers holds the files of one call to one commit; a model, let alone a pipeline, takes several calls."""
    name = "diffusion_pytorch_model.safetensors"
    files = {path.name: (path.read_bytes(), path.name == name) for path in (models / "unet").iterdir()}
    before = load_file(models / "unet" / name)
    save_file({key: tensor + 1 for key, tensor in before.items()}, tmp_path / name)
    place = {"setting": "model", "revision": None, "subfolder": None}

    def theirs():
        return UNet2DModel.from_pretrained("user/unet", cache_dir=huggingface_hub.constants.HF_HUB_CACHE)

    def ours():
        return load_pretrained(UNet2DModel, "user/unet", **place)

    found = {}
    for loads, look in {theirs: theirs, ours: lambda: load_model_config(UNet2DModel, "user/unet", **place)}.items():
        repo = hub.add_repo("user/unet", private=False)
        first = repo.commit(files)
        look()
        repo.commit(files | {name: ((tmp_path / name).read_bytes(), True)})
        found[loads] = float(loads().conv_in.bias.detach()[0]) - float(before["conv_in.bias"][0])
    assert found[theirs] == pytest.approx(1), "negative control: the weights of another commit than what was looked at"
    assert found[ours] == 0 and commits() == {"user/unet@main": first}

    pin({})
    asked = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert ours() and commits() == {"user/unet@main": first}
    assert len(hub.requests) == asked, "what was loaded once can be loaded offline"


@pytest.mark.parametrize("revision", [None, "v1"])
def test_a_repository_that_is_not_there_is_named(hub, revision):
    at = " at revision v1" if revision else ""
    with pytest.raises(ConfigError, match=f"model.x: the Hub repository user/none{at} cannot be loaded: .*404"):
        load_pretrained(UNet2DModel, "user/none", setting="model.x", revision=revision)


def test_a_run_goes_on_with_the_commits_that_it_began_with(tmp_path):
    cfg = combined(tmp_path / "run")
    known = {"owner/vae@main": "0" * 40}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"commits": known}))
    assert train(cfg) == [0], log(cfg)
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["commits"]
    assert recorded == json.loads((exported(cfg) / "run.json").read_text())["commits"] == known
    assert f"`owner/vae@main` `{'0' * 40}`" in (exported(cfg) / "README.md").read_text()


# ------------------------------------------------------------------------------------------------ configurations


BASE = "output_dir: out\ndata: {train_data_dir: pictures, resolution: 8}\n"
BOMB = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))])
CONFIGS = {
    "object": "seed: !!python/object/apply:os.mkdir [RAN]",
    "name": "seed: !!python/name:os.system",
    "alias bomb": BOMB,
    "deep nesting": "seed: " + "[" * 5000 + "]" * 5000,
    "endless alias": "data: &d {x: *d}",
    "hydra": "model: {_target_: os.mkdir, path: RAN}",
    "target": "objective: {kind: custom, target: os.mkdir, params: {path: RAN}}",
    "target of a package": "objective: {kind: custom, target: subprocess.run, params: {args: [mkdir, RAN]}}",
    "huge": "seed: 1 #" + "x" * 2_000_000,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_malicious_configurations_are_refused(tmp_path, name):
    path = tmp_path / "evil.yaml"
    path.write_text((BASE if name != "endless alias" else "") + CONFIGS[name].replace("RAN", str(tmp_path / "ran")))
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        read(["--config", str(path)], env={}, to_run=True)
    assert time.monotonic() - start < 2 and len(str(caught.value)) < 20_000
    assert not (tmp_path / "ran").exists()


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(ConfigError):
        load(["--config", "/dev/zero"], env={})


def test_trust_cannot_be_granted_by_the_file(tmp_path):
    (tmp_path / "evil.yaml").write_text(f"{BASE}trust: [os]\nobjective: {{kind: custom, target: os.mkdir}}\n")
    with pytest.raises(ConfigError, match="trust"):
        read(["--config", str(tmp_path / "evil.yaml")], env={}, to_run=True)


METADATA = ["../secret.png", "/etc/passwd", "~/x.png", "https://example.org/x.png", "file:///etc/passwd",
            "a/../../secret.png", "C:\\x.png", "..\\secret.png", "linked.png"]  # fmt: skip


@pytest.mark.parametrize("path", METADATA)
def test_metadata_cannot_name_files_elsewhere(tmp_path, path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for file in (tmp_path / "secret.png", folder / "0.png"):
        Image.new("RGB", (8, 8)).save(file)
    (folder / "linked.png").symlink_to(tmp_path / "secret.png")
    lines = [{"file_name": "0.png", "text": "a"}, {"file_name": path, "text": "b"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(FinetuneError):
        open_data(config(tmp_path / "run", conditioning={"kind": "none"}, data={"dataset_name": str(folder)}))


# ---------------------------------------------------------------------------------------------------------- secrets


SECRETS = {
    "HF_TOKEN": WRITE_TOKEN,
    "WANDB_API_KEY": "canary4wandb" + "0123456789abcdef" * 2,
    "MY_PASSWORD": "canary, a long pass phrase",
    "caption": "hf_" + "captionCanary".ljust(34, "C"),
    "file": "hf_" + "fileCanary".ljust(34, "F"),
    "argument": "hf_" + "argumentCanary".ljust(34, "A"),
    "AWS": "AKIA" + "CANARY7890ABCDEF",
}


@pytest.fixture
def secrets(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, SECRETS[name])
    return SECRETS


def secret_pictures(folder: Path) -> Path:
    """Pictures whose names and captions hold tokens."""
    folder.mkdir()
    lines = []
    for i in range(8):
        name = f"{i}-{SECRETS['file']}.png"
        Image.fromarray(np.full((8, 8, 3), 25 * i, np.uint8)).save(folder / name)
        lines.append({"file_name": name, "text": f"a digit {SECRETS['caption']} {SECRETS['MY_PASSWORD']}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def leaks(cfg, hub: FakeHub, screen: str) -> list[str]:
    """Where a secret is found: in a file of the run, on the screen, or in what any server was sent, but for the token
    in the header that it belongs in."""
    places = {f"run/{name}": data for name, data in contents(Path(cfg.output_dir)).items()}
    places |= {f"named {name}": str(name).encode() for name in places} | {"screen": screen.encode()}
    for i, r in enumerate(hub.requests):
        headers = {n: v for n, v in r.headers.items() if (r.host, n) != ("hub", "authorization")}
        places[f"request {i} {r.method} {r.path[:40]}"] = f"{r.path} {headers}".encode() + r.body
    return [f"{place}: {name}" for place, data in places.items() for name, value in SECRETS.items()
            if value.encode() in data]  # fmt: skip


def raise_with_secrets() -> None:
    """An error that was caused by another, with notes, all of which quote secrets."""
    try:
        raise OSError(f"Authorization: Bearer {WRITE_TOKEN}")
    except OSError as cause:
        error = RuntimeError(f"wandb: {SECRETS['WANDB_API_KEY']} \x1b[2J\x1b]0;owned\x07")
        error.add_note(SECRETS["MY_PASSWORD"])
        raise error from cause


@pytest.mark.parametrize("end", ["published", "pending", "error"])
def test_no_secret_leaves_its_place(tmp_path, hub, secrets, end):
    data = secret_pictures(tmp_path / "pictures")
    cfg = combined(tmp_path / "run", conditioning="pooled_text", hub={"push": True, "push_budget_minutes": 0.05})
    cfg = replace(cfg, data=replace(cfg.data, dataset_name=str(data), max_train_samples=None))
    if end == "pending":
        hub.fail("/preupload/", 403, times=99, X_Error_Message=f"{WRITE_TOKEN} may not, \x1b[31mred")

    def body(cfg):
        sys.argv = ["train_unet.py", f"--password={SECRETS['argument']}", SECRETS["MY_PASSWORD"], SECRETS["AWS"]]
        for name in ("diffusers", "transformers"):
            logging.getLogger(name).handlers = [logging.StreamHandler(sys.stderr)]  # not of when it was imported
        logging.getLogger("finetune.x").warning("sent %s", WRITE_TOKEN)
        logging.getLogger("diffusers").error("sent %s", SECRETS["AWS"])
        try:
            raise_with_secrets()
        except RuntimeError:
            logging.getLogger("transformers").exception("with its traceback")
        finetune.run.train(cfg)
        if end == "error":
            raise_with_secrets()

    assert run(cfg, body=body) == [{"published": 0, "pending": 5, "error": 1}[end]], log(cfg)
    text = log(cfg)
    assert not leaks(cfg, hub, text)
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\x1b[31m" not in text
    assert "sent [token]" in text and r"\x1b[2J" in text and "OSError: Authorization: Bearer [token]" in text
    command = json.loads((tmp_path / "run" / "run.json").read_text())["command"]
    assert command == "train_unet.py --password=[token] '[token]' [token]"
    assert list((tmp_path / "run" / "logs").rglob("events.out.tfevents*")) and hub.requests
    if end == "published":
        assert hub.files("user/run") == contents(exported(cfg))
    (tmp_path / "run" / "logs" / "x").write_text(f"x{WRITE_TOKEN}")  # negative control
    hub.requests.append(replace(hub.requests[0], host="storage", body=SECRETS["AWS"].encode()))
    found = leaks(cfg, hub, f"{text} {SECRETS['caption']}")
    assert {one.rpartition(": ")[2] for one in found} == {"AWS", "HF_TOKEN", "caption"}


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("section", ["sample", "tracking", "hub"])
def test_a_setting_that_holds_a_secret_is_refused_and_written_nowhere(tmp_path, secrets, name, section):
    value = f"a {SECRETS[name]}" if section == "sample" else SECRETS[name]
    settings = {"sample": {"prompts": ["fine", value]}, "tracking": {"tracker_project_name": value},
                "hub": {"hub_model_id": value}}  # fmt: skip
    cfg = config(tmp_path / "run", conditioning={"kind": "none"} if section != "sample" else
                 {"kind": "pooled_text", "text_encoder": "a/b", "tokenizer": "a/b"}, **{section: settings[section]})
    with pytest.raises(ConfigError, match=f"{section}\\.\\w+: contains (a|an|the value of)") as caught:
        finetune.run.train(cfg)
    assert SECRETS[name] not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["train", "--prompts"], ["push", "--token"], ["sample", "x", "--hub_token"]])
@pytest.mark.parametrize("name", ["HF_TOKEN", "argument", "WANDB_API_KEY"])
def test_a_secret_among_the_options_is_refused_and_not_repeated(secrets, capfd, command, name):
    assert cli.main([*command, SECRETS[name]]) == 2
    out, err = capfd.readouterr()
    assert SECRETS[name] not in out + err and "an option contains" in err


def test_no_setting_takes_a_secret():
    names = [name for name in SETTINGS if re.search(r"(?<!keep_)token(?!izer)|secret|passw|api_key|credential", name)]
    assert not names


def test_text_for_the_screen(secrets):
    for name, value in SECRETS.items():
        assert value not in without_secrets(f"x{name} {value}, {value}") and secret_in(f"a {value}"), name
    obeyed = "é 数 \x1b[31m\r\x08\u202e\u2028\x00\x7f\tok\n"
    assert shown(obeyed) == "é 数 \\x1b[31m\\r\\x08\\u202e\\u2028\\x00\\x7f\tok\n"
    honest = "half_life hf_hub hf_transfer sk-learn 0123456789abcdef0123456789abcdef01234567 AKIA token key"
    assert shown(honest) == honest and secret_in(honest) is None
    assert shown("\ud800") == "\\ud800"


# ------------------------------------------------------------------------------------------------------------- files


def test_files_have_the_modes_that_the_umask_says(finished):
    root = Path(finished.output_dir)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}
    wrong = {str(path): oct(mode) for path, mode in modes.items() if mode != (0o750 if path.is_dir() else 0o640)}
    assert not wrong
    names = {path.relative_to(root).parts[0] for path in modes if path != root}
    assert names >= {"pipeline", "samples", "logs", "checkpoints", "metrics.jsonl", "config.yaml", "run.json", ".lock"}


def test_the_lock_names_its_owner_but_no_secret(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_unet.py", f"--hub_model_id={WRITE_TOKEN}"])
    with lock.hold(tmp_path):
        text = (tmp_path / ".lock").read_text()
    assert re.fullmatch(r"process \d+ on \S+, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d: train_unet.py .*\n", text)
    assert WRITE_TOKEN not in text


def test_truncated_images_stay_errors():
    from PIL import ImageFile

    assert not ImageFile.LOAD_TRUNCATED_IMAGES and datasets.__version__ >= "5"  # which has no loading scripts
    assert load_text(BASE).data.on_error == "error"
