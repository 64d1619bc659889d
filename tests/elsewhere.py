"""Draw from exports as somebody who has nothing but their folders or names on the Hub.

As a program it reads jobs from stdin, in a process that knows nothing else: those of stock pipelines come first and
have diffusers alone. A job is {"source", "stock": its class or null, "prompts", "steps", "out": file of images}.
"""

import json
import sys

import numpy as np
import torch


def draw(job: dict) -> None:
    """Two images [2, height, width, channels] in [0, 1], of seed 0, to the file of the job."""
    if job["stock"]:
        import diffusers

        pipeline = diffusers.DiffusionPipeline.from_pretrained(job["source"])
        assert type(pipeline).__name__ == job["stock"]
        generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        given = {"prompt": job["prompts"], "guidance_scale": 1} if job["prompts"] else {"batch_size": 2}
        images = pipeline(**given, num_inference_steps=2, generator=generator, output_type="np").images
    else:
        from finetune.sample import generate, load_pipeline

        given = {"prompts": job["prompts"], "num_inference_steps": job["steps"]}
        drawn = generate(load_pipeline(job["source"]), num_images=2, seed=0, **given)
        images = np.stack([np.asarray(image) for image in drawn]) / 255
    np.save(job["out"], images)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in sorted(json.load(sys.stdin), key=lambda job: not job["stock"]):
        assert not (job["stock"] and "finetune" in sys.modules)
        draw(job)
