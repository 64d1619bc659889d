"""Weights of improved-diffusion: the same outputs as the reference code, or a refusal that says why.

Golden files: iddpm_unet_tiny holds its weights; those of iddpm_unet_formula are what `formula` gives. Both were made by
the reference code at 1bc7bbb; iddpm_unet_formula in float64, because its weights amplify rounding.
"""

import ast
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from finetune.cli import main
from finetune.config_choices import Pretrained
from finetune.errors import ConfigError
from finetune.iddpm_unet import Shape, unet2d_arguments
from finetune.importers import check_flags, import_iddpm
from finetune.models import bind, new_unet2d
from golden_numbers import compare
from tiny_models import build, config, parts  # noqa: F401

torch.set_num_threads(1)


def formula(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights of these shapes: 0.1 sin(i (1 + 0.37 k) + k) for weight i of tensor k, plus 1 in the scale of a norm."""
    weights = {}
    for k, (name, shape) in enumerate(shapes.items()):
        values = np.sin(np.arange(np.prod(shape)) * (1.0 + 0.37 * k) + k) * 0.1
        values += name.endswith("weight") and len(shape) == 1
        weights[name] = torch.from_numpy(values.reshape(shape)).float()
    return weights


@pytest.fixture
def case(golden, tmp_path):
    """case(name) -> (checkpoint, arrays, the model flags that the weights do not show)."""

    def write(name):
        if name == "tiny":
            arrays = golden("iddpm_unet_tiny")
            weights = {k[3:]: torch.from_numpy(v).float() for k, v in arrays.items() if k.startswith("sd/")}
        else:
            stored = golden("iddpm_unet_formula")
            arrays = {k.split("/")[1]: v for k, v in stored.items() if k.startswith(f"{name}/")}
            weights = formula(json.loads(str(arrays["shapes"])))
        path = tmp_path / f"{name}.pt"
        torch.save(weights, path)
        kwargs = ast.literal_eval(str(arrays["kwargs"]))
        flags = {k: kwargs[k] for k in ("num_heads", "num_heads_upsample") if k in kwargs}
        return path, arrays, {**flags, "large_size" if "low_res" in arrays else "image_size": 8}

    return write


def output(unet, arrays, *, stock=False):
    x, t = (torch.from_numpy(arrays[name]) for name in ("x", "t"))
    dtype = torch.from_numpy(arrays["out"]).dtype
    unet, x = unet.to(dtype), x.to(dtype)
    if "upsampled" in arrays:
        x = torch.cat([x, torch.from_numpy(arrays["upsampled"]).to(dtype)], dim=1)
    condition = {"class_labels": torch.from_numpy(arrays["y"])} if "y" in arrays else {}
    with torch.no_grad():
        return unet(x, t, **condition).sample if stock else bind(unet, condition)(x, t)


def error_of(unet, arrays, **options):
    return (output(unet, arrays, **options) - torch.from_numpy(arrays["out"])).abs().max()


@pytest.mark.parametrize("name", ["tiny", "two_widths", "super_resolution"])
def test_forward_is_that_of_improved_diffusion(case, tmp_path, name):
    checkpoint, arrays, flags = case(name)
    unet = import_iddpm(checkpoint, tmp_path / "out", **flags)
    loaded = UNet2DModel.from_pretrained(tmp_path / "out", use_safetensors=True)
    for model in (unet, loaded):
        file, key = ("iddpm_unet_tiny", "out") if name == "tiny" else ("iddpm_unet_formula", f"{name}/out")
        compare(file, key, output(model, arrays), rtol=1e-6, floor=1)  # outputs are sums of terms of about 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tiny", "super_resolution"])
def test_where_all_levels_with_attention_are_as_wide_the_model_is_stock(case, tmp_path, name):
    checkpoint, arrays, flags = case(name)
    import_iddpm(checkpoint, tmp_path / "out", **flags)
    stock = UNet2DModel.from_pretrained(tmp_path / "out")
    assert "num_attention_heads" not in stock.config and error_of(stock, arrays, stock=True) < 1e-6
    assert "Not for stock" not in (tmp_path / "out" / "README.md").read_text()


def test_heads_over_several_widths_need_set_heads_and_say_so(case, tmp_path):
    checkpoint, arrays, flags = case("two_widths")
    import_iddpm(checkpoint, tmp_path / "out", **flags)
    stock = UNet2DModel.from_pretrained(tmp_path / "out")
    assert stock.config.num_attention_heads == [2, 4]
    assert error_of(stock, arrays, stock=True) > 1e-3
    assert error_of(stock, arrays) < 1e-6  # by `bind`, for this and every later use
    assert error_of(stock, arrays, stock=True) < 1e-6
    stock.save_pretrained(tmp_path / "again")
    assert error_of(UNet2DModel.from_pretrained(tmp_path / "again"), arrays) < 1e-6
    assert "set_heads" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("wrong", [{"num_heads": 4}, {"num_heads": 2, "num_heads_upsample": 2}])
def test_another_number_of_heads_is_another_model(case, tmp_path, wrong):
    checkpoint, arrays, flags = case("two_widths")
    unet = import_iddpm(checkpoint, tmp_path / "out", **flags | {"num_heads_upsample": -1} | wrong)
    assert error_of(unet, arrays) > 1e-3


def test_classes_get_one_more_that_is_nothing(case, tmp_path):
    checkpoint, arrays, flags = case("tiny")
    unet = import_iddpm(checkpoint, tmp_path / "out", **flags)
    assert unet.config.num_class_embeds == 6
    assert torch.equal(unet.class_embedding.weight[:5], torch.from_numpy(arrays["sd/label_emb.weight"]).float())
    assert not unet.class_embedding.weight[5].any()


def test_released_models_are_recognised(tmp_path):
    """Parameter counts of the released configurations, and which of them stock diffusers can express."""
    imagenet = Shape(3, 6, 128, (1, 2, 3, 4), 3, (False, False, True, True), None, True)
    by_class = replace(imagenet, num_channels=192, num_classes=1000)
    cifar = replace(imagenet, channel_mult=(1, 2, 2, 2), attention=(False, True, True, False))
    upsampler = Shape(6, 6, 192, (1, 1, 2, 2, 4, 4), 2, (False,) * 4 + (True,) * 2, 1000, True)
    for shape, weights, stock in (
        (imagenet, 121_063_942, False),
        (by_class, 273_049_350 + 4 * 192, False),  # and "no class"
        (cifar, None, True),
        (upsampler, None, True),
    ):
        with torch.device("meta"):
            unet = new_unet2d(heads=(4, 4), **unet2d_arguments(shape, size=check_flags(shape, {}), dropout=0.0))
        assert weights in (None, sum(p.numel() for p in unet.parameters()))
        assert ("num_attention_heads" not in unet.config) == stock


CONTRADICTIONS = {
    "num_channels": (64, "num_channels is 64, but the weights show 32"),
    "num_res_blocks": (2, "num_res_blocks is 2, but the weights show 1"),
    "attention_resolutions": ("8", r"attention_resolutions is \{8\}, but the weights show \{4\}"),
    "class_cond": (False, "class_cond is False, but the weights show True"),
    "learn_sigma": (False, "learn_sigma is False, but the weights show True"),
    "use_scale_shift_norm": (False, "use_scale_shift_norm is False, but the weights show True"),
    "large_size": (8, "no super-resolution model.*use --image_size"),
    "num_heads": (3, "3 attention heads do not divide the 32 channels"),
}
AGREEING = {
    "num_channels": 32, "num_res_blocks": 1, "attention_resolutions": "4", "class_cond": True, "learn_sigma": True,
    "use_scale_shift_norm": True,
}  # fmt: skip


@pytest.mark.parametrize("flag", CONTRADICTIONS)
def test_a_flag_that_contradicts_the_weights_is_refused(case, tmp_path, flag):
    checkpoint, _, flags = case("tiny")
    value, message = CONTRADICTIONS[flag]
    with pytest.raises(ConfigError, match=message):
        import_iddpm(checkpoint, tmp_path / "out", **flags | AGREEING | {flag: value})
    assert not (tmp_path / "out").exists()
    import_iddpm(checkpoint, tmp_path / "out", **flags | AGREEING)


def test_levels_of_a_known_size_tell_it(case, tmp_path):
    checkpoint, *_ = case("tiny")
    with pytest.raises(ConfigError, match=r"levels \(1, 1\) do not tell .* give --image_size"):
        import_iddpm(checkpoint, tmp_path / "out", num_heads=2)
    cifar = Shape(3, 3, 128, (1, 2, 2, 2), 3, (False, True, True, False), None, True)
    assert check_flags(cifar, {}) == check_flags(cifar, {"attention_resolutions": "16,8"}) == 32
    with pytest.raises(ConfigError, match="image_size is 64, but the weights show 32"):
        check_flags(cifar, {"image_size": 64})


class Malicious:
    """Unpickled in full, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    torch.save({"input_blocks.0.0.weight": Malicious(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="cannot be read as plain weights, .* could run code: UnpicklingError"):
        import_iddpm(tmp_path / "evil.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file is not dangerous at all"


def test_files_that_hold_something_else_are_refused(case, tmp_path):
    with pytest.raises(ConfigError, match="there is no file"):
        import_iddpm(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "text.pt").write_text("not weights")
    with pytest.raises(ConfigError, match="cannot be read as plain weights"):
        import_iddpm(tmp_path / "text.pt", tmp_path / "out")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "opt.pt")
    with pytest.raises(ConfigError, match="not the state dict of an improved-diffusion UNet"):
        import_iddpm(tmp_path / "opt.pt", tmp_path / "out")
    checkpoint, _, flags = case("tiny")
    whole = torch.load(checkpoint, weights_only=True)
    cut = {key: value for key, value in whole.items() if key != "out.0.weight"}
    for weights, message in (({**whole, "more.weight": torch.ones(1)}, "more.weight"), (cut, "conv_norm_out.weight")):
        torch.save(weights, checkpoint)
        with pytest.raises(ConfigError, match=f"does not hold an improved-diffusion UNet: .*{message}"):
            import_iddpm(checkpoint, tmp_path / "out", **flags)
    torch.save(whole, checkpoint)
    with pytest.raises(ConfigError, match="not empty"):
        import_iddpm(checkpoint, tmp_path, **flags)


def test_command_line(case, tmp_path, capsys):
    checkpoint, arrays, _ = case("tiny")
    command = ["import", "iddpm", str(checkpoint), "--out", str(tmp_path / "out"), "--image_size", "8"]
    assert main([*command, "--num_heads", "2", "--class_cond", "False"]) == 2
    assert "class_cond" in capsys.readouterr().err
    assert main([*command, "--num_heads", "2", "--class_cond", "True", "--learn_sigma", "True"]) == 0
    assert error_of(UNet2DModel.from_pretrained(tmp_path / "out"), arrays) < 1e-6


def test_an_imported_model_can_be_trained_on(case, parts, tmp_path):  # noqa: F811
    """Its classes fit a class-conditional run, with "no class" for dropout; one class too few is the control."""
    checkpoint, _, flags = case("tiny")
    import_iddpm(checkpoint, tmp_path / "out", **flags)
    model = Pretrained(kind="pretrained", pretrained_model_name_or_path=str(tmp_path / "out"), subfolder=None)
    learned = {"kind": "ddpm", "variance": {"kind": "learned_range"}}
    for classes in (5, 4):
        cfg = config(parts, condition="class_label", conditioning={"num_classes": classes}, objective=learned)
        if classes == 5:
            unet, *_ = build(replace(cfg, model=model))
            assert (unet.config.num_class_embeds, unet.config.out_channels) == (6, 6)
        else:
            with pytest.raises(ConfigError, match="6 class embeddings .* needs 5"):
                build(replace(cfg, model=model))


def test_an_imported_super_resolution_model_can_be_trained_on(case, parts, tmp_path):  # noqa: F811
    """By the condition low_res it computes what the reference computed from the small image; by none it is refused."""
    checkpoint, arrays, flags = case("super_resolution")
    import_iddpm(checkpoint, tmp_path / "out", small_size=4, **flags)
    model = Pretrained(kind="pretrained", pretrained_model_name_or_path=str(tmp_path / "out"), subfolder=None)
    cfg = config(parts, condition="low_res", conditioning={"factor": 2}, data={"resolution": 8})
    unet, _, conditioner = build(replace(cfg, model=model))
    x, t, small, expected = (torch.from_numpy(arrays[name]) for name in ("x", "t", "low_res", "out"))
    condition = {name: rows.to(expected.dtype) for name, rows in conditioner.condition(small).items()}
    with torch.no_grad():
        assert (bind(unet.to(expected.dtype), condition)(x.to(expected.dtype), t) - expected).abs().max() < 1e-6
        other = bind(unet, {"low_res": -condition["low_res"]})(x.to(expected.dtype), t)
    assert (other - expected).abs().max() > 1e-3, "negative control: another small image"
    assert "`conditioning.kind: low_res`, with factor: 2" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ConfigError, match="in_channels 6, x0 has 3 channels: .*conditioning.kind to low_res"):
        build(replace(config(parts, data={"resolution": 8}), model=model))
