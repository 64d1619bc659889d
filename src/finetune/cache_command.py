"""The command `finetune cache`: what the caches hold, and making room."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

from finetune.errors import ConfigError

DAY = 86400.0
HOUR = 3600.0


def cache_main(argv: list[str] | None = None) -> None:
    """Print what the caches hold, or remove what is broken or has not been used. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        "finetune cache",
        description="Latents and text embeddings that runs keep on the disk (cache.latents, cache.text). What is "
        "removed is made anew by the next run that needs it.",
        allow_abbrev=False,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--status", action="store_true", help="show sizes and numbers by model, and their last use")
    what.add_argument("--prune", action="store_true", help="remove what is broken, and with --older_than what is old")
    parser.add_argument("--older_than", type=float, metavar="DAYS", help="also what no run used for so many days")
    parser.add_argument("--folder", help="as cache.folder; default: finetune/cache under HF_HOME")
    args = parser.parse_args(argv)
    if args.older_than is not None and not (args.prune and args.older_than >= 0):
        raise ConfigError(f"--older_than {args.older_than:g}: days, at least 0, that go with --prune")

    from finetune.caches import cache_folder

    root = cache_folder(args.folder)
    if args.status:
        status(root)
    else:
        prune(root, older_than=args.older_than)


def status(root: Path) -> None:
    """Print one line for each model whose work is kept under `root`."""
    from finetune.cache_store import Damaged, read_shard, shards_of

    total = 0
    for folder in _folders(root):
        records, size, broken, used = Counter(), 0, 0, 0.0
        for path in shards_of(folder):
            size += path.stat().st_size
            used = max(used, _last_use(path))
            try:
                shard, _ = read_shard(path)
                records["x".join(map(str, shard.shape))] += shard.count
            except Damaged:
                broken += 1
        total += size
        counts = ", ".join(f"{count:,} of {shape}" for shape, count in sorted(records.items())) or "nothing"
        last = f"last used {time.strftime('%Y-%m-%d', time.localtime(used))}" if used else "never used"
        damaged = f", {broken} damaged files" if broken else ""
        print(f"{folder.parent.name:7} {_model(folder)}  {counts}, {size / 1e6:,.1f} MB, {last}{damaged}")
        print(f"        {folder.name}")
    print(f"{total / 1e6:,.1f} MB in {root}")


def prune(root: Path, *, older_than: float | None = None) -> None:
    """Remove damaged and half-written files under `root`, and those that no run used for `older_than` days."""
    from finetune.cache_store import Damaged, read_shard, remove, shards_of

    freed = damaged = old = 0
    now = time.time()
    for folder in _folders(root):
        for path in shards_of(folder):
            try:
                read_shard(path)
                unused = older_than is not None and now - _last_use(path) >= older_than * DAY
                old += unused
            except Damaged:
                unused = True
                damaged += 1
            freed += remove(path) if unused else 0
        for path in folder.glob(".*.tmp"):
            if now - path.stat().st_mtime > HOUR:  # nobody is writing it any more
                freed += path.stat().st_size
                path.unlink(missing_ok=True)
                damaged += 1
        if not shards_of(folder) and not any(folder.glob(".*.tmp")):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    unused_for = "" if older_than is None else f", {old} not used for {older_than:g} days"
    print(f"freed {freed / 1e6:,.1f} MB in {root}: {damaged} damaged or half-written files{unused_for}")


def _folders(root: Path) -> list[Path]:
    return sorted(path for kind in ("latents", "text") for path in (root / kind).glob("*") if path.is_dir())


def _model(folder: Path) -> str:
    note = folder / "model.txt"
    name = note.read_text("utf-8", "replace").strip() if note.is_file() else "unknown model"
    return f"{name} ({folder.name.rpartition('-')[2]})"


def _last_use(path: Path) -> float:
    """When a run last used a shard, or wrote it, in seconds."""
    note = path.with_suffix(".used")
    return (note if note.is_file() else path).stat().st_mtime
