"""The rules of the code base, as tests."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src" / "finetune").rglob("*.py"))
IDS = [path.relative_to(ROOT / "src" / "finetune").as_posix() for path in SOURCES]

# From the bottom to the top: a module imports from its own line and the lines before it.
LAYERS = [
    {"redaction", "errors", "config_types", "hub_worker", "own_code", "frechet", "plots", "data_changes", "sharding"},
    {"host_memory"},
    {"transfer"},
    {"config_foundation"},
    {"config_choices", "config_captions", "config_data", "config_levels", "config_objective", "config_sample"},
    {"config_validation", "config_lora", "config_cache", "config_export", "config_optimizer", "config_prior"},
    {"config_train"},
    {"hub", "signals", "seeding", "durable", "watchdog"},
    {"cache_store"},
    {"config"},
    {"config_tree", "config_yaml", "config_flags", "config_words", "config_options", "config_launch", "config_io"},
    {"objective"},
    {"checkpoint", "retention"},
    {"provenance", "lock", "optimization", "pretrained", "single_file", "folder", "metadata", "images", "iddpm_unet"},
    {"lora_names", "lora_formats", "lora_loading"},
    {"captions", "kohya_config", "kohya"},
    {"ema", "grids", "small_images", "frozen", "cached", "samples"},
    {"order", "buckets", "shards", "rows", "sources", "datacheck", "data", "class_images"},
    {"batching", "meter", "tracking"},
    {"processes", "identity"},
    {"foundation", "space", "conditions", "text_conditions", "sdxl_texts", "conditioning", "model_fit"},
    {"models", "compilation"},
    {"importers", "lora"},
    {"samplers", "schedulers", "guidance", "autoguidance"},
    {"modules"},
    {"caches"},
    {"cache_command"},
    {"training_state"},
    {"resume", "saving"},
    {"sampling"},
    {"pipeline_conditions", "pipelines"},
    {"conversion"},
    {"lora_pipeline", "lora_proof", "lora_metadata"},
    {"sample"},
    {"prior"},
    {"sample_command"},
    {"card"},
    {"export", "failures", "validation", "previews"},
    {"lora_export", "merge_command", "stepping"},
    {"trainer", "plan", "posthoc", "evaluate", "measure"},
    {"run"},
    {"cli"},
]


def imports(path: Path) -> set[str]:
    """Modules of this package that a file imports while it runs (not only for its types)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "finetune":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("finetune."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("finetune.")}
    return names


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_nothing_imports_a_layer_above_itself(path):
    module = path.relative_to(ROOT / "src" / "finetune").parts[0].removesuffix(".py")
    if module == "__init__":
        return
    height = {name: level for level, names in enumerate(LAYERS) for name in names}
    assert module in height, f"{module} has no place in LAYERS"
    above = {name for name in imports(path) - {module} if height[name] > height[module]}
    assert not above


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_sizes_and_docstrings(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    tree = ast.parse(text)
    if text.strip():
        assert ast.get_docstring(tree), "the module has no docstring"
    inner = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f) if n is not f}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and id(node) not in inner:
            assert ast.get_docstring(node), f"{node.name} has no docstring"


PROGRAMS = [ROOT / "train_unet.py", *sorted((ROOT / "benchmarks").glob("*.py"))]
BANNED = {
    "pickle": r"\bpickle\b|\bdill\b|\bjoblib\b|\bshelve\b|\bmarshal\b|allow_pickle\s*=\s*True|read_pickle",
    "torch.load": r"\btorch\.load\((?![^()]*, weights_only=True\))",
    "eval or exec": r"(?<![\w.])(eval|exec)\(",
    "shell": r"shell\s*=\s*True|os\.(system|popen|exec\w+|spawn\w+)\(|getoutput\(",
    "yaml other than by config_yaml": r"\byaml\.(load|unsafe_load|full_load|safe_load)\w*\(",
    "remote code": r"trust_remote_code|custom_pipeline|load_custom_state",
    "pickled weights": r"use_safetensors\s*=\s*False|safe_serialization\s*=\s*False|weights_only\s*=\s*False",
    "extraction": r"\.extractall\(|unpack_archive\(",
    "truncated images": r"LOAD_TRUNCATED_IMAGES\s*=\s*True",
    "token as an argument": r"use_auth_token|add_argument\([^)]*(token|password)",
    "Accelerator.load_state": r"\.load_state\(|\.save_state\(",
}


@pytest.mark.parametrize("kind", BANNED)
def test_banned_calls(kind):
    found = [path.name for path in SOURCES + PROGRAMS if re.search(BANNED[kind], _without_docstrings(path))]
    assert not found
    assert re.search(BANNED["torch.load"], "torch.load(x)") and re.search(BANNED["torch.load"], "torch.load(x, y=1)")
    assert not re.search(BANNED["torch.load"], "torch.load(x, map_location='cpu', weights_only=True)")
    assert re.search(BANNED["torch.load"], "torch.load(x, weights_only=False)")
    assert not re.search(BANNED["eval or exec"], "unet.eval()")


def _without_docstrings(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            node.value.value = ""
    return ast.unparse(tree)


def test_requirements_agree_with_the_package():
    pyproject = (ROOT / "pyproject.toml").read_text()
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#-"]
    missing = [line for line in re.findall(r'^    "(.+)",$', pyproject, re.M) if line not in lines]
    assert not missing
    assert (ROOT / "requirements.txt").read_text().endswith("-e .\n")


def test_no_registry_machine_or_team_in_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"pypi\.org|files\.pythonhosted|registry\.npmjs|deb\.debian|(?<![\w.])/work/|/tmp/bash")
    binary = (".npz", ".parquet", ".safetensors", ".png")
    texts = [path for path in listed if not path.endswith(binary) and not path.startswith("tests/")]
    assert not [path for path in texts if pattern.search((ROOT / path).read_text(errors="replace"))]


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs" / "train").glob("*.yaml")))
def test_recipes_load_and_open_with_their_facts(recipe, monkeypatch):
    from finetune.config_io import dump, load, load_text

    monkeypatch.chdir(ROOT)
    path = f"configs/train/{recipe}"
    cfg = load(["--config", path])
    assert load_text(dump(cfg)) == cfg
    comment = [line for line in Path(path).read_text().splitlines() if line.startswith("#")]
    head = "\n".join(comment)
    for fact in (f"--config {path}", "time", "memory", "score"):
        assert fact in head, f"the recipe does not state its {fact}"


def run(*command):
    return subprocess.run(command, capture_output=True, text=True)


def readme_commands():
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("command", readme_commands() if (ROOT / "README.md").exists() else [])
def test_readme_commands_parse(command, monkeypatch):
    from finetune.config_io import load

    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    if "train_unet.py" in words:
        load(words[words.index("train_unet.py") + 1 :])
    elif words[:2] == ["finetune", "train"]:
        load(words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
    elif words[0] == "finetune":
        usage = run(sys.executable, "-m", "finetune.cli", words[1], "--help")
        assert usage.returncode == 0
        assert all(word in usage.stdout for word in words if word.startswith("--"))
    else:
        assert words[0] in {"pip", "git", "cd", "python", "tensorboard", "hf", "export", "torchrun", "source"}, command
