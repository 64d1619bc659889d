"""UNets by the name of what they are the size of, as diffusers builds them; with random weights."""

from typing import Any

import torch

CONDITIONED = "UNet2DConditionModel"
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {  # Stable Diffusion 1.5: 860 M parameters, 64x64 latents at 512 pixels
        "_class_name": CONDITIONED,
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {  # Stable Diffusion XL: 2,567 M parameters, 128x128 latents at 1024 pixels
        "_class_name": CONDITIONED,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "ddpm": {  # what train_unconditional.py builds: 114 M parameters, 64x64 pixels
        "_class_name": "UNet2DModel",
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": (*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4),
    },
    "levers": {  # 18 M parameters with cross-attention: a pass in half a second on a CPU core
        "_class_name": CONDITIONED,
        "sample_size": 16,
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 128,
        "attention_head_dim": 8,
    },
}


def unet(name: str, **changed: Any) -> torch.nn.Module:
    """The UNet of this name; changed: settings of it that are other ones."""
    import diffusers

    settings = UNETS[name] | changed
    return getattr(diffusers, settings["_class_name"]).from_config(settings)
