"""What benchmarks share: a line of JSON per figure, a table of all, and its place in docs/performance.md."""

import argparse
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


def machine() -> dict[str, Any]:
    """Where the figures are from: processor, cores, threads of torch, GPU, versions, date; no names of hosts."""
    import torch

    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": next(iter(names), platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


class Report:
    """The figures of one benchmark: each is printed as a line of JSON when it is added, all of them as a table."""

    def __init__(self, name: str, command: str) -> None:
        """name: of the part of docs/performance.md that the table belongs to. command: what was run."""
        self.name, self.command, self.rows = name, command, []

    def add(self, figure: str, **values: Any) -> None:
        """One figure, by name, with its numbers; all figures of a report have the same columns, or leave some out."""
        self.rows.append({"figure": figure, **values})
        print(json.dumps(self.rows[-1] | machine()), flush=True)

    def table(self) -> str:
        """All figures as a Markdown table, after a line with the command and the machine."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        lines = [columns, ["---"] * len(columns)] + [[shown(row.get(c, "")) for c in columns] for row in self.rows]
        where = ", ".join(f"{name} {value}" for name, value in machine().items())
        return f"`{self.command}`: {where}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def finish(self, *, docs: bool) -> None:
        """Print the table; docs: put it into docs/performance.md, in the place of the last one of this name."""
        print(f"\n{self.table()}")
        if docs:
            part = re.compile(rf"(<!-- {self.name} -->\n).*?(<!-- end -->)", re.S)
            text, found = part.subn(lambda m: m[1] + self.table() + "\n" + m[2], PAGE.read_text("utf-8"))
            assert found == 1, f"{PAGE} has no place for {self.name}"
            PAGE.write_text(text, "utf-8")


def shown(value: Any) -> str:
    """A cell of the table: numbers with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def middle(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def parser(doc: str) -> argparse.ArgumentParser:
    """The arguments of a benchmark whose docstring is `doc`; all have --docs."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    return made
