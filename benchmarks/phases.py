"""One training step of a UNet in phases, and the peak memory of each: the step that benchmarks/memory.py measures."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import shapes
from alive import Gpu, Live, norms_as_on_cuda, without_memory
from finetune.config import Ema as EmaConfig
from finetune.config_lora import Lora
from finetune.config_optimizer import Optimizer
from finetune.ema import Ema
from finetune.lora import add_lora, hold_base
from finetune.optimization import build_optimizer
from finetune.sample import BATCH_PIXELS
from finetune.space import LatentSpace

GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and with which levers."""

    unet: str
    batch: int = 1
    precision: str = "bf16"
    checkpointing: bool | tuple[str, ...] = False
    """Or the names of the blocks whose activations are computed again."""
    optimizer: str = "adamw"
    ema: bool = False
    fused_backward: bool = False
    lora: int | None = None
    """Its rank, on the attention."""
    base: str = "float32"
    """lora.base_dtype."""
    cached: bool = True
    """The VAE and the text encoders are not on the device."""
    weight_cache: bool = True
    """Autocast keeps the half-precision copies of trained weights for the length of a forward pass."""
    accumulated: int = 1
    """Micro-steps, whose gradients are summed."""
    goal: float | None = None
    """GiB of the card that it is to fit in."""

    def __str__(self) -> str:
        given = {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}
        what = [f"LoRA {self.lora}" if self.lora else "all weights", f"batch {self.batch}", self.precision]
        told = ("unet", "batch", "precision", "lora", "goal")
        words = {"checkpointing": "checkpointing", "ema": "EMA", "fused_backward": "fused backward"}
        words |= {"cached": "without caches", "weight_cache": "autocast's cache off"}
        for name, value in given.items():
            if name not in told:
                plain = isinstance(value, bool)
                value = "+".join(value) if isinstance(value, tuple) else value
                what.append(words.get(name, name) if plain else f"{words.get(name, name)} {value}")
        return ", ".join(what)


class EightBit(torch.optim.Optimizer):
    """The state of bitsandbytes' AdamW8bit, and nothing of what it computes."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            if p in self.state:
                continue
            dtype = torch.float32 if p.numel() < 4096 else torch.uint8
            scales = [torch.zeros(-(-p.numel() // 256), device=p.device) for _ in range(2 * (dtype == torch.uint8))]
            self.state[p] = {"moments": [torch.zeros_like(p, dtype=dtype) for _ in range(2)], "scales": scales}


def optimizer_for(kind: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Ours; where bitsandbytes does not compute, the state of it."""
    if kind == "adamw_8bit" and not torch.cuda.is_available():
        return EightBit(parameters)
    return build_optimizer(TypeAdapter(Optimizer).validate_python({"kind": kind}), parameters)


class Run:
    """The modules of a case on a device, and its steps."""

    def __init__(self, case: Case, unet: nn.Module, device: str) -> None:
        """unet: of `built`, on the device."""
        self.case, self.device = case, device
        self.unet, self.encoders = unet, []
        self.trained = {name: p for name, p in self.unet.named_parameters() if p.requires_grad}
        parameters = list(self.trained.values())
        groups = [[p] for p in parameters] if case.fused_backward else [parameters]
        self.optimizers = [optimizer_for(case.optimizer, group) for group in groups]
        self.ema = Ema(self.trained, EmaConfig(use_ema=True)) if case.ema else None
        for p in parameters:  # the state is made by the first step
            p.grad = torch.zeros_like(p)
        self.update()
        if case.fused_backward:
            for p, optimizer in zip(parameters, self.optimizers, strict=True):
                p.register_post_accumulate_grad_hook(functools.partial(self.update_one, optimizer))

    def inputs(self, n: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """x_t, noise and the arguments of the UNet for n samples."""
        config = self.unet.config
        with torch.device(self.device):
            x = torch.randn(n, config.in_channels, config.sample_size, config.sample_size)
            arguments: dict[str, Any] = {"timestep": torch.zeros(n, dtype=torch.long)}
            if "cross_attention_dim" in config:
                arguments["encoder_hidden_states"] = torch.randn(n, 77, config.cross_attention_dim)
            if config.get("addition_embed_type") == "text_time":
                added = {"text_embeds": torch.randn(n, 1280), "time_ids": torch.randn(n, 6)}
                arguments["added_cond_kwargs"] = added
            return x, torch.randn_like(x), arguments

    def encode(self) -> None:
        """What the frozen models do in a step without caches."""
        side = self.unet.config.sample_size * 8
        for model in self.encoders:
            with torch.no_grad(), torch.device(self.device):
                if isinstance(model, LatentSpace):
                    model.moments(torch.randn(self.case.batch, 3, side, side))
                else:
                    model(torch.zeros(8, 77, dtype=torch.long), output_hidden_states=True)

    @torch.no_grad()
    def draw(self) -> None:
        """Pictures, as many as are drawn at a time, guided. The frozen models are on the device for them, but the text
        encoders not while the VAE decodes."""
        side = self.unet.config.sample_size
        n = max(1, BATCH_PIXELS // (8 * side) ** 2)
        for text in self.encoders[1:]:
            text(torch.zeros(2 * n, 77, dtype=torch.long, device=self.device), output_hidden_states=True)
        with self.autocast():  # around all of it, as previews have it, so that the copies of weights stay
            self.predict(*self.inputs(2 * n)[::2])
            del self.encoders[1:], text  # see previews.decoding_alone
            self.encoders[0].decode(torch.randn(n, 4, side, side, device=self.device))

    def predict(self, x: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The network under autocast, as Accelerate has it."""
        with self.autocast():
            return self.unet(x, **arguments).sample.float()

    def autocast(self) -> torch.autocast:
        """Of the precision of the case."""
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.case.precision)
        return torch.autocast(self.device, half, enabled=half is not None, cache_enabled=self.case.weight_cache)

    def forward(self) -> Tensor:
        """The loss."""
        x, noise, arguments = self.inputs(self.case.batch)
        return (self.predict(x, arguments) - noise).square().mean()

    @staticmethod
    def update_one(optimizer: torch.optim.Optimizer, _: Tensor) -> None:
        """As soon as the gradient is there, which then goes."""
        optimizer.step()
        optimizer.zero_grad()

    def update(self) -> None:
        """What follows the backward pass."""
        if not (self.case.fused_backward and self.ready):
            torch.nn.utils.clip_grad_norm_(list(self.trained.values()), 1.0)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if self.ema:
            self.ema.step()

    @property
    def ready(self) -> bool:
        """Whether the parameters have the hooks of a fused backward."""
        return bool(next(iter(self.trained.values()))._post_accumulate_grad_hooks)


def built(case: Case, shape: dict[str, Any] | None = None) -> nn.Module:
    """The UNet of a case, on torch's current device. shape: settings of another UNet."""
    unet = shapes.unet(case.unet, **(shape or {}))
    if case.lora:
        add_lora(unet, Lora(rank=case.lora), seed=0)
        if case.base != "float32":
            hold_base(unet, getattr(torch, case.base))
    if case.checkpointing:
        unet.enable_gradient_checkpointing()
        chosen = case.checkpointing if isinstance(case.checkpointing, tuple) else ("",)
        kept = {module for name in chosen for module in unet.get_submodule(name).modules()}
        for module in set(unet.modules()) - kept:
            module.gradient_checkpointing = False
    return unet


def frozen_models(name: str) -> list[Any]:
    """The VAE and the text encoders of Stable Diffusion 1.5 or XL, float32, with random weights."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **blocks)
    models = [LatentSpace(vae, size=0), CLIPTextModel(clip(768, 12, 12)).requires_grad_(False)]
    if name == "sdxl":
        models.append(CLIPTextModelWithProjection(clip(1280, 32, 20, projection_dim=1280)).requires_grad_(False))
    return models


def clip(width: int, layers: int, heads: int, **more: Any) -> Any:
    """The configuration of a CLIP text encoder."""
    from transformers import CLIPTextConfig

    size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return CLIPTextConfig(**size, intermediate_size=4 * width, **more)


def peaks(run: Run, memory: Live | Gpu, frozen: list[Any], place: Callable[[nn.Module], Any]) -> dict[str, float]:
    """GiB: what lies there between steps, and the highest of each phase of a step. frozen: the VAE and text encoders,
    elsewhere; place: puts one of them on the device."""
    found: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(name: str) -> Iterator[None]:
        memory.reset()
        yield
        found[name] = max(found.get(name, 0.0), memory.peak / GIB)

    def load() -> None:
        run.encoders = frozen
        for model in frozen:
            place(model.vae if isinstance(model, LatentSpace) else model)

    if not run.case.cached:
        load()
        with phase("encode"):
            run.encode()
    found["between"] = memory.now / GIB
    for _ in range(run.case.accumulated):
        with phase("forward"):
            loss = run.forward()
        with phase("backward"):
            loss.backward()
        del loss
    with phase("update"):
        run.update()
    if run.case.goal:
        load()
        with phase("pictures"):
            run.draw()
    return found | {"peak": max(found.values())}


def measured(case: Case) -> dict[str, float]:
    """On the GPU."""
    try:
        with torch.device("cuda"):
            unet = built(case)
        frozen = frozen_models(case.unet) if case.goal or not case.cached else []
        return peaks(Run(case, unet, "cuda"), Gpu(), frozen, lambda module: module.to("cuda"))
    except torch.OutOfMemoryError:
        return {"peak": float("inf")}
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def modelled(case: Case, shape: dict[str, Any] | None = None, *, cuda: bool = True) -> dict[str, float]:
    """On tensors without memory. cuda: as there, and not as on a CPU."""
    with Live(), torch.device("meta"):
        unet, frozen = built(case, shape), frozen_models(case.unet) if case.goal or not case.cached else []
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as memory:
        without_memory(unet)
        if cuda:
            norms_as_on_cuda(unet)
        return peaks(Run(case, unet, "cpu"), memory, frozen, without_memory)
