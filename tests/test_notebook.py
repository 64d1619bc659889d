"""The tutorial runs from top to bottom, in a shortened setting, and is committed without outputs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "train_unet.ipynb"


def shortened(**values) -> nbformat.NotebookNode:
    """The notebook with other values in its cell of parameters; each must be one that the cell sets."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in values.items():
        line = f"{name} = {value!r}  "
        cell.source, found = re.subn(rf"(?m)^{name} = [^#\n]*", lambda _, line=line: line, cell.source)
        assert found == 1, f"the notebook has no parameter {name}"
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run all cells in a kernel of this Python, started where Jupyter starts it: in the folder of the notebook."""
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(the executed notebook, its output_dir, the two tries of a cell below its own that is interrupted at first)"""
    output_dir = tmp_path_factory.mktemp("notebook") / "run"
    notebook = shortened(MAX_STEPS=4, RESUME_STEPS=1, SAMPLE_STEPS=2, OUTPUT_DIR=str(output_dir))
    stop = nbformat.v4.new_code_cell(STOP_AFTER_THE_FIRST_LINE)
    first = nbformat.v4.new_code_cell('launch(short("stopped", 6))', metadata={"tags": ["raises-exception"]})
    again = nbformat.v4.new_code_cell(first.source)
    own = notebook.cells
    notebook.cells = [*own, stop, first, again]
    execute(notebook)
    notebook.cells = own
    return notebook, output_dir, (first, again)


def outputs(notebook: nbformat.NotebookNode, words: str) -> list[nbformat.NotebookNode]:
    """The outputs of the one code cell that contains `words`."""
    (cell,) = [cell for cell in notebook.cells if cell.cell_type == "code" and words in cell.source]
    return cell.outputs


def text(found: list[nbformat.NotebookNode]) -> str:
    return "".join(output.text for output in found if output.output_type == "stream")


def figures(found: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in output.get("data", {}) for output in found)


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ('load_dataset("assets/digits"', 1),
        ("wide.paste(", 1),
        ("make_loader(", 3),
        ('"metrics.jsonl"', 1),
        ('.glob("step-*.png")', 4),
        ("load_pipeline(OUTPUT_DIR)", 4),
    ],
)
def test_every_figure_is_drawn(executed, words, count):
    assert figures(outputs(executed[0], words)) == count


def test_the_run_is_trained_planned_and_exported(executed):
    notebook, output_dir, _ = executed
    plan = text(outputs(notebook, "launch(cfg)"))
    assert "4 of the optimizer" in plan and str(output_dir) in plan
    assert (output_dir / "pipeline" / "model_index.json").is_file()
    assert len((output_dir / "metrics.jsonl").read_text().splitlines()) == 4


def test_mistakes_are_shown_as_the_command_line_shows_them(executed):
    said = text(outputs(executed[0], "except ConfigError"))
    assert "learning_rate" in said and "30.5" in said


def test_a_resumed_run_ends_with_the_same_bytes(executed):
    said = text(outputs(executed[0], "filecmp.cmp(")).splitlines()
    compared = [line for line in said if ".safetensors: " in line]
    assert len(compared) == 4 and all(line.endswith("the same bytes") for line in compared)


def test_nothing_is_pushed_unless_asked(executed):
    assert outputs(executed[0], "if PUSH:") == []


def test_an_interrupted_cell_goes_on_when_it_is_run_again(executed):
    """As with Jupyter's stop button, which sends SIGINT; the traceback of the first try is still around."""
    first, again = executed[2]
    (error,) = [output for output in first.outputs if output.output_type == "error"]
    step = re.fullmatch(r"SIGINT: saved at step (\d+); .*", error.evalue)[1]
    assert f"resumes at step {step}" in text(again.outputs)


STOP_AFTER_THE_FIRST_LINE = """
import signal
import threading
import time


def stop():
    metrics = Path(f"{OUTPUT_DIR}-stopped") / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


threading.Thread(target=stop, daemon=True).start()
"""


def test_a_cell_that_fails_fails_the_test(tmp_path):
    notebook = shortened(OUTPUT_DIR=str(tmp_path / "run"))
    notebook.cells = [*notebook.cells[:3], nbformat.v4.new_code_cell("raise ValueError('on purpose')")]
    with pytest.raises(CellExecutionError, match="on purpose"):
        execute(notebook)


def test_committed_without_outputs_secrets_or_paths():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    raw = NOTEBOOK.read_text()
    assert not re.search(r"hf_[A-Za-z0-9]{8,}|/home/|/root/|/Users/|/tmp/|[A-Z]:\\\\", raw)
    # What the package does belongs in the package.
    assert not re.search(r"\.backward\(|optimizer\.step\(|zero_grad", raw)
