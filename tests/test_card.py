"""The card is true, runs, and nothing that came from outside breaks out of its place in it."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from pydantic import TypeAdapter

from finetune.card import code, fenced, model_card, prose, read_metrics
from finetune.config import TrainConfig
from finetune.config_io import load_text
from finetune.provenance import run_facts
from test_export import CASES, Run
from tiny_models import make_parts

torch.set_num_threads(1)

MALICIOUS = [
    "```\n<script>alert(1)</script>\n```",
    '"""; import os; os.system("touch pwned"); """',
    "'); import os; os.system('touch pwned'); ('",
    "{{ 7 * 7 }}{% for x in y %}",
    "---\nlicense: mit\n---\n# owned",
    "a | b | c\n|---|---|\n| x | y |",
    '<img src=x onerror="alert(1)"> <iframe src="//evil.example">',
    "![x](https://evil.example/track.png) [click](javascript:alert(1))",
    "see https://evil.example/x or www.evil.example or @someone",
    "````````python\nimport os\n````````",
    "\\`x\\` **bold** _it_ ~~no~~ $x^2$ # title\n\n# heading\n- item\n1. item",
    "\u202etxt.exe\u2066 \x00\x1b[31m red \u2028 line",
    "&lt;script&gt; &#60;b&#62;",
    "end with a backslash \\",
    "~~~\n</code></pre><b>",
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Tiny vae/, text_encoder/ and tokenizer/."""
    return make_parts(tmp_path_factory.mktemp("parts"))


def make(**sections) -> TrainConfig:
    settings = {"output_dir": "runs/x", "data": {"resolution": 16, "dataset_name": "owner/data"}} | sections
    return TypeAdapter(TrainConfig).validate_python(settings)


def text_config(prompt: str) -> TrainConfig:
    return make(
        space={"kind": "latent", "vae": "owner/vae"},
        conditioning={"kind": "text", "text_encoder": "owner/clip", "tokenizer": "owner/clip"},
        model={"kind": "unet2d_condition"},
        sample={"prompts": [prompt], "num_inference_steps": 2},
    )


def write(cfg: TrainConfig, *, pipeline="DDPMPipeline", **changes) -> str:
    arguments = {"run": run_facts(cfg), "samples": True, "metrics": [{"step": 3, "loss": 0.5}]} | changes
    return model_card(cfg, arguments.pop("run"), pipeline=pipeline, **arguments)


def split(card: str) -> tuple[dict, str, dict[str, list[str]]]:
    """(front matter, prose, language -> blocks of code), by CommonMark's rules for fences."""
    _, front, body = card.split("---\n", 2)
    outside, blocks, fence = [], {}, None
    for line in body.split("\n"):
        mark = re.match(r"(`{3,})(\w*)$", line)
        if fence is None and mark:
            fence, block = mark[1], blocks.setdefault(mark[2], [])
            block.append("")
        elif fence and mark and len(mark[1]) >= len(fence) and not mark[2]:
            fence = None
        elif fence:
            block[-1] += line + "\n"
        else:
            outside.append(line)
    assert fence is None, "a block of code is not closed"
    return yaml.safe_load(front), "\n".join(outside), blocks


def shape(text: str) -> list[str]:
    """What of Markdown's block structure can be seen at the beginnings of lines: prompts must not change it."""
    return [re.match(r"#+ [\w ]*|!\[\w+\]\(\w+\.png\)|\||", line)[0] for line in text.splitlines()]


@pytest.mark.parametrize("prompt", MALICIOUS)
def test_a_prompt_stays_in_its_place(prompt):
    cfg = text_config(prompt)
    facts = run_facts(cfg) | {"data": {"rows": 1, "left_out": 0, "classes": {prompt: 1}}}
    card = write(cfg, run=facts, pipeline="StableDiffusionPipeline")
    front, outside, blocks = split(card)
    usual_cfg = text_config("a cat")
    usual_facts = run_facts(usual_cfg) | {"data": {"rows": 1, "left_out": 0, "classes": {"a cat": 1}}}
    usual = split(write(usual_cfg, run=usual_facts, pipeline="StableDiffusionPipeline"))
    assert front == usual[0]
    assert shape(outside) == shape(usual[1])
    assert {language: len(found) for language, found in blocks.items()} == {"python": 1, "bash": 2, "yaml": 1}

    allowed = {"https://huggingface.co/datasets/owner/data"}
    assert set(re.findall(r"(?<!\\)\]\((\S+?)\)", outside)) == allowed | {"samples.png", "loss.png"}
    plain = re.sub(r"\\[\W_]", "", outside)  # what is left is what Markdown interprets
    assert not re.search(r"<|javascript:|www\.|@\w", plain)
    assert set(re.findall(r"https?://[^\s)]+", plain)) == allowed
    assert all(c.isprintable() or c == "\n" for c in card)

    [snippet] = blocks["python"]
    tree = ast.parse(snippet)
    assert [type(node).__name__ for node in tree.body] == [
        type(node).__name__ for node in ast.parse(usual[2]["python"][0]).body
    ]
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert prompt in strings
    assert load_text(blocks["yaml"][0]).sample.prompts == (prompt,)


@pytest.mark.parametrize("prompt", MALICIOUS)
def test_a_markdown_parser_sees_the_same_card_whatever_the_prompt(prompt):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark", {"html": True}).enable("table")

    def structure(prompt: str) -> list[tuple]:
        cfg = text_config(prompt)
        facts = run_facts(cfg) | {"data": {"rows": 1, "left_out": 0, "classes": {prompt: 1}}}
        tokens = parser.parse(write(cfg, run=facts, pipeline="StableDiffusionPipeline").split("---\n", 2)[2])
        inner = [child for token in tokens for child in token.children or [] if child.type != "text_special"]
        return [(t.type, t.tag, t.info, t.attrs) for t in tokens], [
            (t.type, t.tag, t.attrs) for t in inner if t.type != "text"
        ]

    assert structure(prompt) == structure("a cat")


def test_the_check_of_the_prompts_can_fail():
    """Negative control: the same prompts, written the naive way, change the structure."""
    naive = [f"Prompts: {prompt}\n\n```python\npipeline('{prompt}')\n```\n" for prompt in MALICIOUS]
    usual = shape(split("---\n---\n" + "Prompts: a cat\n\n```python\npipeline('a cat')\n```\n")[1])
    broken = 0
    for text in naive:
        try:
            _, outside, blocks = split("---\n---\n" + text)
            ast.parse(blocks["python"][0])
            broken += shape(outside) != usual or bool(re.search(r"<|https?:", outside))
        except (AssertionError, KeyError, SyntaxError, ValueError):
            broken += 1
    assert broken >= 8


@pytest.mark.parametrize("field", ["output_dir", "hub", "data"])
def test_names_are_escaped_too(field):
    bad = "x<b>`|`{{y}}"
    sections = {
        "output_dir": {"output_dir": bad},
        "hub": {"hub": {"hub_model_id": bad}},
        "data": {"data": {"resolution": 16, "train_data_dir": bad}},
    }[field]
    _, outside, _ = split(write(make(**sections)))
    assert "<b>" not in outside and "{{" not in outside


def test_front_matter():
    card = ModelCard(write(make(), repo_id="me/cats"))
    data = card.data.to_dict()
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == "unconditional-image-generation"
    assert data["datasets"] == ["owner/data"] and "license" not in data and "base_model" not in data
    assert isinstance(data["tags"], list)
    assert "\n# cats\n" in card.text
    text = ModelCard(write(text_config("a cat"))).data.to_dict()
    assert text["pipeline_tag"] == "text-to-image"


def test_front_matter_names_hub_ids_only(tmp_path):
    pretrained = {"kind": "pretrained", "pretrained_model_name_or_path": "google/ddpm-cat-256"}
    resolved = {"space": {"kind": "pixel"}, "conditioning": {"kind": "none"}}
    assert ModelCard(write(make(model=pretrained, **resolved))).data.to_dict()["base_model"] == "google/ddpm-cat-256"
    local = make(
        data={"resolution": 16, "dataset_name": str(tmp_path)},
        model=pretrained | {"pretrained_model_name_or_path": str(tmp_path / "base")},
        **resolved,
    )
    card = write(local)
    assert not {"base_model", "datasets"} & ModelCard(card).data.to_dict().keys()
    assert "fine-tuned from `base`" in card and str(tmp_path) not in card


DRIVER = """
import runpy, sys
for path in sys.argv[1:]:
    if "ours" not in path:
        assert "finetune" not in sys.modules, "the stock snippets need diffusers alone"
    names = runpy.run_path(path)
    names["images"][0].save(path + ".png")
"""


def test_the_snippets_run(parts, tmp_path):
    scripts = []
    cases = {name: combination for name, (combination, _) in CASES.items()}
    cases["UNetPipeline by sequence"] = ("pixel", "text", "unet2d_condition")
    for name, combination in cases.items():  # the stock pipelines come first
        run = Run(parts, tmp_path / name, combination, hub={"hub_model_id": "me/model"})
        folder = run.export()
        _, _, blocks = split((folder / "README.md").read_text())
        [snippet] = blocks["python"]
        assert "'me/model'" in snippet
        ours = "UNetPipeline" in name
        assert ("from finetune.pipelines import" in snippet) == ours == ("pip install" in "".join(blocks["bash"]))
        scripts.append(tmp_path / f"{'ours' if ours else 'stock'}-{len(scripts)}.py")
        scripts[-1].write_text(snippet.replace("'me/model'", repr(str(folder))))
    assert len(scripts) == 5
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-c", DRIVER, *map(str, scripts)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(f"{script}.png").stat().st_size for script in scripts) and (tmp_path / "image.png").is_file()


def test_without_a_repository_the_snippet_loads_its_own_folder():
    assert "from_pretrained('.')" in write(make())
    assert "from_pretrained('me/x')" in write(make(), repo_id="me/x")


def test_the_card_states_the_run(parts, tmp_path):
    run = Run(parts, tmp_path, ("pixel", "class_label", "unet2d"), ema={"use_ema": True})
    run.arguments["run"]["data"] |= {
        "rows": 1234, "left_out": 5, "upscaled": 6, "width": {"min": 8, "median": 16, "max": 32},
        "height": {"min": 8, "median": 16, "max": 32}, "classes": {"cats": 1000, "dogs": 234},
    }  # fmt: skip
    text = (run.export() / "README.md").read_text()
    facts = ["draws 16×16 images by class", "for 4 optimizer steps", "1,234 used, 5 left out", "2: cats (1,000)"]
    facts += ["upscaled | 6,", "class_labels=[0, 1, 2]", "photos, local", "| images seen | 64 |", "16 images"]
    facts += [f"`{'0f' * 16}`", "average with decay 0.9999", f"torch `{torch.__version__}`"]
    missing = [fact for fact in facts if fact not in text]
    assert not missing


def test_reproducing_needs_only_the_folder():
    cfg = make()
    _, _, blocks = split(write(cfg))
    assert blocks["bash"][0] == "accelerate launch train_unet.py --config config.yaml\n"
    assert dataclasses.replace(load_text(blocks["yaml"][0]), output_dir=cfg.output_dir) == cfg


def test_cards_of_the_same_run_are_equal():
    assert write(make()) == write(make())


def test_read_metrics(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []
    lines = [{"step": 1, "loss": 0.5}, {"step": 1, "fid": 3.0}, {"step": 2, "loss": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(tmp_path / "metrics.jsonl") == [lines[0]]


def test_escapes():
    assert prose("a_b <i>\n c") == r"a\_b &lt;i&gt; c"
    assert code("a`b|c\nd") == "`abcd`"
    assert fenced("x ```` y", "text").splitlines() == ["`````text", "x ```` y", "`````"]
