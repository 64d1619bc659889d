"""What README and CONTRIBUTING say about the repository is so."""

import ast
import importlib
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from finetune import errors
from finetune.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading of the README."""
    return re.search(rf"(?ms)^## {title}\n(.*?)(?=^## |\Z)", README)[1]


def test_the_tree_names_each_source_file_once():
    named = re.findall(r"[\w/]+\.py", section("Files").partition("src/finetune/\n")[2])
    sources = (ROOT / "src" / "finetune").rglob("*.py")
    there = {path.relative_to(ROOT / "src" / "finetune").as_posix() for path in sources} - {"__init__.py"}
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()) if "://" not in target]
    assert targets or page != "README.md"
    assert not [target for target in targets if not (ROOT / target).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    named = re.findall(r"`((?:src|tests|configs|assets|benchmarks|notebooks)/[\w/.]+)`", (ROOT / page).read_text())
    assert not [name for name in named if not (ROOT / name).exists()]


def test_each_recipe_has_its_row():
    rows = re.findall(r"^\| `(\w+\.yaml)` \|", section("Recipes"), re.M)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "configs" / "train").glob("*.yaml"))


def test_the_exit_codes_are_those_of_the_errors():
    stated = {int(code) for code in re.findall(r"^\| (\d+) \|", section("Resuming"), re.M)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert stated == {0, 75, 130} | {kind.exit_code for kind in kinds if hasattr(kind, "exit_code")}


def settings(section_class: type) -> set[str]:
    """The names of the fields of a section."""
    return {field.name for field in fields(section_class)}


def test_settings_that_are_named_exist():
    from finetune.config_tree import SECTIONS, SETTINGS

    assert is_dataclass(TrainConfig)
    sections = "|".join(settings(TrainConfig))
    named = set(re.findall(rf"(?:--|`)((?:{sections})\.\w+)", README))
    assert len(named) > 3
    known = {*SETTINGS, *(f"{path}.kind" for path, several in SECTIONS.items() if any(one.kinds for one in several))}
    assert not {name for name in named if name not in known and not name.endswith(".py")}


FENCE = re.compile(r"```python\n(.*?)```", re.S)
PYTHON = [(page, block) for page in PAGES for block in FENCE.findall((ROOT / page).read_text())]


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_python_compiles_and_its_imports_are_there(page, block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_objective_of_the_readme_is_one(monkeypatch):
    """All of its code but the training; a constant weighting is the negative control."""
    import torch

    monkeypatch.chdir(ROOT)
    (block,) = [block for _, block in PYTHON if "soft_min_snr" in block]
    names: dict = {}
    assert block.count("train(cfg, objective=objective)") == 1
    exec(block.replace("train(cfg, objective=objective)", ""), names)
    snr, scale = torch.tensor([1e-9, 5.0, 1e9], dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert names["objective"].weighting(snr, scale) == pytest.approx([1e-9, 2.5, 5.0])
    assert names["objective"].weighting(snr, 2 * scale)[1] == 5  # of x0, whose loss is `scale` times the output's
    plain = names["build_objective"](names["cfg"].objective, clip_sample=False)
    assert plain.weighting(snr, scale).tolist() != pytest.approx([1e-9, 2.5, 5.0])
