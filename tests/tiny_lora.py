"""Tiny UNets and text encoders in the layouts of SD 1.5, SD 2.1 and SDXL, with adapters of peft that change them."""

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finetune.lora_names import layers_of

SD = {
    "block_out_channels": (4, 4, 8, 8),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "attention_head_dim": 2,
}
LAYOUTS = {
    "sd15": {**SD, "cross_attention_dim": 8},
    "sd21": {**SD, "cross_attention_dim": 8, "attention_head_dim": (1, 1, 2, 2), "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": (4, 8, 8),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 16,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 8 + 6 * 4,
    },
}
ATTENTION = r".*\.(to_q|to_k|to_v|to_out\.0)"
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def text_config() -> CLIPTextConfig:
    """CLIP of two layers, 8 wide, that reads 12 tokens."""
    return CLIPTextConfig(
        vocab_size=54, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, projection_dim=8, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip


def base(layout: str) -> dict[str, torch.nn.Module]:
    """unet, text_encoder and, of SDXL, text_encoder_2: the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4, **LAYOUTS[layout]
        )
        modules = {"unet": unet, "text_encoder": CLIPTextModel(text_config())}
        if layout == "sdxl":
            modules["text_encoder_2"] = CLIPTextModelWithProjection(text_config())
    return {part: module.eval().requires_grad_(False) for part, module in modules.items()}


def adapted(layout: str, *, target=ATTENTION, text=True, seed=1, **settings) -> dict[str, torch.nn.Module]:
    """`base` with adapters of rank 2 in which nothing is zero. target: of the UNet, "all" for every layer; settings: of
    LoraConfig."""
    modules = base(layout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part, module in modules.items():
            if part == "unet" or text:
                targets = layers_of(module) if (part, target) == ("unet", "all") else target if part == "unet" else TEXT
                inject_adapter_in_model(LoraConfig(target_modules=targets, **{"r": 2, **settings}), module)
                disturb(module)
    return modules


def disturb(module: torch.nn.Module) -> None:
    """Draw all matrices of the adapter anew: peft begins with B = 0, which changes nothing."""
    for layer in (layer for layer in module.modules() if isinstance(layer, LoraLayer)):
        for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
            torch.nn.init.normal_(matrix.weight, std=0.3)
        for length in layer.lora_magnitude_vector.values():
            length.weight.data *= 1 + 0.3 * torch.rand_like(length.weight)


def pipeline(layout: str):
    """diffusers' pipeline around `base`; no VAE, tokenizer and scheduler, which a LoRA does not touch."""
    modules = {"text_encoder_2": None, **base(layout)} if layout == "sdxl" else base(layout)
    none = dict.fromkeys(["vae", "tokenizer", "scheduler"])
    if layout == "sdxl":
        return StableDiffusionXLPipeline(**none, tokenizer_2=None, **modules)
    return StableDiffusionPipeline(**none, safety_checker=None, feature_extractor=None, **modules,
                                   requires_safety_checker=False)  # fmt: skip
