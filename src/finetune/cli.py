"""The command line `finetune`. Nothing heavy is imported before the arguments are known to be right."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, FinetuneError
from finetune.redaction import secret_in, shown
from finetune.signals import SIGNALS, die_with_parent

LATER = 2.0
"""Seconds that a process waits which leaves it to the first to say what is wrong: launchers end all when one has."""
USAGE = """usage: finetune COMMAND [options]

  train       train the UNet of a recipe      finetune train --config configs/train/digits.yaml
  sample      draw images                     finetune sample runs/digits --prompt "a handwritten seven" --out pictures
  evaluate    measure a run on data           finetune evaluate runs/digits_pixel --metrics bpd
  ema         average of another width        finetune ema runs/digits --relative_width 0.075 --out models/wider
  merge       LoRA + model -> model           finetune merge lora.safetensors --base models/sd --out models/merged
  push        publish a finished run          finetune push runs/digits
  import      convert another checkpoint      finetune import iddpm model500000.pt --out models/cifar10
  sigma_data  measure the spread of x0        finetune sigma_data --config configs/train/digits_edm.yaml
  cache       what caches hold; make room     finetune cache --status
  config      show settings or their schema   finetune config --config configs/train/digits.yaml --resolved

`finetune COMMAND --help` lists the options. Over several processes: accelerate launch train_unet.py --config FILE
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (see finetune.errors).

    argv: None for the command line of this process, which ends with the command.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = {"train": train, "sample": _sample, "evaluate": _evaluate, "ema": _ema, "push": _push}
    commands |= {"merge": _merge, "import": _import, "sigma_data": _sigma_data, "cache": _cache, "config": _config}
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in commands:
        print(f"finetune: there is no command {command!r}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    return guarded(commands[command], rest, last=argv is None)


def guarded(command: Callable[[list[str]], int | None], argv: list[str], *, last: bool = False) -> int:
    """Run `command(argv)`; errors meant for the user become one message on stderr and their exit code, others 1.

    What is logged or raised, by whatever library, is shown without tokens and control characters.
    last: the process ends with it; signals that come while the interpreter does are ignored.
    """
    if sys.platform == "win32":
        print("finetune runs on Linux and macOS; on Windows, use it inside WSL", file=sys.stderr)
        return 2
    os.environ["DIFFUSERS_DISABLE_REMOTE_CODE"] = "1"  # read when diffusers is imported, which nothing here was yet
    _log_to_screen(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    with SIGNALS.leaving(last=last):
        try:
            _refuse_secrets(argv)
            return command(argv) or 0
        except FinetuneError as error:
            # It is wrong in all processes alike, or in those of one machine, such as a path that is not there.
            if _is_first_here() or not isinstance(error, ConfigError):
                print(shown(str(error)), file=sys.stderr)
            else:
                time.sleep(LATER)
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception:
            print(shown(traceback.format_exc()), end="", file=sys.stderr)
            return 1


def _is_first_here() -> bool:
    """Whether this process is the first of its machine, by the launcher's environment."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _refuse_secrets(argv: list[str]) -> None:
    if kind := next(filter(None, map(secret_in, argv)), None):
        raise ConfigError(
            f"an option contains {kind}, which every process of this machine can read there and your shell keeps: take "
            "it out. The Hub's token comes from `hf auth login` or HF_TOKEN, those of trackers from their variables"
        )


class _Record(logging.LogRecord):
    """A record of any logger, whose text may be shown: libraries have handlers of their own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[0]:
            self.exc_text = shown("".join(traceback.format_exception(*self.exc_info)).rstrip())

    def getMessage(self) -> str:  # noqa: N802  the name that logging calls
        """The text, as it may be shown."""
        return shown(super().getMessage())


def _log_to_screen(level: int) -> None:
    """Show what this package logs from `level` on; of the libraries, warnings and errors, as they show them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logging.setLogRecordFactory(_Record)
    logger = logging.getLogger("finetune")
    logger.setLevel(level)
    logger.handlers = [handler]  # not added: a second command in this process would say everything twice
    # What diffusers passes to huggingface_hub, and nobody else can change.
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", category=UserWarning)


def train(argv: list[str]) -> None:
    """Train from a recipe and options; what `accelerate launch train_unet.py` runs in each process."""
    if {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():  # `accelerate launch`, torchrun
        die_with_parent()

    from finetune.config_io import load_or_exit

    try:
        loaded = load_or_exit(argv)
    except SystemExit:
        if not _is_first_here():
            time.sleep(LATER)
        raise

    from finetune.run import train

    train(loaded.config, trust=loaded.trust)


def _sample(argv: list[str]) -> None:
    from finetune.sample_command import sample_main

    sample_main(argv)


def _ema(argv: list[str]) -> None:
    from finetune.posthoc import ema_main

    ema_main(argv)


def _evaluate(argv: list[str]) -> None:
    from finetune.evaluate import evaluate_main

    evaluate_main(argv)


def _sigma_data(argv: list[str]) -> None:
    from finetune.measure import sigma_data_main

    sigma_data_main(argv)


def _cache(argv: list[str]) -> None:
    from finetune.cache_command import cache_main

    cache_main(argv)


def _import(argv: list[str]) -> None:
    from finetune.importers import import_main

    import_main(argv)


def _merge(argv: list[str]) -> None:
    from finetune.merge_command import merge_main

    merge_main(argv)


def _config(argv: list[str]) -> int:
    from finetune.config_io import config_main

    try:
        return config_main(argv)
    except BrokenPipeError:  # `| head` has seen enough; nothing is left to be flushed at the end either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _push(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("finetune push", description="Push a finished run, or finish a push that failed.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's output_dir")
    parser.add_argument("--hub_model_id", help='"name" or "owner/name"; default: as the run was configured')
    args = parser.parse_args(argv)
    from finetune.config_export import is_exported

    if not (args.run / "config.yaml").is_file() or is_exported(args.run):
        raise ConfigError(f"{args.run} is no run (a folder with config.yaml): give the output_dir of a finished run")
    if not is_exported(args.run / "pipeline"):
        raise ConfigError(f"{args.run} is not finished: its training command, given again, goes on where it stopped")

    from dataclasses import replace

    from finetune.config_io import load_text
    from finetune.run import push

    cfg = load_text((args.run / "config.yaml").read_text("utf-8"), name=str(args.run / "config.yaml"))
    hub = replace(cfg.hub, hub_model_id=args.hub_model_id or cfg.hub.hub_model_id)
    push(replace(cfg, output_dir=str(args.run), hub=hub))


if __name__ == "__main__":
    sys.exit(main())
