"""Peak memory of a training step: UNets of the sizes of SD 1.5, SDXL and DDPM, random weights, by batch and by lever.

    python benchmarks/memory.py [--only sdxl] [--docs]

On a GPU it is torch.cuda.max_memory_allocated of real steps. Without one it is a model, and every line says so
(`by: model`): the very same step, of the same modules, optimizer and averages, runs on tensors without memory
(torch's FakeTensorMode), and the bytes of all storages that are alive are added up. What differs on CUDA is imitated:
autocast computes norms in float32 there. Attention saves the logarithms of its sums on both. 8-bit AdamW is its state
alone. Not counted, by either: the CUDA context, what the allocator cannot use, and (by the model) the workspace of
kernels; MARGIN is left for them. The last lines set the model of small UNets on a CPU beside what its allocator was
really asked for.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch.utils._pytree import tree_leaves

import figures
import shapes
from alive import Live, without_memory
from phases import GIB, Case, Run, built, measured, modelled, peaks

MARGIN = 1.0
"""GiB that a card needs besides: about 0.3 for the context (pytorch/pytorch#107667), the rest for kernels' workspace
and what the allocator cannot use."""


# -- is the model right? -----------------------------------------------------------------------------------------------

SMALL = {  # of each kind of UNet, what a CPU computes in a second
    "sd15": {"sample_size": 32, "block_out_channels": (32, 64, 64, 64), "cross_attention_dim": 64},
    "ddpm": {"sample_size": 32, "block_out_channels": (32, 32, 64, 64, 64, 64)},
}
CHECKS = [
    Case(unet="sd15", batch=4, precision="no"),
    Case(unet="sd15", batch=4, ema=True),
    Case(unet="sd15", batch=4, checkpointing=True, optimizer="adafactor", fused_backward=True),
    Case(unet="sd15", batch=4, lora=8, base="bfloat16"),
    Case(unet="ddpm", batch=4, precision="no", checkpointing=True),
    Case(unet="ddpm", batch=4),
]


def checked(case: Case) -> dict[str, float]:
    """The peak of a real step of a small UNet on the CPU, by torch's own record of its allocator, and by the model."""
    torch.manual_seed(0)
    run = Run(case, built(case, SMALL[case.unet]), "cpu")
    state = [tensor for tensor in tree_leaves([dict(each.state) for each in run.optimizers]) if torch.is_tensor(tensor)]
    averages = list(run.ema.averages.values()) if run.ema else []
    with Live() as held:
        held.show([list(run.unet.parameters()), state, averages])
    with torch.profiler.profile(profile_memory=True) as record:
        peaks(run, held, [], without_memory)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    real = (held.now + max(itertools.accumulate(changes))) / GIB
    model = modelled(case, SMALL[case.unet], cuda=False)["peak"]
    return {"real": real, "model": model, "model / real": model / real}


# -- the cases ---------------------------------------------------------------------------------------------------------

OUTER = ("down_blocks.0", "up_blocks.3")
"""The blocks of SD 1.5 that compute at the full resolution of the latents."""
FULL = Case(unet="sd15")
LORA = Case(unet="sd15", lora=16)
XL = Case(unet="sdxl", checkpointing=True)
XL_LORA = Case(unet="sdxl", lora=16)
DDPM = Case(unet="ddpm", batch=64)
change = dataclasses.replace
CASES = [
    DDPM,
    *(change(DDPM, batch=batch) for batch in (16, 128)),
    change(DDPM, precision="no"),
    change(DDPM, checkpointing=True, ema=True),
    FULL,
    change(FULL, batch=4),
    change(FULL, batch=4, checkpointing=True),
    change(FULL, batch=4, checkpointing=OUTER),
    change(FULL, precision="no"),
    change(FULL, cached=False),
    change(FULL, fused_backward=True),
    change(FULL, batch=4, checkpointing=True, optimizer="adamw_8bit", ema=True, fused_backward=True),
    LORA,
    change(LORA, base="bfloat16"),
    change(LORA, base="bfloat16", checkpointing=True),
    XL,
    change(XL, optimizer="adafactor", fused_backward=True),
    change(XL, optimizer="adafactor", fused_backward=True, weight_cache=False),
    change(XL_LORA, checkpointing=True),
    change(XL_LORA, base="bfloat16"),
    # as documented in the recipes
    change(FULL, batch=4, checkpointing=True, optimizer="adamw_8bit", accumulated=2, goal=12.0),
    change(XL_LORA, base="bfloat16", checkpointing=True, goal=12.0),
    change(XL, batch=4, optimizer="adafactor", fused_backward=True, goal=24.0),
]


def main() -> None:
    """Measure or model each case."""
    parser = figures.parser(__doc__)
    parser.add_argument("--only", choices=shapes.UNETS, help="the cases of this UNet")
    args = parser.parse_args()
    report = figures.Report("memory", f"python benchmarks/memory.py{f' --only {args.only}' * bool(args.only)}")
    gpu = torch.cuda.is_available()
    for case in CASES:
        if args.only in (None, case.unet):
            found = measured(case) if gpu else modelled(case)
            goal = {"card": case.goal, "fits": found["peak"] + MARGIN <= case.goal} if case.goal else {}
            report.add(f"{case.unet}: {case}", by="GPU" if gpu else "model", **found, **goal)
    for case in CHECKS:
        if args.only in (None, case.unet):
            report.add(f"small {case.unet}: {case}", by="CPU", **checked(case))
    report.finish(docs=args.docs)


if __name__ == "__main__":
    main()
