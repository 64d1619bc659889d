"""Where the images come from, told apart by what is there: a Hub id, a local folder or file, a data set from Python.

Whatever the source, the result is a `datasets.Dataset`, or `Shards` if it is streamed, whose images are still encoded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from huggingface_hub import constants

from finetune.config import Data
from finetune.config_data import PACK, SHUFFLE_BUFFER_SIZE
from finetune.errors import ConfigError, DataError
from finetune.folder import (
    MOST_LISTED,
    SPLITS,
    TABLES,
    Folder,
    Problem,
    Subsets,
    choose_split,
    read_folder,
    scan,
    unsafe_path,
)
from finetune.kohya import layout_of, read_subsets
from finetune.kohya_config import read_dataset_config
from finetune.pretrained import commit_of
from finetune.shards import Shards, open_shards

PATHS = (Value("string"), Value("large_string"))
BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set as it was found, before its columns are looked at."""

    name: str
    dataset: Dataset | Shards
    folders: tuple[str, ...] | None
    """Real paths of the folders that image files may lie in; relative paths start at the first. None: anywhere."""
    problems: list[Problem]
    """What is wrong with it apart from its rows, such as a file that the metadata does not list."""
    lines: list[str] | None = None
    """Where the metadata tells of each row, such as "metadata.jsonl:7"; None without metadata."""
    subsets: Subsets | None = None


def open_source(
    data: Data, dataset: Dataset | None = None, *, captions: bool = False, labels: bool = False
) -> Source:
    """Open the data that the configuration names, or `dataset`.

    captions: whether a.txt beside a.jpg is read. labels: whether sub-folders are classes, whatever they are called.
    Raises DataError where nothing can be opened, ConfigError where none or two sources are named.
    """
    named = data.train_data_dir or data.dataset_name or data.dataset_config
    if dataset is not None:
        if named:
            raise ConfigError(f"a data set was passed and the configuration names {named}: give one of them")
        if data.streaming:
            raise ConfigError("a data set was passed, which is not streamed: remove data.streaming")
        return _from_python(dataset)
    if named is None:
        raise ConfigError("no data: set data.dataset_name (Hub id or path) or data.train_data_dir (folder of images)")
    if data.dataset_config:
        subsets = read_dataset_config(Path(named).expanduser())
        roots = tuple(os.path.realpath(Path(each.image_dir).expanduser()) for each in subsets)
        return _of_folder(read_subsets(subsets, captions=captions), named, roots)
    path = Path(named).expanduser()
    if data.train_data_dir and not path.is_dir():
        raise DataError(f"data.train_data_dir {named} is not a folder")
    if not path.exists():
        _refuse_no_id(named)
        return _stream_hub(data, named) if data.streaming else _from_hub(data, named)
    if data.revision or data.dataset_config_name:
        raise ConfigError(
            f"data.revision and data.dataset_config_name belong to data sets on the Hub, but {named} is a local path: "
            "remove them"
        )
    return _stream_path(path, data) if data.streaming else _from_path(path, data, captions, labels)


def _from_python(dataset: Dataset) -> Source:
    if not isinstance(dataset, Dataset):
        remedy = "convert it with Dataset.from_dict or Dataset.from_generator"
        if isinstance(dataset, IterableDataset | IterableDatasetDict):
            remedy = (
                "its shuffle buffer cannot be resumed without losing samples. For a stream that resumes exactly name "
                "its Parquet shards by data.dataset_name and set data.streaming true"
            )
        if isinstance(dataset, DatasetDict):
            remedy = f"pass one split of it: {', '.join(dataset)}"
        raise DataError(f"the data must be a datasets.Dataset, got {type(dataset).__name__}: {remedy}")
    return Source(name="the data set passed", dataset=dataset.with_format(None), folders=None, problems=[])


def _refuse_no_id(named: str) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", named) or named.startswith(".") or Path(named).suffix in TABLES:
        raise DataError(f"data.dataset_name {named}: no such file or folder, and it does not have the form of a Hub id")


def _from_hub(data: Data, named: str) -> Source:
    try:
        dataset = load_dataset(named, data.dataset_config_name, revision=_commit(data, named), split=data.split)
    except Exception as error:  # datasets, the Hub client, httpx and pyarrow share no base class
        raise DataError(
            f"data.dataset_name {named} is not a local path, and cannot be loaded from the Hub (split {data.split}): "
            f"{type(error).__name__}: {error}"
        ) from error
    return Source(name=named, dataset=_one_split(dataset, named, data.split), folders=_caches(), problems=[])


def _commit(data: Data, named: str) -> str | None:
    """The commit that the data's revision is at, by which a resumed run goes on with the files that it began with."""
    try:
        return commit_of(named, setting="data.dataset_name", revision=data.revision, repo_type="dataset")
    except ConfigError:  # without a connection `datasets` has caches of its own, and else says what is wrong
        return data.revision


def _caches() -> tuple[str, ...]:
    """The only folders that data from the Hub may name files in."""
    caches = (datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    return tuple(os.path.realpath(folder) for folder in caches)


def _stream_hub(data: Data, named: str) -> Source:
    """The shards of a split at the commit that the revision means now: `datasets` says which files these are."""
    try:
        builder = load_dataset_builder(named, data.dataset_config_name, revision=_commit(data, named))
    except Exception as error:  # as in _from_hub
        raise DataError(
            f"data.dataset_name {named} is not a local path, and cannot be opened on the Hub: "
            f"{type(error).__name__}: {error}"
        ) from error
    files = {str(split): list(urls) for split, urls in (builder.config.data_files or {}).items()}
    if data.split not in files:
        raise DataError(
            f"{named} has no split {data.split!r} (data.split) that can be streamed; it has: {', '.join(files)}"
        )
    addresses = [re.match(r"hf://datasets/[^@]+@[0-9a-f]{40}/.+\.parquet", url) for url in files[data.split]]
    if not all(addresses):
        raise DataError(
            f"{named} is not made of Parquet files on the Hub, which data.streaming reads: set data.revision "
            "refs/convert/parquet, the Hub's own conversion, if it has one; or remove data.streaming"
        )
    shards = open_shards(files[data.split], buffer_size=_buffer_size(data), declared=builder.info.features)
    return Source(name=named, dataset=shards, folders=_caches(), problems=[])


def _stream_path(path: Path, data: Data) -> Source:
    root, tables = path.parent, [path]
    if path.is_dir():
        listing = scan(path)
        root = listing.root
        if listing.images:
            raise DataError(
                f"{path} is a folder of images, but data.streaming reads Parquet files: remove data.streaming; or "
                f"{PACK}"
            )
        tables = [root / table for table in listing.tables]
    others = [table.name for table in tables if table.suffix.lower() != ".parquet"]
    if others or not tables:
        raise DataError(
            f"data.streaming reads Parquet files, and {path} holds {others[0] if others else 'none'}: convert it with "
            "datasets (load_dataset or load_from_disk, then to_parquet), or remove data.streaming"
        )
    tables = _tables_of_split(tables, root, data.split) if path.is_dir() else tables
    shards = open_shards([str(table) for table in tables], buffer_size=_buffer_size(data))
    return Source(name=str(path), dataset=shards, folders=(os.path.realpath(root),), problems=[])


def _buffer_size(data: Data) -> int:
    return data.shuffle_buffer_size or SHUFFLE_BUFFER_SIZE


def _from_path(path: Path, data: Data, captions: bool, labels: bool) -> Source:
    if path.is_file():
        if path.suffix.lower() not in TABLES:
            raise DataError(f"{path} is not a file that is read: give {', '.join(sorted(TABLES))}, or a folder")
        return _from_tables([path], path.parent, str(path), data)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _from_saved(path, data)
    listing = scan(path)
    if listing.images:
        listing = choose_split(listing, data.split)
        repeated = None if labels else layout_of(listing)
        if repeated is None:
            folder = read_folder(listing, captions=captions)
        else:
            folder = read_subsets(repeated, captions=captions, root=listing.root)
            folder.problems.extend(problem for problem in listing.problems if "/" not in problem.name)
        return _of_folder(folder, str(path), (str(listing.root),))
    tables = [listing.root / table for table in listing.tables]
    if tables:
        chosen = _tables_of_split(tables, listing.root, data.split)
        return replace(_from_tables(chosen, listing.root, str(path), data), problems=listing.problems)
    more = f"; {len(listing.unsupported)} files have a format that is not read" if listing.unsupported else ""
    more += "".join(f"; {name} {reason}" for name, reason in listing.problems[:3])
    raise DataError(f"{path} holds no images (.png, .jpg, ...) and no {', '.join(sorted(TABLES))} files{more}")


def _of_folder(folder: Folder, name: str, folders: tuple[str, ...]) -> Source:
    try:
        dataset = Dataset.from_dict(folder.columns)
    except (TypeError, ValueError, OverflowError) as error:  # pyarrow's errors are ValueErrors or TypeErrors
        raise DataError(f"the metadata of {name} mixes types within a column: {error}") from error
    if folder.class_names is not None:
        dataset = dataset.cast_column("label", ClassLabel(names=folder.class_names))
    found = {"problems": folder.problems, "lines": folder.lines, "subsets": folder.subsets}
    return Source(name=name, dataset=dataset, folders=folders, **found)


def _from_saved(path: Path, data: Data) -> Source:
    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} looks like a saved data set, but cannot be loaded: {error}") from error
    dataset = _one_split(dataset, str(path), data.split)
    return Source(name=str(path), dataset=dataset, folders=(os.path.realpath(path),), problems=[])


def _one_split(dataset: Dataset | DatasetDict, named: str, split: str) -> Dataset:
    if isinstance(dataset, Dataset):
        return dataset
    if not isinstance(dataset, DatasetDict) or split not in dataset:
        raise DataError(f"{named} has no split {split!r} (data.split); it has: {', '.join(dataset)}")
    return dataset[split]


def _tables_of_split(tables: list[Path], root: Path, split: str) -> list[Path]:
    """The files of a split: those whose relative path holds its name as a word; all, if none holds a split's name."""
    words = {table: set(re.split(r"[^a-z]+", table.relative_to(root).as_posix().lower())) & SPLITS for table in tables}
    wanted = split.split("[", 1)[0]
    chosen = [table for table in tables if wanted in words[table] or not any(words.values())]
    if not chosen:
        names = ", ".join(table.name for table in tables)
        raise DataError(f"{root} has no split {split!r} (data.split) among: {names}")
    return chosen


def _from_tables(tables: list[Path], root: Path, name: str, data: Data) -> Source:
    kinds = {BUILDERS[table.suffix.lower()] for table in tables}
    if len(kinds) > 1:
        raise DataError(f"{name} mixes {' and '.join(sorted(kinds))} files: keep one kind, or name one file")
    files = {data.split.split("[", 1)[0]: [str(table) for table in tables]}
    try:
        dataset = load_dataset(kinds.pop(), data_files=files, split=data.split)
    except Exception as error:  # as in _from_hub; pandas' parser too
        cause = error.__cause__ or error  # datasets wraps what happened into "An error occurred while generating"
        raise DataError(f"{name} cannot be read: {type(cause).__name__}: {cause}") from error
    _refuse_unsafe(dataset, data.image_column, name)
    return Source(name=name, dataset=dataset, folders=(os.path.realpath(root),), problems=[])


def _refuse_unsafe(dataset: Dataset, column: str, name: str) -> None:
    """Refuse a table that names image files by paths other than relative ones that stay below it."""
    if dataset.features.get(column) not in PATHS:
        return
    reasons = ((row, unsafe_path(path)) for row, path in enumerate(dataset[column]) if path is not None)
    unsafe = [f"  row {row}: {column} {reason}" for row, reason in reasons if reason]
    if unsafe:
        raise DataError(f"{len(unsafe)} rows of {name} are refused:\n" + "\n".join(unsafe[:MOST_LISTED]))


def with_encoded_images(dataset: Dataset | Shards, column: str, name: str) -> Dataset | Shards:
    """The data set with `column` as {"bytes", "path"}, so that nothing but `images.decode` ever decodes it."""
    feature = dataset.features[column]
    struct = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    plain = feature in (*PATHS, Value("binary"), Value("large_binary"))
    if not (struct or plain or isinstance(feature, Image)):
        raise DataError(f"column {column!r} (data.image_column) of {name} holds {feature}, not images, bytes or paths")
    if isinstance(dataset, Shards):
        if feature in PATHS:
            raise DataError(f"column {column!r} (data.image_column) of {name} holds paths, not images: {PACK}")
        return dataset.with_images(column)
    if feature == Value("large_string"):  # as CSV files are read; Image does not take it
        dataset = dataset.cast_column(column, Value("string"))
    return dataset.cast_column(column, Image(decode=False))
