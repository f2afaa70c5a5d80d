"""Rows are read from exactly the named files, and no value changes on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gmpo.config import DataConfig, EvalSetConfig
from megatron_gmpo.data.rows import Row, read_rows
from megatron_gmpo.errors import InputError


def rows_of(path: Path | str, **options: Any) -> list[Row]:
    return list(read_rows(DataConfig(path=str(path), **options), "data"))


def answers_of(path: Path | str, **options: Any) -> list[str]:
    return [row.answer for row in rows_of(path, **options)]


def jsonl(folder: Path, *answers: str) -> Path:
    """Write a file whose answers have exactly these JSON texts."""
    path = folder / "numbers.jsonl"
    path.write_text("".join(f'{{"problem": "p", "answer": {answer}}}\n' for answer in answers))
    return path


def parquet(folder: Path, answers: pa.Array) -> Path:
    path = folder / "numbers.parquet"
    pyarrow.parquet.write_table(pa.table({"problem": ["p"] * len(answers), "answer": answers}), path)
    return path


# JSON text -> the same number in decimal digits, by hand
JSON_NUMBERS = {
    "0.00001": "0.00001",
    "1e-05": "0.00001",
    "1e22": "1" + "0" * 22,
    "1.5E3": "1500",
    "33.3": "33.3",
    "1.50": "1.50",
    "-0.1": "-0.1",
    "72.0": "72.0",
    "0.1000000000000000055511151231257827": "0.1000000000000000055511151231257827",
    "9007199254740993": "9007199254740993",
    "9223372036854775808": "9223372036854775808",
    "18446744073709551617": "18446744073709551617",
    "-3": "-3",
    "true": "True",
    '"052"': "052",
    '"1e-05"': "1e-05",
    '"NaN"': "NaN",
    '"2024-05-01"': "2024-05-01",
    '"2024-05-01T12:00:00Z"': "2024-05-01T12:00:00Z",
}


def test_json_numbers_keep_every_digit_beside_other_types(tmp_path: Path) -> None:
    assert answers_of(jsonl(tmp_path, *JSON_NUMBERS)) == list(JSON_NUMBERS.values())
    path = tmp_path / "numbers.json"
    path.write_text("[" + ", ".join(f'{{"problem": "p", "answer": {text}}}' for text in JSON_NUMBERS) + "]")
    assert answers_of(path) == list(JSON_NUMBERS.values())


@given(
    st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.decimals(-(10**30), 10**30))
)
def test_any_json_number_keeps_its_value(
    tmp_path_factory: pytest.TempPathFactory, number: float | int | Decimal
) -> None:
    # Fraction reads a decimal text with or without an exponent exactly
    (answer,) = answers_of(jsonl(tmp_path_factory.getbasetemp(), str(number)))
    assert Fraction(answer) == Fraction(str(number))
    assert "e" not in answer.lower()


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        (pa.array([33.3, 0.00001, 1e10, 0.1], pa.float32()), ["33.3", "0.00001", "10000000000", "0.1"]),
        (pa.array([33.3, 0.00001, 1e22, 72.0]), ["33.3", "0.00001", "1" + "0" * 22, "72.0"]),
        (pa.array(np.array([33.3, 0.1], np.float16)), ["33.3", "0.1"]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([-(2**63)], pa.int64()), [str(-(2**63))]),
        (
            pa.array([Decimal("0.10"), Decimal("12345678901234567890.12")]),
            ["0.10", "12345678901234567890.12"],
        ),
        (pa.array(["052", "x"]).dictionary_encode(), ["052", "x"]),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_parquet_and_arrow_numbers_are_the_shortest_of_their_width(
    tmp_path: Path, answers: pa.Array, texts: list[str], kind: str
) -> None:
    path = parquet(tmp_path, answers)
    if kind == "folder":
        rows = datasets.Dataset(pyarrow.parquet.read_table(path))
        path = tmp_path / "saved"
        rows.save_to_disk(path)
    assert answers_of(path) == texts


@given(number=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_any_float32_comes_back(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    (text,) = answers_of(parquet(tmp_path_factory.getbasetemp(), pa.array([number], pa.float32())))
    assert np.float32(text) == np.float32(number)
    assert len(Decimal(text).normalize().as_tuple().digits) <= 9  # 9 digits tell all float32 apart (IEEE 754)


@pytest.mark.parametrize(
    "text", ["NaN", "Infinity", "-Infinity", "null", '""', '" "', "1e401", "1e-999999999", "{}"]
)
def test_what_is_no_answer_in_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        InputError, match=r"row 1: column 'answer' is .*a finite number of at most 400 digits"
    ):
        rows_of(jsonl(tmp_path, "1", text))


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [pa.float16(), pa.float32(), pa.float64()])
def test_what_is_no_answer_in_parquet_is_refused(
    tmp_path: Path, value: float | None, dtype: pa.DataType
) -> None:
    with pytest.raises(
        InputError, match=r"row 1: column 'answer' is (nan|inf): give every problem an answer"
    ):
        rows_of(parquet(tmp_path, pa.array([1.0, value], dtype)))


def test_csv_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        '\ufeffproblem,answer\np,052\np,NA\np,nan\np,1e-05\n"p\nq, r",007\n' + f'"{"p" * 200_000}",8\n'
    )
    rows = rows_of(path)
    assert [row.answer for row in rows] == ["052", "NA", "nan", "1e-05", "007", "8"]
    assert rows[4].problem == "p\nq, r"


VERL = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"{n} + {n}?"}],
        "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
        "extra_info": {"index": str(n)},
    }
    for n in range(3)
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "flat", "folder"])
def test_dotted_columns_read_fields_of_objects(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.jsonl" if kind == "jsonl" else "a.parquet")
    table = pa.Table.from_pylist(VERL)
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, VERL)))
    elif kind == "folder":
        path = tmp_path / "saved"
        datasets.Dataset(table).save_to_disk(path)
    else:  # flat: pandas' json_normalize writes columns that have the dot in their names
        pyarrow.parquet.write_table(table if kind == "parquet" else table.flatten(), path)
    rows = rows_of(path, prompt_column="prompt", answer_column="reward_model.ground_truth")
    assert [(row.problem, row.answer) for row in rows] == [
        (row["prompt"], row["reward_model"]["ground_truth"]) for row in VERL
    ]
    names = r"'prompt'.*'reward_model\.ground_truth', 'reward_model\.style'"
    for column in ("ground_truth", "reward_model.truth", "reward_model.ground_truth.x", "."):
        with pytest.raises(InputError, match=rf"data\.answer_column = .* is not a column of .*{names}"):
            rows_of(path, prompt_column="prompt", answer_column=column)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_benchmarks_have_labels(tmp_path: Path, kind: str) -> None:
    records = [
        {"problem": "p", "answer": "1", "level": 5, "subject": "Algebra", "source": "x"},
        {"problem": "q", "answer": "2", "level": 3, "subject": "Geometry", "source": "y"},
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, records)))
    elif kind == "csv":
        path.write_text("problem,answer,level,subject,source\np,1,5,Algebra,x\nq,2,3,Geometry,y\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)

    def labels(**options: Any) -> list[dict[str, str]]:
        return [row.labels for row in read_rows(EvalSetConfig(path=str(path), **options), "eval.sets.a")]

    assert labels() == [{"level": "5", "subject": "Algebra"}, {"level": "3", "subject": "Geometry"}]
    assert labels(report_by=["source"]) == [{"source": "x"}, {"source": "y"}]
    assert labels(report_by=[]) == [{}, {}]
    assert [row.labels for row in rows_of(path)] == [{}, {}]
    with pytest.raises(InputError, match=r"eval\.sets\.a\.report_by = 'topic' is not a column .*'source'"):
        labels(report_by=["topic"])


def test_an_answer_may_be_a_list_of_texts(tmp_path: Path) -> None:
    """OlympiadBench's final_answer is one."""
    assert answers_of(jsonl(tmp_path, '["2"]', '["x=1", "x=2"]')) == ["2", "x=1, x=2"]
    path = parquet(tmp_path, pa.array([["2"], ["x=1", "x=2"]]))
    assert answers_of(path) == ["2", "x=1, x=2"]
    for wrong in ("[]", "[1]", '["1", null]'):
        with pytest.raises(InputError, match="give every problem an answer"):
            answers_of(jsonl(tmp_path, wrong))


def test_a_missing_object_is_a_missing_answer(tmp_path: Path) -> None:
    records = [{"problem": "p", "a": {"b": "1"}}, {"problem": "p", "a": None}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    pyarrow.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(InputError, match=r"row 1: column 'a.b' is None"):
            rows_of(tmp_path / name, answer_column="a.b")


WRITERS: dict[str, Callable[[Path, str], Any]] = {
    ".jsonl": lambda path, answer: path.write_text(json.dumps({"problem": "p", "answer": answer})),
    ".csv": lambda path, answer: path.write_text(f"problem,answer\np,{answer}\n"),
    ".parquet": lambda path, answer: pyarrow.parquet.write_table(
        pa.table({"problem": ["p"], "answer": [answer]}), path
    ),
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize(
    "name", ["n[0-9]", "*", "n?", "{n5,n6}", "$HOME", "~", "**", "a::b", "file:n5", "%6e5"]
)
def test_a_name_is_exactly_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "n5"))
    WRITERS[suffix](tmp_path / f"n5{suffix}", "neighbour")
    for path in (f"{name}{suffix}", f"{tmp_path}/{name}{suffix}"):
        with pytest.raises(InputError, match="does not exist"):
            rows_of(path)
    WRITERS[suffix](tmp_path / f"{name}{suffix}", "itself")
    assert answers_of(f"{name}{suffix}") == answers_of(tmp_path / f"{name}{suffix}") == ["itself"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["*", ".", "json", "parquet", "text", "~", "$HOME", "hf://datasets/a/b", "s3://a/b"]
)
def test_what_names_no_data_set_reads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # datasets reads all files of the working directory for the name of a format
    monkeypatch.chdir(tmp_path)
    for suffix, write in WRITERS.items():
        write(tmp_path / f"train{suffix}", "neighbour")
    with pytest.raises(InputError, match=r"does not exist|is a folder that save_to_disk did not write"):
        rows_of(name)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(InputError, match="unknown format"):
        rows_of(tmp_path / "pipe.jsonl")


def test_several_files_are_read_in_the_order_of_the_list(tmp_path: Path) -> None:
    names = ["b/train.jsonl", "a/train.csv", "c.parquet"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        WRITERS[Path(name).suffix](tmp_path / name, name)
    files = tuple(str(tmp_path / name) for name in names)
    rows = list(read_rows(DataConfig(files=files), "data"))
    assert [row.answer for row in rows] == names
    assert [row.id for row in rows] == [f"{file.rpartition('.')[0]}/0" for file in files]
    (tmp_path / "c.parquet").unlink()
    with pytest.raises(InputError, match=r"data\.files: '.*/c\.parquet' does not exist"):
        list(read_rows(DataConfig(files=files), "data"))
    with pytest.raises(ValueError, match="leave one out"):
        DataConfig(path="a.jsonl", files=files)
    with pytest.raises(ValueError, match="names a file twice"):
        DataConfig(files=files[:1] * 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"problem": "p", "answer": 1}\n\n[1]\n', "line 3 is no object"),
        ("a.jsonl", '{"problem": "p", "answer": 1}\n{"problem": "p", "ans', "line 2: Unterminated string"),
        ("a.jsonl", '{"problem": ' + "[" * 200_000, "line 1: maximum recursion depth"),
        ("a.jsonl", '{"problem": "p", "answer": 1e99999999999999999999}', "line 1: the exponent"),
        ("a.jsonl", '{"problem": "p", "answer": ' + "1" * 5000 + "}", "line 1: .*4300 digits"),
        ("a.jsonl", b'{"problem": "\xff", "answer": 1}', "can't decode byte 0xff"),
        ("a.json", "[1, 2]", "element 0 is no object"),
        ("a.json", "[" * 200_000, "maximum recursion depth"),
        ("a.csv", "problem,answer\np,1,2\n", "line 2 has more values than the first line has columns"),
        ("a.csv", 'problem,answer\n"p,1\n', "unexpected end of data"),
        ("a.parquet", b"PAR1" + bytes(100), "not a parquet file"),
        ("a.parquet", b"", "not a parquet file|size is 0"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(
        InputError, match=rf"data\.path = '.*{name}' cannot be loaded \(.*({message}).*\): correct it$"
    ):
        rows_of(tmp_path / name)


def test_a_half_character_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 0: column 'answer' is '\\ud800'"):
        rows_of(jsonl(tmp_path, '"\\ud800"'))


@pytest.mark.parametrize(("suffix", "damage"), [(".jsonl", "\n{"), (".csv", "p,2,3\n")])
def test_rows_are_read_while_they_are_taken(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    WRITERS[suffix](path, "1")
    with path.open("a") as file:
        file.write(damage)
    rows = read_rows(DataConfig(path=str(path)), "data")
    assert next(rows).answer == "1"
    with pytest.raises(InputError, match="cannot be loaded"):
        next(rows)
