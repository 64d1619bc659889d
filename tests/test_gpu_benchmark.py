"""What benchmarks/gpu.py makes of a profile, of losses and of its time; what it times needs a GPU."""

import math
import sys
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gaps  # noqa: E402
import gpu  # noqa: E402
import gpu_checks  # noqa: E402


def event(kind, name, start, end, *, correlation=None, thread=1):
    """One event of a Chrome trace; times in microseconds."""
    more = {"args": {"correlation": correlation}} if correlation else {}
    return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": end - start, "tid": thread, **more}


WAIT = [event("cpu_op", "aten::item", 20, 45), event("cuda_runtime", "cudaStreamSynchronize", 26, 44)]
REST = [
    {"ph": "M", "name": "process_name"},
    event("cpu_op", "aten::mm", 0, 8),
    event("cuda_runtime", "cudaLaunchKernel", 1, 3, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 4, 6, correlation=2),
    event("cpu_op", "aten::add", 46, 49),
    event("cpu_op", "another thread", 46, 49, thread=2),
    event("cuda_runtime", "cudaLaunchKernel", 47, 48, correlation=3),
    event("kernel", "add", 50, 60, correlation=3),
    event("kernel", "gemm", 10, 20, correlation=1),
    event("kernel", "gemm", 15, 25, correlation=2, thread=9),  # beside the other, on another stream
]


def test_what_a_trace_says():
    trace = gaps.Trace([*WAIT, *REST])
    assert (trace.span, trace.busy) == (50, 0.5)
    assert trace.gaps(5) == [gaps.Gap(25, "cudaStreamSynchronize", "aten::mm", "aten::add")]
    assert trace.kernels(1) == [("gemm", 2, 0.4)]


def test_without_the_wait_it_is_python():
    """Negative control."""
    assert gaps.Trace(REST).gaps(5) == [gaps.Gap(25, "Python", "aten::mm", "aten::add")]


@pytest.mark.parametrize(("losses", "difference"), [([2.0, 1.0], 0.0), ([2.0, 1.1], 0.1), ([math.nan, 1.1], 0.1)])
def test_losses_are_compared_where_both_steps_were_taken(losses, difference):
    assert gpu_checks.largest_difference(losses, [2.0, 1.0]) == pytest.approx(difference)
    assert gpu_checks.largest_difference([math.nan], [1.0]) == math.inf


def test_stages_that_do_not_fit_or_fail_are_rows(tmp_path, capsys):
    asked = types.SimpleNamespace(minutes=1, only=None, tiny=False, shown=[])
    bench, done = gpu.Bench(asked, tmp_path), []

    def failing():
        raise RuntimeError("out of\nmemory")

    bench.run([("long", 61, failing), ("wrong", 0, failing), ("right", 0, lambda: done.append("right"))])
    long, wrong = bench.report.rows
    assert long["note"].startswith("skipped: it takes about 61 s") and wrong["note"] == "RuntimeError: out of memory"
    assert done == ["right"] and not bench.failed
    bench.check(False)
    assert bench.failed and capsys.readouterr().out.count("\n") == 2
