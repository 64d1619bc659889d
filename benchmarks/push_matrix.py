"""What a push to the Hub survives: every fault at every endpoint, with the real client against the Hub of the tests.

    python benchmarks/push_matrix.py [--quick] [--processes 4] [--json FILE]

Each cell is a push of a small model while one endpoint answers with a status code, drops the connection, loses its
answer after it did what was asked, or stays silent: once, three times, or for ever (the budget is then 10 seconds
instead of half an hour). Faults that pass must be ridden out, those that stay must end as a pending push within the
budget, which a later `push` finishes. In all of them: the repository ends with exactly the local bytes, from one commit
and no empty one; no commit in between shows a part of the model; the export is untouched; no other server sees the
token. Xet uploads fall back to plain ones, so that nothing at the Xet storage can stop a push.

Prints a table and exits with 1 if a cell ended otherwise than it must. The whole matrix takes seven minutes on 2 cores.
"""

import argparse
import dataclasses
import json
import logging
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import huggingface_hub  # noqa: F401  before the clock runs

from fake_hub import WRITE_TOKEN, FakeHub
from finetune.errors import PushPending
from finetune.hub import push

ENDPOINTS = {  # name -> (part of its path, whether large files go by Xet, as they do unless the user says otherwise)
    "create": ("/api/repos/create", True),
    "preupload": ("/preupload/", True),
    "LFS batch": ("/objects/batch", False),
    "storage PUT": (r"^/[0-9a-f]{64}\?", False),
    "LFS verify": ("/objects/verify", False),
    "commit": ("/commit/", True),
    "Xet token": ("/xet-write-token/", True),
    "Xet xorbs": ("/v1/xorbs/", True),
    "Xet shards": ("/shards", True),
}
PASSING = ("500", "502", "503", "504", "429", "429 Retry-After", "drop", "answer lost", "silent")
STAYING = ("400", "401", "403", "404", "412")
TIMES = {"once": 1, "3x": 3, "for ever": 10_000}
BUDGETS = {"once": 24.0, "3x": 64.0, "for ever": 10.0}
"""Seconds that a push may take. A request counts as lost after a sixth of them, three of which must be survived."""
GRACE = 1.5


@dataclass(frozen=True)
class Cell:
    """A fault at an endpoint, so many times."""

    endpoint: str
    fault: str
    times: str

    @property
    def expected(self) -> str:
        """ "survived" or "pending"."""
        if self.endpoint.startswith("Xet"):
            return "survived"
        if self.fault in STAYING:
            return "pending"
        # The next look at the head finds what was committed.
        found = self.endpoint == "commit" and self.fault == "answer lost"
        return "survived" if found or self.times != "for ever" else "pending"


@dataclass(frozen=True)
class Result:
    """How the push of a cell ended, after how many seconds, and what is wrong with that."""

    cell: Cell
    outcome: str
    seconds: float
    problems: list[str]


ALL = [Cell(endpoint, fault, times) for endpoint in ENDPOINTS for fault in PASSING + STAYING for times in TIMES]
QUICK = [
    Cell("create", "502", "3x"), Cell("create", "401", "once"), Cell("create", "answer lost", "once"),
    Cell("preupload", "504", "once"), Cell("preupload", "404", "once"), Cell("preupload", "drop", "for ever"),
    Cell("LFS batch", "429", "once"), Cell("LFS batch", "403", "once"), Cell("LFS batch", "silent", "for ever"),
    Cell("storage PUT", "drop", "once"), Cell("storage PUT", "500", "for ever"), Cell("storage PUT", "400", "once"),
    Cell("LFS verify", "answer lost", "once"), Cell("LFS verify", "503", "for ever"),
    Cell("commit", "500", "3x"), Cell("commit", "429 Retry-After", "3x"), Cell("commit", "answer lost", "for ever"),
    Cell("commit", "412", "once"), Cell("commit", "503", "for ever"), Cell("commit", "silent", "once"),
    Cell("Xet token", "503", "for ever"), Cell("Xet token", "403", "for ever"), Cell("Xet token", "drop", "once"),
    Cell("Xet xorbs", "500", "once"), Cell("Xet xorbs", "401", "for ever"),
    Cell("Xet shards", "429", "for ever"), Cell("Xet shards", "answer lost", "once"),
    Cell("Xet shards", "400", "for ever"),
]  # fmt: skip


def model(root: Path) -> Path:
    """A run's pipeline folder with two components that have weights, one of them in many chunks."""
    folder, random_bytes = root / "run" / "pipeline", random.Random(1).randbytes
    for name, size in (("unet", 300_000), ("vae", 2_000)):
        (folder / name).mkdir(parents=True)
        header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
        (folder / name / "config.json").write_text('{"in_channels": 3}')
        weights = len(header).to_bytes(8, "little") + header + random_bytes(size)
        (folder / name / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    index = {"_class_name": "P", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of all files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def measure(cell: Cell) -> Result:
    """Push through the fault of `cell`, and look at everything that must hold."""
    path, xet = ENDPOINTS[cell.endpoint]
    problems = []
    with tempfile.TemporaryDirectory() as root, FakeHub() as hub:
        os.environ |= {
            "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": WRITE_TOKEN, "HF_HOME": f"{root}/hf", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "50ms",
        }  # fmt: skip
        folder = model(Path(root))
        local = contents(folder)
        after = cell.fault == "answer lost"
        what = int(cell.fault[:3]) if cell.fault[0].isdigit() else "drop" if after else cell.fault
        headers = {"Retry_After": "1"} if "Retry-After" in cell.fault else {}
        hub.fail(path, what, method="GET|POST|PUT", times=TIMES[cell.times], after=after, **headers)
        budget = BUDGETS[cell.times]
        start = time.monotonic()
        try:
            push(folder, "user/model", budget=budget, first_wait=0.05)
            outcome = "survived"
        except PushPending as error:
            outcome = "pending"
            problems += [] if "finetune push " in str(error) and error.exit_code == 5 else [f"says {error}"]
        seconds = time.monotonic() - start
        problems += [f"took {seconds:.1f} s of {budget:g}"] if seconds > budget + GRACE else []
        problems += [f"{outcome}, not {cell.expected}"] if outcome != cell.expected else []
        problems += [] if TIMES[cell.times] > hub.rules[0].times else ["the fault was never met"]
        if outcome == "pending":
            hub.rules.clear()
            push(folder, "user/model", budget=BUDGETS["3x"], first_wait=0.05)
        trees = [{name: data for name, (data, _) in tree.items() if name != ".gitattributes"}
                 for _, tree in hub.repos["user/model"].commits]  # fmt: skip
        problems += [] if trees == [{}, local] else [f"commits that hold {[sorted(tree) for tree in trees]}"]
        problems += [] if contents(folder) == local else ["the export was changed"]
        told = [r for r in hub.requests if r.host != "hub" and WRITE_TOKEN in f"{r.path}{r.headers}{r.body!r}"]
        problems += [f"{told[0].host} was told the token"] if told else []
    return Result(cell, outcome if not problems else "LOST", round(seconds, 1), problems)


def table(results: list[Result]) -> str:
    """A Markdown table: fault by endpoint, and in each place the outcome once / three times / for ever."""
    found = {result.cell: result.outcome for result in results}
    short = {"survived": "ok", "pending": "later", "LOST": "LOST", "": "-"}
    lines = ["| fault | " + " | ".join(ENDPOINTS) + " |", "|---" * (len(ENDPOINTS) + 1) + "|"]
    for fault in PASSING + STAYING:
        each = [[short[found.get(Cell(endpoint, fault, times), "")] for times in TIMES] for endpoint in ENDPOINTS]
        words = [one[0] if len(set(one)) == 1 else " / ".join(one) for one in each]
        lines.append(f"| {fault} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def quiet() -> None:
    """In the processes that measure: neither our warnings nor those of the client."""
    logging.disable(logging.CRITICAL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main() -> int:
    """Measure the cells in parallel, as nearly all of the time is waiting, and print the table."""
    parser = argparse.ArgumentParser(description="what a push to the Hub survives")
    parser.add_argument("--quick", action="store_true", help="each fault and each endpoint at least once")
    parser.add_argument("--processes", type=int, default=4, help="cells measured at the same time (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every result")
    args = parser.parse_args()
    start = time.monotonic()
    with ProcessPoolExecutor(args.processes, mp_context=get_context("fork"), initializer=quiet) as pool:
        results = list(pool.map(measure, QUICK if args.quick else ALL))
    print(table(results))
    lost = [result for result in results if result.problems]
    for result in lost:
        print(f"LOST: {result.cell}: {'; '.join(result.problems)}")
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1))
    print("\nok: published; later: saved, exit code 5, and published by the next `finetune push`; LOST: neither.")
    print("One word, or the three for once / three times / for ever.")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    print(f"{len(results)} pushes, {len(lost)} lost, {time.monotonic() - start:.0f} s, {machine}")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
