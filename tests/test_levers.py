"""Levers of speed: what must not change a run does not, what cannot work is refused, and nothing falls back unseen."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from pydantic import ValidationError
from torch._dynamo.utils import counters

from finetune import processes, resume
from finetune.compilation import compile_network, eager
from finetune.config import Train
from finetune.config_io import load
from finetune.errors import ConfigError
from finetune.modules import check_attention, checkpoint_blocks
from finetune.objective import build_objective
from finetune.plan import plan_text
from finetune.processes import check_levers, set_kernels
from finetune.trainer import Trainer
from forked import log, metrics, run, state
from tiny import config

torch.set_num_threads(1)
SMALL = {
    "block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"],
    "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.1,
}  # fmt: skip


def losses(cfg):
    return [line["loss"] for line in metrics(cfg) if "loss" in line]


# -- train.compile -----------------------------------------------------------------------------------------------------


def trained(cfg):
    """A `body`: what is traced is computed by torch's own kernels, which needs no C++ compiler and no minutes."""
    with torch.compiler.set_stance("default", force_backend="eager"):
        trainer = Trainer(cfg)
        begun = counters["stats"]["unique_graphs"]
        print(f"{plan_text(trainer)}\ngraphs {begun}")
        trainer.fit()
        assert counters["stats"]["unique_graphs"] == begun, "samples are computed uncompiled"


EVERYTHING = {"model": SMALL, "validation": {"held_out": 0.3, "every": 1}, "sample": {"sample_every": 1}}
TWO_STEPS = {"max_train_steps": 2, "global_batch_size": 8, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def uncompiled(tmp_path_factory):
    cfg = config(tmp_path_factory.mktemp("uncompiled") / "run", train=TWO_STEPS, **EVERYTHING)
    assert run(cfg, body=trained) == [0], log(cfg)
    assert "compiled in " not in log(cfg) and "graphs 0\n" in log(cfg)
    return state(cfg, 2)


@pytest.mark.parametrize(("kind", "graphs"), [("blocks", 4), ("unet", 1)])
def test_compiling_changes_no_bit_and_nothing_is_compiled_for_samples(tmp_path, monkeypatch, uncompiled, kind, graphs):
    """Traced and computed by the same kernels, with dropout, averages swapped in and out, samples and validation."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    cfg = config(tmp_path / "run", train=TWO_STEPS | {"compile": kind}, **EVERYTHING)
    assert run(cfg, body=trained) == [0], log(cfg)
    assert state(cfg, 2) == uncompiled and f"graphs {graphs}\n" in log(cfg)
    assert f"{kind}: compiled in " in log(cfg) and " of the uncompiled time: " in log(cfg)


def test_more_shapes_than_torch_allows_are_all_compiled(tmp_path):
    widths = (4, 8, 12)

    def graphs(limit):
        torch.compiler.reset()
        counters.clear()
        layers = torch.nn.ModuleList(ResnetBlock2D(in_channels=w, temb_channels=None, groups=4) for w in widths * 2)
        compile_network(layers, Train(compile="blocks"))
        with torch._dynamo.config.patch(limit), torch.compiler.set_stance("default", force_backend="eager"):
            for layer in [*layers, *layers]:  # nothing is compiled twice
                layer(torch.zeros(1, layer.in_channels, 2, 2), None)
        with eager(Train(compile="blocks")):
            layers[0](torch.zeros(1, 4, 3, 3), None)
        return counters["stats"]["unique_graphs"]

    def compiled(cfg):
        assert graphs({}) == len(widths)
        assert torch._dynamo.config.recompile_limit > 1000
        assert graphs({"recompile_limit": 2}) == 2, "negative control: the third goes on uncompiled"

    # In a fork: after it has compiled, torch refuses the backward pass to the forks of a process.
    cfg = config(tmp_path / "run")
    assert run(cfg, body=compiled) == [0], log(cfg)


def test_what_cannot_be_compiled_is_said_at_the_start(tmp_path):
    def broken(cfg):
        def backend(*_):
            raise RuntimeError("No working C++ compiler found\nand more")

        with torch.compiler.set_stance("default", force_backend=backend):
            Trainer(cfg).fit()

    cfg = config(tmp_path / "run", model=SMALL, train={"max_train_steps": 2, "compile": "blocks"})
    assert run(cfg, body=broken) == [2]
    assert "train.compile blocks: torch cannot compile the UNet here: " in log(cfg)
    assert "RuntimeError: No working C++ compiler found. Install what is missing" in log(cfg) and not metrics(cfg)


def test_what_compile_was_called_before_still_loads(tmp_path):
    assert [config(tmp_path, train={"compile": was}).train.compile for was in (False, True)] == ["off", "unet"]
    (tmp_path / "r.yaml").write_text("data: {dataset_name: x, resolution: 8}\noutput_dir: y\ntrain: {compile: off}\n")
    recipe = ["--config", str(tmp_path / "r.yaml")]
    assert load(recipe).train.compile == "off"
    assert load([*recipe, "--train.compile", "blocks"]).train.compile == "blocks"
    kept = {"compile": True, "device": "cpu"}
    assert resume._as_called_today(kept, "compile") == {"compile": "unet", "device": "cpu"}
    assert resume._as_called_today({"compile": "blocks"}, "compile") == {"compile": "blocks"}


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"cuda_graphs": True}}, "needs compile unet, not off"),
        ({"train": {"cuda_graphs": True, "compile": "blocks"}}, "needs compile unet, not blocks"),
        ({"train": {"cuda_graphs": True, "compile": "unet"}, "data": {"buckets": "auto"}}, "use data.buckets none"),
        ({"train": {"cudnn_benchmark": True, "deterministic": True}}, "not with deterministic"),
        ({"train": {"gradient_checkpointing": []}}, "use true, false, or names of blocks"),
        ({"train": {"compile": "block"}}, "unet"),
    ],
)
def test_settings_that_contradict_each_other(tmp_path, sections, says):
    with pytest.raises(ValidationError, match=says):
        config(tmp_path, **sections)


# -- processes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "processes", "says"),
    [
        ({"gradient_compression": "bf16"}, 1, "train.gradient_compression bf16: a single process"),
        ({"cuda_graphs": True, "compile": "unet"}, 1, "train.cuda_graphs: there is no CUDA device"),
    ],
)
def test_what_this_launch_cannot_do_is_refused(train, processes, says):
    accelerator = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    with pytest.raises(ConfigError, match=says):
        check_levers(accelerator, Train(**train))
    accelerator.device = torch.device("cuda")
    if "cuda_graphs" in train:
        with pytest.raises(ConfigError, match="gradient_accumulation_steps 2"):
            check_levers(accelerator, Train(**train, gradient_accumulation_steps=2))
        check_levers(accelerator, Train(**train))


class NotFiniteOnce:
    """The objective of a config whose third micro-batch has an infinite loss on the second process."""

    def __init__(self, cfg, rank):
        self._inner, self._calls, self._rank = build_objective(cfg.objective, clip_sample=True), 0, rank

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def loss(self, *given, **named):
        self._calls += 1
        terms = self._inner.loss(*given, **named)
        spoiled = self._rank == 1 and self._calls == 3
        return dataclasses.replace(terms, per_sample=terms.per_sample * (float("inf") if spoiled else 1.0))


def in_two_processes(*, views):
    """A `body`, with accumulation and a step that is skipped; views: whether gradients are those of DDP's buckets."""

    def body(cfg):
        import os

        if not views:
            kwargs = processes.DistributedDataParallelKwargs
            processes.DistributedDataParallelKwargs = lambda gradient_as_bucket_view, **rest: kwargs(**rest)
        trainer = Trainer(cfg, objective=NotFiniteOnce(cfg, int(os.environ["RANK"])))
        assert trainer.network.gradient_as_bucket_view is views
        trainer.fit()
        assert trainer.state.nonfinite_steps == 1

    return body


def test_gradients_in_buckets_change_nothing_and_in_bfloat16_little(tmp_path):
    train = {"max_train_steps": 3, "global_batch_size": 8, "gradient_accumulation_steps": 2}
    cfg, without = (config(tmp_path / name, model=SMALL, train=train) for name in ("views", "copies"))
    short = config(tmp_path / "bf16", model=SMALL, train=train | {"gradient_compression": "bf16"})
    assert run(cfg, processes=2, body=in_two_processes(views=True)) == [0, 0], log(cfg)
    assert run(without, processes=2, body=in_two_processes(views=False)) == [0, 0], log(without)
    assert state(cfg, 3) == state(without, 3) and losses(cfg) == losses(without)
    assert run(short, processes=2, body=in_two_processes(views=True)) == [0, 0], log(short)
    assert losses(short) == pytest.approx(losses(cfg), rel=1e-2) and state(short, 3) != state(cfg, 3)


# -- kernels of one process --------------------------------------------------------------------------------------------


@pytest.fixture
def unet():
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8}
    return UNet2DModel(sample_size=8, **blocks, **shape)


def gradients(unet):
    """Of a fixed loss: the loss, and all of them."""
    unet.zero_grad()
    x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    loss = unet(x, torch.tensor([3, 500])).sample.square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in unet.parameters())]


def test_kernels_of_attention_agree_and_do_not_outlive_their_run(unet):
    before, order = gradients(unet), torch._C._get_sdp_priority_order()
    try:
        for backend in ("math", "flash"):
            train = Train(sdpa_backend=backend)
            check_attention(unet, train)
            set_kernels(train)
            assert (torch._C._get_sdp_priority_order() != order) is (backend == "math"), "flash is first by default"
            assert torch.backends.cuda.flash_sdp_enabled() is (backend == "flash")
            torch.testing.assert_close(gradients(unet), before, rtol=1e-5, atol=1e-6)
    finally:
        set_kernels(Train())
    assert torch._C._get_sdp_priority_order() == order and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("backend", ["efficient", "cudnn"])
def test_a_kernel_that_cannot_run_here_is_refused_by_name(unet, backend):
    with pytest.raises(ConfigError, match=f"train.sdpa_backend {backend}: cannot .* on cpu in float32 .*use auto"):
        check_attention(unet, Train(sdpa_backend=backend))
    with pytest.raises(ConfigError, match="has no attention: use auto"):
        check_attention(torch.nn.Conv2d(1, 1, 1), Train(sdpa_backend=backend))


ALL = {"down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1"}


@pytest.mark.parametrize(("which", "again"), [(True, ALL), (["up_blocks.1"], {"up_blocks.1"})], ids=["all", "one"])
def test_only_the_named_blocks_are_computed_again_and_to_the_same_bits(unet, which, again):
    expected, runs = gradients(unet), {}
    for name, module in unet.named_modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs.get(name, 0) + 1}))
    checkpoint_blocks(unet, which)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(unet), expected, strict=True))
    twice = {name for name, times in runs.items() if times == 2}
    assert {name.split(".resnets")[0] for name in twice} == again and set(runs.values()) <= {1, 2}


def test_an_unknown_block_is_refused_with_the_names_there_are(unet):
    with pytest.raises(ConfigError, match="up_blocks.7: no such block; this UNet has down_blocks.0, .*mid_block"):
        checkpoint_blocks(unet, ["up_blocks.1", "up_blocks.7"])


@pytest.mark.parametrize(
    ("option", "word", "value"),
    [
        ("compile", "false", "off"), ("compile", "true", "unet"), ("compile", "off", "off"),
        ("gradient_checkpointing", "yes", True), ("gradient_checkpointing", "off", False),
        ("gradient_checkpointing", "mid_block", ("mid_block",)),
    ],
)  # fmt: skip
def test_words_that_once_were_the_choice(option, word, value):
    given = ["--output_dir", "run", "--train_data_dir", "images", "--resolution", "32", f"--train.{option}", word]
    cfg = load(given, env={})
    assert getattr(cfg.train, option) == value
