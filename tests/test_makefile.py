"""`make` on machines that lack something: one clear line, and nothing half-made that a second try takes for done."""

import os
import shutil
import subprocess
import sys

import pytest

from tiny import ROOT


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder, *words, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "MAKE"))}
    return subprocess.run(
        ["make", *words], cwd=folder, env={**clean, **environment}, capture_output=True, text=True, timeout=100
    )


def test_no_python(checkout):
    result = make(checkout, "train", "PYTHON=/absent/python3")
    assert result.returncode != 0
    assert "Python 3.10 or later is needed" in result.stderr
    assert not (checkout / ".venv").exists()


def test_too_little_disk(checkout):
    text = (checkout / "Makefile").read_text()
    assert "free < 10e9" in text
    (checkout / "Makefile").write_text(text.replace("10e9", "10e18"))
    result = make(checkout, "setup", f"PYTHON={sys.executable}")
    assert result.returncode != 0
    assert "10 GB of free disk are needed" in result.stderr


def test_no_network(checkout):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    result = make(checkout, "setup", f"PYTHON={sys.executable}", **nowhere)
    assert result.returncode != 0
    assert "pip could not install requirements.txt" in result.stderr
    assert not (checkout / ".venv" / "installed").exists()


def test_what_is_there_is_not_done_again(checkout):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / "installed").touch()
    result = make(checkout, "setup", "PYTHON=/absent/python3")
    assert (result.returncode, result.stderr) == (0, "")
