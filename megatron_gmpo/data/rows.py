"""Read the rows of a data set one after another, without changing a value."""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ..config import DataConfig, EvalSetConfig
from ..errors import InputError
from . import games, reasoning_gym
from .image_columns import ImageSource, arrow_images, sources_of

_BATCH = 1000
"""Rows of a Parquet file or an Arrow table that are in memory at a time."""
_LONGEST_NUMBER = 400
"""Digits before or after the point that a number may have; a 64-bit float has at most 324."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_REMEDY = (
    "give a .jsonl, .json, .csv or .parquet file, a save_to_disk folder, owner/name of the hub, "
    "or reasoning_gym:name"
)
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a character beyond U+FFFF. JSON can hold one, but no text file and no tokenizer."""

_REPORTED = ("level", "subject", "type")
"""Columns that label the problems of a benchmark, if it has them."""

Record = dict[str, Any]


class Columns(NamedTuple):
    """The columns to read: those that every data set must have, those that are read if it has them, and the
    column of images, or ""."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    images: str = ""


@dataclass(frozen=True)
class Row:
    """A problem of a data set.

    Attributes:
        id: name of the data set and number of the row, e.g. ``"gsm8k_train/17"``.
        where: start of an error line about the row.
        problem: text or a list of chat messages; not checked yet.
        answer: the answer as text.
        labels: column -> its value as text, for the columns of ``report_by``.
        images: the images of the problem, not read yet.
    """

    id: str
    where: str
    problem: Any
    answer: str
    labels: dict[str, str]
    images: tuple[ImageSource, ...] = ()


def read_rows(cfg: DataConfig, section: str) -> Iterator[Row]:
    """Yield the rows of ``cfg.path``, or of ``cfg.files`` one after another.

    The rows are read while the caller takes them. A name is the exact name of a file: ``*``, ``[0-9]`` and
    ``$HOME`` are ordinary characters.

    A number becomes its exact decimal text: the text of a JSON number without an exponent, and the shortest
    text of a binary float that has the same value at the column's width. So JSON 1e-05 is "0.00001", and
    Parquet's float32 33.3 is "33.3". The texts of an answer that is a list are joined with commas.

    Raises:
        InputError: the data set, split or column does not exist or cannot be read; there are no rows; an
            answer is neither text nor a finite number.
    """
    for source in cfg.files or (cfg.path,):
        field = f"{section}.files: {source!r}" if cfg.files else f"{section}.path = {source!r}"
        # the names of several files may differ in the folder only
        name = str(Path(source).with_suffix("")) if cfg.files else _name(source)
        count = 0
        folder = Path(source).parent if Path(source).is_file() else Path(source)
        for problem, answer, images, labels in _selected(
            _records(source, cfg, section, field), cfg, section, source
        ):
            where = f"{field}, row {count}"
            yield Row(
                f"{name}/{count}",
                where,
                problem,
                _answer(answer, cfg.answer_column, where),
                labels,
                sources_of(images, folder, where, cfg.image_column),
            )
            count += 1
        if count == 0:
            raise InputError(f"{field} has no rows: give a data set with problems")


def _name(source: str) -> str:
    if source.startswith(reasoning_gym.PREFIX):
        return source.removeprefix(reasoning_gym.PREFIX).partition("?")[0]
    return Path(source.partition(":")[0]).stem


def _columns(cfg: DataConfig) -> Columns:
    required = cfg.prompt_column, cfg.answer_column
    if not isinstance(cfg, EvalSetConfig):
        return Columns(required, (), cfg.image_column)
    if cfg.report_by is None:
        return Columns(required, _REPORTED, cfg.image_column)
    return Columns(required + cfg.report_by, (), cfg.image_column)


def _selected(
    records: Iterator[Record], cfg: DataConfig, section: str, source: str
) -> Iterator[tuple[Any, Any, Any, dict[str, str]]]:
    """Yield problem, answer, images and labels of every record.

    None is a value missing after the first record.
    """
    required, optional, image_column = _columns(cfg)
    fields = ["prompt_column", "answer_column", *["report_by"] * (len(required) - 2)]
    if image_column:
        fields, required = [*fields, "image_column"], (*required, image_column)
    for number, record in enumerate(records):
        values = []
        for field, column in zip(fields, required, strict=True):
            try:
                values.append(_value(record, column))
            except KeyError:
                if number == 0:
                    raise InputError(
                        f"{section}.{field} = {column!r} is not a column of {source}: "
                        f"choose one of {list(_names(record))}"
                    ) from None
                values.append(None)
        images = values.pop() if image_column else None
        problem, answer, *reported = values
        labels = dict(zip(required[2:], reported, strict=False)) | {
            column: record[column] for column in optional if column in record
        }
        yield (
            problem,
            answer,
            images,
            {column: str(label) for column, label in labels.items() if label is not None},
        )


def _value(record: Record, column: str) -> Any:
    """Return a column's value. ``a.b`` is field ``b`` of column ``a`` if no column has that name."""
    outer, _, inner = column.partition(".")
    if column not in record and inner and isinstance(record.get(outer), dict):
        return _value(record[outer], inner)
    return record[column]


def _names(record: Record) -> Iterator[str]:
    """Yield the names of all columns, dotted for the fields of objects."""
    for key, value in record.items():
        yield from (f"{key}.{name}" for name in _names(value)) if isinstance(value, dict) else [key]


def _answer(value: Any, column: str, where: str) -> str:
    """Return an answer as text."""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else ""
    if isinstance(value, int):  # true becomes True
        text = str(value)
    elif isinstance(value, float | np.floating | Decimal):
        number = Decimal(str(value))  # str gives the shortest text of the value's own width
        if number.is_finite() and abs(number.adjusted()) < _LONGEST_NUMBER:
            text = format(number, "f")
    if not text.strip() or LONE_SURROGATE.search(text):
        shown = str(value) if isinstance(value, np.floating | Decimal) else repr(value)
        raise InputError(
            f"{where}: column {column!r} is {shown:.200}: "
            f"give every problem an answer, text or a finite number of at most {_LONGEST_NUMBER} digits"
        )
    return text


def _records(source: str, cfg: DataConfig, section: str, field: str) -> Iterator[Record]:
    """Yield the records of a file, a folder or a hub data set; turn any failure into one line."""
    try:
        yield from _open(source, cfg, section, field)
    except InputError:
        raise
    except Exception as error:  # readers of many formats raise errors of many kinds
        reason = str(error.__cause__ or error).strip().partition("\n")[0] or type(error).__name__
        remedy = "correct it" if os.path.exists(source) else _REMEDY
        raise InputError(f"{field} cannot be loaded ({reason}): {remedy}") from None


def _open(source: str, cfg: DataConfig, section: str, field: str) -> Iterator[Record]:
    path = Path(source)
    columns = _columns(cfg)
    hub, _, subset = source.partition(":")
    if not source:
        raise InputError(f"{section}.path is empty: {_REMEDY}")
    if source.startswith(reasoning_gym.PREFIX):
        _check_split(cfg, section, source, ["train"])
        return reasoning_gym.records(source, field)
    if path.is_file() and path.suffix in _READERS:
        _check_split(cfg, section, source, ["train"])
        return _READERS[path.suffix](path, columns)
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        try:
            splits = datasets.load_from_disk(source)
        except IndexError:  # raised for a data set without rows
            return iter(())
    elif path.is_dir() and (found := games.games_in(path)):
        _check_split(cfg, section, source, ["train"])
        return games.records(found)
    elif path.is_dir():
        raise InputError(
            f"{field} is a folder that save_to_disk did not write, without games: "
            f"name its files in {section}.files"
        )
    elif path.exists():
        raise InputError(f"{field} has an unknown format: {_REMEDY}")
    elif cfg.files or path.suffix in _READERS or not _HUB_NAME.fullmatch(hub):
        raise InputError(f"{field} does not exist: {_REMEDY}")
    else:
        splits = datasets.load_dataset(hub, subset or None)
    if isinstance(splits, datasets.Dataset):
        return _dataset_records(splits, columns, path)
    _check_split(cfg, section, source, list(splits))
    return _dataset_records(splits[cfg.split], columns, path)


def _check_split(cfg: DataConfig, section: str, source: str, splits: list[Any]) -> None:
    if cfg.split not in splits:
        raise InputError(
            f"{section}.split = {cfg.split!r} is not a split of {source}: choose one of {splits}"
        )


def _json_records(path: Path, columns: Columns) -> Iterator[Record]:
    """Read a list of objects, or one object per line. Decimals keep their digits."""
    with path.open(encoding="utf-8-sig") as file:
        first = next((line for line in file if line.strip()), "")
        file.seek(0)
        if first.lstrip().startswith("["):
            lines: Iterable[tuple[str, Any]] = (
                (f"element {i}", record) for i, record in enumerate(json.load(file, parse_float=Decimal))
            )
        else:
            lines = ((f"line {i}", line) for i, line in enumerate(file, 1) if line.strip())
        for where, line in lines:
            try:
                record = json.loads(line, parse_float=Decimal) if isinstance(line, str) else line
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: {error}") from None
            except ArithmeticError:
                raise ValueError(f"{where}: the exponent of a number is too large") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where} is no object with columns")
            yield record


def _csv_records(path: Path, columns: Columns) -> Iterator[Record]:
    """Read every value as text, because "052" and "NA" are answers too."""
    csv.field_size_limit(2**31 - 1)
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, strict=True)
        for record in reader:
            if None in record:
                raise ValueError(f"line {reader.line_num} has more values than the first line has columns")
            yield record


def _parquet_records(path: Path, columns: Columns) -> Iterator[Record]:
    if columns.images:  # a Parquet file cannot give a single row later: datasets maps a copy of it
        pattern = glob.escape(str(path.absolute()))
        yield from _dataset_records(datasets.Dataset.from_parquet(pattern), columns, path.parent)
        return
    # given a path, ParquetFile would read "file:x.parquet" as a URI
    with pa.OSFile(str(path)) as source, pyarrow.parquet.ParquetFile(source) as file:
        wanted = _outer_columns(columns, file.schema_arrow.names)
        for batch in file.iter_batches(_BATCH, columns=wanted):
            yield from _arrow_records(pa.Table.from_batches([batch]))


def _dataset_records(rows: datasets.Dataset, columns: Columns, folder: Path) -> Iterator[Record]:
    wanted = _outer_columns(columns, rows.column_names) or rows.column_names
    images = arrow_images(rows, columns.images, folder) if columns.images in wanted else None
    wanted = [name for name in wanted if name != columns.images]
    for table in rows.select_columns(wanted).with_format("arrow").iter(_BATCH):
        assert isinstance(table, pa.Table)
        for record in _arrow_records(table):
            yield record | {columns.images: next(images)} if images else record


def _outer_columns(columns: Columns, names: list[str]) -> list[str] | None:
    """Return the columns to read; None if one does not exist, so that the error line can list all of them."""
    outer = {column if column in names else column.partition(".")[0] for column in columns.required}
    outer |= {columns.images} - {""}
    return sorted(outer.union(columns.optional).intersection(names)) if outer <= set(names) else None


def _arrow_records(table: pa.Table) -> Iterator[Record]:
    """Yield the rows of a table; the fields of a struct become columns with dotted names."""
    while any(pa.types.is_struct(column.type) for column in table.columns):
        table = table.flatten()
    # numpy's scalars keep the width of a float, Python's have 64 bits
    values = [
        column.to_numpy() if pa.types.is_floating(column.type) else column.to_pylist()
        for column in table.columns
    ]
    for row in zip(*values, strict=True):
        yield dict(zip(table.column_names, row, strict=True))


_READERS = {
    ".jsonl": _json_records,
    ".json": _json_records,
    ".csv": _csv_records,
    ".parquet": _parquet_records,
}
