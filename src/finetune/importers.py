"""Weights of other code bases as diffusers folders: `finetune import iddpm`, for openai/improved-diffusion's .pt files.

Names and meaning of the flags are those of improved-diffusion (Nichol & Dhariwal 2021). What the weights show is read
off them; a flag that contradicts them is an error. Imports no torch until the arguments are known to be right.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from finetune.iddpm_unet import Shape
    from finetune.models import UNet2DModel

SIZES = {(1, 1, 2, 2, 4, 4): 256, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32}
"""Multiples of num_channels at each level -> image_size, the only ones that improved-diffusion's scripts make."""


def import_iddpm(
    checkpoint: Path,
    out: Path,
    *,
    num_heads: int = 4,
    num_heads_upsample: int = -1,
    dropout: float = 0.0,
    small_size: int | None = None,
    **flags: Any,
) -> UNet2DModel:
    """Write the weights of an improved-diffusion .pt file as a UNet2DModel folder (safetensors) and return the model.

    num_heads, num_heads_upsample (-1: num_heads), dropout, small_size: not in the weights. flags: what is, to check
    it: image_size or large_size (needed for levels that the scripts do not make), num_channels, num_res_blocks,
    attention_resolutions ("16,8"), class_cond, learn_sigma, use_scale_shift_norm. A class-conditional model gets one
    more class, of embedding zero: "no class". Raises ConfigError; the file is never allowed to run code.
    """
    import torch

    from finetune.iddpm_unet import converted, read_shape, unet2d_arguments
    from finetune.models import new_unet2d

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is a file or not empty: name a new folder")
    if num_heads < 1 or (num_heads_upsample < 1 and num_heads_upsample != -1):
        raise ConfigError(f"--num_heads {num_heads}, --num_heads_upsample {num_heads_upsample}: must be at least 1")
    weights = _read(checkpoint)
    heads = (num_heads, num_heads if num_heads_upsample == -1 else num_heads_upsample)
    try:
        shape = read_shape(weights)
        size = check_flags(shape, flags | {"small_size": small_size})
        with torch.random.fork_rng(devices=[]):
            unet = new_unet2d(heads=heads, **unet2d_arguments(shape, size=size, dropout=dropout))
        unet.load_state_dict(converted(weights, shape, heads))
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ConfigError(f"{checkpoint} does not hold an improved-diffusion UNet: {reason}") from error
    unet.save_pretrained(out, safe_serialization=True)
    (out / "README.md").write_text(_readme(checkpoint.name, shape, heads, small_size, unet))
    return unet.eval()


def _read(checkpoint: Path) -> dict[str, Tensor]:
    import torch

    if not checkpoint.is_file():
        raise ConfigError(f"there is no file {checkpoint}: correct the path of the checkpoint")
    try:
        weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # from EOFError to RuntimeError, and the refusal of anything that is not plain data
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{checkpoint} cannot be read as plain weights, and nothing else is loaded, because it could run code: "
            f"{type(error).__name__}: {reason}"
        ) from error
    tensors = isinstance(weights, dict) and all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in weights.items()
    )
    if not tensors or "input_blocks.0.0.weight" not in weights:
        raise ConfigError(
            f"{checkpoint} is not the state dict of an improved-diffusion UNet: give a modelNNNNNN.pt or "
            "ema_RATE_NNNNNN.pt (an optNNNNNN.pt holds the optimizer)"
        )
    return weights


def check_flags(shape: Shape, flags: Mapping[str, Any]) -> int:
    """The side of the images. Raises ConfigError where a flag that is given (not None) contradicts the weights."""
    if shape.in_channels not in (3, 6) or shape.out_channels not in (3, 6):
        raise ConfigError(
            f"improved-diffusion's UNets have 3 or 6 channels in and out, this has {shape.in_channels} in and "
            f"{shape.out_channels} out: convert it by hand"
        )
    upscales = shape.in_channels == 6
    given = {name: value for name, value in flags.items() if value is not None}
    for name in ("image_size",) if upscales else ("large_size", "small_size"):
        if name in given:
            kind, instead = ("a", "large_size") if upscales else ("no", "image_size")
            raise ConfigError(f"--{name}: this is {kind} super-resolution model, by its weights: use --{instead}")
    flag = "large_size" if upscales else "image_size"
    size = SIZES.get(shape.channel_mult, given.get(flag))
    if size is None:
        raise ConfigError(f"the levels {shape.channel_mult} do not tell the side of the images: give --{flag}")
    shows = {
        flag: size,
        "num_channels": shape.num_channels,
        "num_res_blocks": shape.num_res_blocks,
        "class_cond": shape.num_classes is not None,
        "learn_sigma": shape.out_channels == 6,
        "use_scale_shift_norm": shape.use_scale_shift_norm,
    }
    sides = [size >> level for level in range(len(shape.attention))]
    if "attention_resolutions" in given:
        shows["attention_resolutions"] = {side for side, has in zip(sides, shape.attention, strict=True) if has}
        given["attention_resolutions"] = {int(side) for side in given["attention_resolutions"].split(",")} & set(sides)
    for name, value in shows.items():
        if name in given and given[name] != value:
            raise ConfigError(f"--{name} is {given[name]}, but the weights show {value}: leave the flag out")
    return size


def _readme(name: str, shape: Shape, heads: tuple[int, int], small_size: int | None, unet: UNet2DModel) -> str:
    lines = [
        f"# {name}, as a diffusers UNet2DModel",
        "Converted by `finetune import iddpm` from weights of "
        "[openai/improved-diffusion](https://github.com/openai/improved-diffusion); "
        "train it on with `model.kind: pretrained`, this folder, and `model.subfolder: null`.",
        f"- {heads[0]} attention heads on the way down and in the middle, {heads[1]} on the way up (given, not read).",
    ]
    if shape.out_channels == 6:
        lines.append("- 6 output channels: the prediction (3), then the interpolated log variance (learned_range, 3).")
    if shape.num_classes is not None:
        lines.append(f"- Class labels 0 to {shape.num_classes - 1}; {shape.num_classes} is no class, and untrained.")
    if shape.in_channels == 6:
        side = "" if small_size is None else f" of {small_size} pixels"
        lines.append(f"- 6 input channels: x_t (3), then the small image{side}, enlarged bilinearly (3).")
        size = unet.config.sample_size
        ratio = f"factor: {size // small_size}" if small_size else f"factor: {size} / its side"
        low_res = "`low_res` among the conditions" if shape.num_classes is not None else "`conditioning.kind: low_res`"
        lines.append(f"- To train it on: {low_res}, with {ratio}, and `data.resolution: {size}`.")
    lines.append("- If trained with rescale_timesteps (the default there), its timestep is t * 1000 / diffusion_steps.")
    if unet.config.get("num_attention_heads") is not None:
        lines.append(
            "- **Not for stock diffusers alone**: a number of heads over levels of different widths is not in its "
            "UNet2DModel, which ignores `num_attention_heads` with a warning. Load it, then call "
            "`finetune.models.set_heads(unet)`; `finetune` does so by itself."
        )
    return "\n\n".join([*lines[:2], "\n".join(lines[2:])]) + "\n"


def _truth(word: str) -> bool:
    truths = {"true": True, "t": True, "yes": True, "1": True, "false": False, "f": False, "no": False, "0": False}
    if word.lower() not in truths:
        raise argparse.ArgumentTypeError(f"expected True or False, got {word!r}")
    return truths[word.lower()]


def import_main(argv: list[str]) -> None:
    """The command `finetune import`. Raises ConfigError."""
    parser = argparse.ArgumentParser("finetune import", description="Convert weights of improved-diffusion.")
    parser.add_argument("source", choices=["iddpm"], help="openai/improved-diffusion")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT.pt", help="modelNNNNNN.pt or ema_RATE_NNNNNN.pt")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    flags = parser.add_argument_group("improved-diffusion's model flags, as the model was trained")
    flags.add_argument("--num_heads", type=int, default=4, help="attention heads at every level; 4 unless changed")
    flags.add_argument("--num_heads_upsample", type=int, default=-1, help="the same on the way up; -1: num_heads")
    flags.add_argument("--dropout", type=float, default=0.0, help="for training on; 0.0 unless changed")
    flags.add_argument("--small_size", type=int, help="super-resolution: side of the small image, noted in README.md")
    checked = "read off the weights; if given, compared with them"
    for name in ("image_size", "large_size", "num_channels", "num_res_blocks"):
        flags.add_argument(f"--{name}", type=int, help=checked)
    flags.add_argument("--attention_resolutions", help=checked + ', such as "16,8"')
    for name in ("class_cond", "learn_sigma", "use_scale_shift_norm"):
        flags.add_argument(f"--{name}", type=_truth, metavar="{True,False}", help=checked)
    args = vars(parser.parse_args(argv))
    args.pop("source")
    out = args["out"]
    unet = import_iddpm(**args)
    print(f"{out}: UNet2DModel, {sum(p.numel() for p in unet.parameters()):,} weights, {args['num_heads']} heads")
