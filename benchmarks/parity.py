"""Run every test that compares numbers with the reference implementations, and write what they found to docs/parity.md.

    python benchmarks/parity.py

Exits with 1, naming them, if a test fails or if arrays of tests/golden/ are neither compared, nor an input, nor below
in NOT_OFFERED. About a minute on one core.
"""

import argparse
import fnmatch
import json
import os
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from golden_numbers import FOLDER, RECORD, arrays  # noqa: E402

SYSTEMS = {
    "iddpm": "[improved-diffusion](https://github.com/openai/improved-diffusion) `1bc7bbb` (Nichol & Dhariwal 2021)",
    "sgm": "[generative-models](https://github.com/Stability-AI/generative-models) `0ad7de9` (the trainer of SDXL)",
    "kdiff": "[k-diffusion](https://github.com/crowsonkb/k-diffusion) `4601bf0` (Karras et al. 2022)",
    "diffusers": "[diffusers](https://github.com/huggingface/diffusers) 0.42.1",
}
"""How the name of a file of numbers begins, and which system made it."""

INPUTS = {
    "diffusers_0421_pins": "t x0 noise sigma density_none_seed0 density_logit_normal_0_1_seed0",
    "iddpm_bpd": "x_start noises",
    "iddpm_data": "in_*",
    "iddpm_likelihood": "x means log_scales kl_mean2 kl_logvar2 cdf_in",
    "iddpm_losses": "x_start noise model_output t_*",
    "iddpm_misc": "emb_t ema_init ema_params ema_rate",
    "iddpm_posterior": "x_start noise t_*",
    "iddpm_resample": "num_timesteps history_t history_loss sampled_t",
    "iddpm_resample_2proc": "t loss num_timesteps history_per_term",
    "iddpm_sampling_loop": "x_T noises",
    "iddpm_sampling_step": "x noise model_output t_*",
    "iddpm_trainloop": "*/init_* */images */t */weights */noise",
    "iddpm_unet_formula": "*/x */t */y */low_res */upsampled",
    "iddpm_unet_tiny": "x t y sd/*",
    "kdiff_losses": "input noise sigma logvar Discrete_*/sigma_to_t",
    "kdiff_samplers": "x_init noises sigmas x_start",
    "kdiff_schedules": "u",
    "sgm_conditioner": "class_table masks cls sizes crops sdxl_time_ids_in",
    "sgm_discretization": "quant_in quant_idx rand idx",
    "sgm_ema_lr": "ema_init ema_params lr_n sgm_config_lr_at",
    "sgm_guiders": "x",
    "sgm_loss": "input noise rand idx",
    "sgm_samplers": "x_init noises",
    "sgm_scaling_weighting": "sigma",
}
"""Arrays that the references were given."""

NOT_OFFERED = [
    ("iddpm_posterior", "xstart_from_xprev_*", "a network that predicts the mean of x_{t-1} (PREVIOUS_X): no scheduler "
     "of diffusers samples it. Its losses, and those of the variance type LEARNED, are compared all the same"),
    ("iddpm_sampling_step", "p_sample/*_PREVIOUS_X_* p_sample/*_LEARNED_clip*", "the same networks"),
    ("iddpm_resample", "uniform_t", "draws of numpy's global random state: here a draw follows from seed and position"),
    ("sgm_scaling_weighting", "EpsScaling/c_noise VScaling/c_noise", "sigma itself as the network's time; theirs is "
     "used with discrete levels only, where the time is the timestep, as here"),
    ("sgm_discretization", "legacy_timesteps_30 legacy_timesteps_333 legacy_timesteps_999", "numbers of steps that do "
     "not divide 1000: diffusers rounds some timesteps to the neighbour"),
    ("sgm_discretization", "toy_*", "a recipe of theirs whose network is told level 0 for half of all levels"),
    ("sgm_discretization", "ZeroSampler", "a single level of 1e-5: nothing is trained"),
    ("sgm_ema_lr", "LambdaWarmUpCosine2 LambdaLinear", "learning rates in cycles of given lengths and heights, and "
     "ones that start or end other than at 0: diffusers' schedules are used, which have neither"),
    ("sgm_samplers", "LMS_* DPMPP2SAncestral_* EulerAncestral_edm_10/* EulerAncestral_legacy_10/*_at_call", "linear "
     "multistep and ancestral DPM-Solver++; the ancestral Euler steps are those of diffusers, for a DDPM"),
    ("sgm_guiders", "LinearPrediction_* TrianglePrediction_* Trapezoid_* Spatiotemporal_*", "scales by the frame of a "
     "video"),
    ("sgm_guiders", "prep_*", "how a batch is doubled there; here it is compared by its results"),
    ("sgm_conditioner", "legacy_vector", "captions overwritten by draws of numpy's random state; dropping to the empty "
     "prompt is offered"),
    ("kdiff_samplers", "lms/* dpm_2/* euler_ancestral/* dpmpp_2s_ancestral/* dpmpp_2m_sde_*/* dpmpp_3m_sde/*",
     "further samplers; EDM's stochastic one is offered by churn"),
    ("kdiff_schedules", "exponential_10 polyexponential_10_rho2 vp_10", "other grids of levels to sample at"),
    ("kdiff_schedules", "rand_cosine_interpolated_*", "levels interpolated between those of two resolutions: ten lines "
     "as a `kind: custom`, see extending.md"),
    ("diffusers_0421_pins", "ema_decay_default_0.9999 ema_decay_warmup_3_4_after10",
     "warm-ups that start late, or whose first update copies before (1 + n) / (10 + n)"),
    ("diffusers_0421_pins", "flow_sigmas_* flow_timesteps_* flow_x_init flow_euler_final_*", "diffusers' grid for "
     "sampling flows, whose lower end is shifted twice; ours is even from 1 to 0 and shifted once"),
]  # fmt: skip
"""(file, arrays, why there is no counterpart)."""

HEAD = """# Parity with the reference implementations

Written by `python benchmarks/parity.py`; do not edit. The numbers in `tests/golden/` were made by running the code of
the references; the tests named here compute the same quantities with this toolkit and compare every value.

*Deviation* is the largest |ours - theirs| / max(|theirs|, floor); 0 means that all bits agree. The floor is 0 unless it
is shown behind the tolerance as "of at least": there, values are differences of larger ones, and their last digits are
those of float32 at the size of what was subtracted. *Tolerance* is what the test demands. If several arrays or tests
share a line, both are those of the one that deviates most, compared to its tolerance; an asterisk stands for the cases.
"""


def main() -> int:
    """Run the tests, write the page; returns the exit code."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[RECORD] = str(Path(folder) / "record.jsonl")
        files = sorted(path for path in (ROOT / "tests").glob("test_*.py") if "from golden_numbers" in path.read_text())
        # That the page is complete is what comes of this, and no condition for it.
        options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-k", "not the_page_knows"]
        failed = pytest.main([*options, *map(str, files)])
        records = [json.loads(line) for line in Path(os.environ[RECORD]).read_text().splitlines()]
    if failed:
        return 1
    (ROOT / "docs" / "parity.md").write_text(page(records), "utf-8")
    problems = unaccounted(records)
    print(*problems, sep="\n", file=sys.stderr)
    return int(bool(problems))


def page(records: list[dict]) -> str:
    """The text of docs/parity.md."""
    lines = [HEAD]
    for prefix, system in SYSTEMS.items():
        groups = defaultdict(list)
        for record in records:
            if record["reference"].split("_")[0] == prefix:
                groups[record["reference"], group(record["quantity"])].append(record)
        values = sum(count(found) for found in groups.values())
        lines += [f"## {system}", "", f"{values:,} values.", "", "| numbers | values | deviation | tolerance | test |"]
        lines += ["|---|---:|---:|---|---|", *(row(*key, groups[key]) for key in sorted(groups)), ""]
    lines += ["## Not offered", "", "| numbers | why |", "|---|---|"]
    lines += [f"| `{file}` {_code(names.split())} | {why} |" for file, names, why in NOT_OFFERED]
    return "\n".join(lines) + "\n"


def group(quantity: str) -> str:
    """The name of an array without the case: "linear1000/loss" -> "*/loss", "betas_cosine_1000" -> "betas_*"."""
    if "/" in quantity:
        return "*/" + quantity.rpartition("/")[2]
    return re.sub(r"_(linear|cosine|shift)?_?-?\d.*$", "_*", re.sub(r"^T\d+:.*", "T*:*", quantity))


def count(records: list[dict]) -> int:
    """How many values were compared; one that was compared twice counts once."""
    by_array = defaultdict(int)
    for record in records:
        by_array[record["reference"], record["quantity"]] += record["count"]
    return sum(min(n, arrays(file)[name].size) for (file, name), n in by_array.items())


def row(file: str, name: str, records: list[dict]) -> str:
    """A line of the table."""
    worst = max(records, key=lambda record: (record["deviation"] / (record["rtol"] or 1), record["rtol"]))
    tolerance = "equal" if worst["rtol"] == 0 else _short(worst["rtol"])
    floor = f" of at least {worst['floor']:g}" if worst["floor"] else ""
    deviation = _short(worst["deviation"]) if worst["deviation"] else "0"
    tests = _code(sorted({record["test"].rpartition("/")[2] for record in records}))
    return "| " + " | ".join([f"`{file}` `{name}`", f"{count(records):,}", deviation, tolerance + floor, tests]) + " |"


def _short(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


def _code(names: list[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def unaccounted(records: list[dict]) -> list[str]:
    """Arrays that are neither compared nor explained, and those that are both."""
    problems = []
    for path in sorted(FOLDER.glob("*.npz")):
        file = path.stem
        compared = {record["quantity"] for record in records if record["reference"] == file}
        absent = [pattern for name, patterns, _ in NOT_OFFERED if name == file for pattern in patterns.split()]
        numbers = [name for name, array in arrays(file).items() if array.dtype.kind in "fi"]
        given = INPUTS.get(file, "").split()
        for name in numbers:
            if name not in compared and not any(fnmatch.fnmatchcase(name, pattern) for pattern in given + absent):
                problems.append(f"{file} {name}: not compared")
        for pattern in absent:
            if fnmatch.filter(compared, pattern) or not fnmatch.filter(numbers, pattern):
                problems.append(f"{file} {pattern}: in NOT_OFFERED, but compared, or no such array")
    return problems


if __name__ == "__main__":
    sys.exit(main())
