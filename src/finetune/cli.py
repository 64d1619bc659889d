"""The command line `finetune`. Nothing heavy is imported before the arguments are known to be right."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.errors import ConfigError, FinetuneError

USAGE = """usage: finetune COMMAND [options]

  train     train the UNet of a recipe      finetune train --config configs/train/digits.yaml
  sample    draw images                     finetune sample runs/digits --prompt "a handwritten seven" --out pictures
  push      publish a finished run          finetune push runs/digits
  import    convert another checkpoint      finetune import iddpm model500000.pt --out models/cifar10
  config    show settings or their schema   finetune config --config configs/train/digits.yaml --resolved

`finetune COMMAND --help` lists the options. Over several processes: accelerate launch train_unet.py --config FILE
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code (see finetune.errors)."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    commands = {"train": train, "sample": _sample, "push": _push, "import": _import, "config": _config}
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in commands:
        print(f"finetune: there is no command {command!r}; choose from {', '.join(commands)}", file=sys.stderr)
        return 2
    return guarded(commands[command], rest)


def guarded(command: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Run `command(argv)`; errors meant for the user become one message on stderr and their exit code."""
    main_process = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(level=logging.INFO if main_process else logging.ERROR, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return command(argv) or 0
    except FinetuneError as error:
        if main_process or not isinstance(error, ConfigError):
            print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train(argv: list[str]) -> None:
    """Train from a recipe and options; what `accelerate launch train_unet.py` runs in each process."""
    from finetune.config_io import load_or_exit

    cfg = load_or_exit(argv)

    from finetune.run import train  # from here on torch is imported

    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # started by `accelerate launch`
        from finetune.signals import die_with_parent

        die_with_parent()
    train(cfg)


def _sample(argv: list[str]) -> None:
    from finetune.sample import sample_main

    sample_main(argv)


def _import(argv: list[str]) -> None:
    from finetune.importers import import_main

    import_main(argv)


def _config(argv: list[str]) -> int:
    from finetune.config_io import config_main

    return config_main(argv)


def _push(argv: list[str]) -> None:
    parser = argparse.ArgumentParser("finetune push", description="Push a finished run, or finish a push that failed.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's output_dir")
    parser.add_argument("--hub_model_id", help='"name" or "owner/name"; default: as the run was configured')
    args = parser.parse_args(argv)
    if not (args.run / "pipeline" / "model_index.json").is_file():
        raise ConfigError(f"{args.run} holds no exported pipeline: give the output_dir of a finished run")

    from dataclasses import replace

    from finetune.config_io import load_text
    from finetune.run import push

    cfg = load_text((args.run / "config.yaml").read_text("utf-8"), name=str(args.run / "config.yaml"))
    hub = replace(cfg.hub, hub_model_id=args.hub_model_id or cfg.hub.hub_model_id)
    push(replace(cfg, output_dir=str(args.run), hub=hub))


if __name__ == "__main__":
    sys.exit(main())
