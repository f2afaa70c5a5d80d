"""Command lines: options and help from one schema, values as in TOML, one-line errors and exit codes.

A schema is a pydantic model. ``Config`` is the schema of a run: ``CONFIG.toml --train.num_steps 3``. A
command with its own options declares a subclass of ``Options``. An argparse parser, built from the fields of
the schema, prints the help and reads the options. pydantic checks the values.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import os
import re
import sys
import time
import tomllib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from .config import Config
from .config.section import expanded_path
from .config.values import as_argument, parse_words, unwrapped
from .errors import Exit, InputError, RunError, disk_full, printable

ALONE_S = 10.0
"""Seconds that another rank waits for rank 0 to report an error before it prints its own error."""

_MAX_TOML_BYTES = 10**6


class Positional:
    """Marker of a positional field of ``Options``: ``folder: Annotated[Path, Positional]``."""


class Options(BaseModel):
    """Base class of a command's options. ``--help`` shows the class docstring; a bool field is a flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _expand_paths(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if Path not in (kind, *get_args(kind)):
            return value
        if isinstance(value, list):
            return [expanded_path(path) if isinstance(path, str) else path for path in value]
        return expanded_path(value) if isinstance(value, str) else value


Schema = TypeVar("Schema", bound=BaseModel)
OptionsType = TypeVar("OptionsType", bound=Options)


def load_config(argv: Sequence[str], prog: str = "megatron-gmpo train") -> Config:
    """Read ``CONFIG.toml --section.key value ...``; ``--help`` prints every option and exits.

    Values are written as in TOML (``3``, ``0.5``, ``true``, ``["a", "b"]``); strings need no quotes, and a
    list may also be several values (``--eval.k 1 4``). Open tables, such as ``megatron``, also accept
    Python's values (``False``, ``.001``).

    Raises:
        InputError: the file is missing or is not TOML; a key is unknown (the message names the nearest key);
            a value has the wrong type or is out of range.
    """
    return _validated(Config, _parse(argv, prog, Config))


def parse_options(schema: type[OptionsType], argv: Sequence[str], prog: str) -> OptionsType:
    """Read the options of a command; ``--help`` prints them and exits.

    Raises:
        InputError: an option is unknown or missing; a value has the wrong type or is out of range.
    """
    return _validated(schema, _parse(argv, prog, schema))


def parse_options_and_config(
    schema: type[OptionsType], argv: Sequence[str], prog: str
) -> tuple[OptionsType, Config]:
    """Read the options of a command together with a run's config.

    Example: ``CONFIG.toml --option value --section.key value``.

    Raises:
        InputError: see ``parse_options`` and ``load_config``.
    """
    tree = _parse(argv, prog, schema, Config)
    names = [field.alias or name for name, field in schema.model_fields.items()]
    own = {name: tree.pop(name) for name in names if name in tree}
    return _validated(schema, own), _validated(Config, tree)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        InputError: the file does not exist, is not TOML or is larger than 1 MB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_TOML_BYTES + 1)
        if len(content) > _MAX_TOML_BYTES:
            raise ValueError(f"it has more than {_MAX_TOML_BYTES} bytes")
        return tomllib.loads(content.decode())
    except FileNotFoundError:
        raise InputError(
            f"config file {printable(path)} does not exist: give the path of a TOML file, e.g. "
            f"examples/moe/tiny_cpu.toml"
        ) from None
    except (ValueError, RecursionError, OSError) as error:  # tomllib: long integers, deep nesting
        raise InputError(f"config file {printable(path)} cannot be read as TOML: {error}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a ``RunError``, a full file system, or SIGINT into one line on stderr and an exit code."""
    try:
        yield
    except RunError as error:
        exit_with_one_line(error, error.exit)
    except OSError as error:
        if full := disk_full(error):
            exit_with_one_line(full, full.exit)
        raise
    except KeyboardInterrupt:
        print("error: interrupted by SIGINT", file=sys.stderr, flush=True)
        sys.exit(Exit.INTERRUPTED)


def exit_with_one_line(error: Exception, code: int = Exit.BAD_INPUT) -> NoReturn:
    """Print ``error`` in one line and exit with ``code``.

    When one rank exits, torchrun kills the other ranks. Usually all ranks find the same error, so the other
    ranks wait until rank 0 has printed it. A rank that is still alive after ``ALONE_S`` has an error that
    rank 0 does not have, such as a file missing on one node, and prints it.

    torchrun prints a report of many lines after this line. The report ends with the text in the error file.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(ALONE_S)
    line = f"error: {printable(error)}"
    with suppress(OSError):  # a full disk, also that of a job's log, must not change the exit code
        print(line, file=sys.stderr, flush=True)
    report_to_torchrun(line)
    sys.exit(code)


def report_to_torchrun(line: str) -> None:
    """Write the line with which this process ends to the file, if any, whose text torchrun's report shows."""
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": line, "extraInfo": {"timestamp": int(time.time())}}
        with suppress(OSError):
            Path(report).write_text(json.dumps({"message": message}))


def explain(error: ValidationError, *roots: type[BaseModel]) -> str:
    """Return one line about the first error. For an unknown key it names the nearest key of ``roots``."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")
    if first["type"] == "extra_forbidden":
        return _unknown(where, roots)
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} = {first['input']!r}: {message}"


def _validated(schema: type[Schema], tree: dict[str, Any]) -> Schema:
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise InputError(explain(error, schema)) from None


# --- the parser ---------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if missing := re.fullmatch(r"argument (\S+): expected .*", message):
            message = f"{missing[1]} has no value: write {missing[1]} VALUE"
        raise InputError(f"{message}; --help lists the options")


_CONFIG_DESCRIPTION = """A TOML file, if given, is read first; options override it. Values are written as in
TOML, strings need no quotes. A list is one TOML value or several values: --eval.k '[1, 4]' or --eval.k 1 4. A
whole section or table can be given as an inline table: --algorithm.options '{dual_clip = 3.0}'. NAME stands
for a name of your choice in a table."""


def _parse(argv: Sequence[str], prog: str, *schemas: type[BaseModel]) -> dict[str, Any]:
    """Return the values of the options as a tree of sections.

    If ``Config`` is among ``schemas``, the tree also has the values of the config file.
    """
    first, has_config = schemas[0], Config in schemas
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [CONFIG.toml] [--section.key VALUE ...]" if has_config else None,
        description=_text(_CONFIG_DESCRIPTION if first is Config else first.__doc__),
        epilog=_text(_CONFIG_DESCRIPTION) if has_config and first is not Config else None,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=6),
    )
    if has_config:
        parser.add_argument("config_file", nargs="?", metavar="CONFIG.toml", help="Config of the run.")
    kinds: dict[str, Any] = {}
    for schema in schemas:
        kinds |= _add_section(parser, parser.add_argument, schema, "", argv)
    found, rest = parser.parse_known_intermixed_args(list(_normalized(argv, kinds, schemas)))
    if rest:
        raise InputError(f"argument {rest[0]!r} is not an option: write --NAME VALUE, --help lists the names")
    given = vars(found)
    tree = read_toml(Path(os.path.expanduser(given.pop("config_file")))) if "config_file" in given else {}
    for key, words in given.items():
        _set(tree, key, parse_words(kinds[key], words))
    return tree


def _add_section(
    parser: argparse.ArgumentParser,
    add: Callable[..., object],
    section: type[BaseModel],
    prefix: str,
    argv: Sequence[str],
) -> dict[str, Any]:
    """Add an option for every field of ``section`` with ``add``, and a group for every section in it.

    Returns:
        Key -> type of its value.
    """
    kinds: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        key, kind = prefix + (field.alias or name), field.annotation
        is_table = get_origin(kind) is dict
        if is_table or _is_section(kind):  # an option for the whole section, as an inline table
            kinds[key] = dict
            add(f"--{key}", dest=key, help=argparse.SUPPRESS)
        if _is_section(kind):
            group = parser.add_argument_group(key, _text(kind.__doc__) or None)
            kinds |= _add_section(parser, group.add_argument, kind, f"{key}.", argv)
        elif is_table:
            element = get_args(kind)[1]
            for entry in dict.fromkeys(["NAME", *_names_in(argv, key)]):
                if _is_section(element):
                    kinds[f"{key}.{entry}"] = dict
                    add(f"--{key}.{entry}", dest=f"{key}.{entry}", help=argparse.SUPPRESS)
                    kinds |= _add_section(parser, add, element, f"{key}.{entry}.", argv)
                else:
                    entry = f"{key}.{entry}"
                    kinds[entry] = element
                    add(f"--{entry}", dest=entry, metavar=_form(element), help=_text(field.description))
        else:
            kinds[key] = kind
            _add_option(add, key, field, is_flag=kind is bool and issubclass(section, Options))
    return kinds


def _add_option(add: Callable[..., object], key: str, field: FieldInfo, *, is_flag: bool) -> None:
    kind, about = field.annotation, _text(field.description)
    if not field.is_required():
        about = f"{about} (default: {_text(as_argument(field.default))})".lstrip()
    several = {"nargs": "+"} if get_origin(unwrapped(kind)[0]) is tuple else {}
    if Positional in field.metadata:
        optional = {} if field.is_required() else {"nargs": "?"}
        add(key, metavar=key.upper(), help=about, **optional, **several)
    elif is_flag:
        add(f"--{key}", dest=key, action="store_true", help=_text(field.description))
    else:
        add(f"--{key}", dest=key, metavar=_form(kind), required=field.is_required(), help=about, **several)


def _normalized(
    argv: Sequence[str], kinds: Mapping[str, Any], schemas: Sequence[type[BaseModel]]
) -> Iterator[str]:
    """Yield ``argv`` with dashes in option names as underscores, and ``--key -x`` as ``--key=-x``.

    argparse would parse a value that begins with a dash as an option.

    Raises:
        InputError: an option is not in ``kinds``.
    """
    words = deque(argv)
    while words:
        word = words.popleft()
        if option := re.fullmatch(r"--(\w[\w.-]*)(=.*)?", word, re.DOTALL):
            name, value = option[1], option[2] or ""
            if name not in kinds and name != "help":
                if (name := name.replace("-", "_")) not in kinds:
                    raise InputError(_unknown(option[1], schemas))
                word = f"--{name}{value}"
            if not value and words and re.match(r"-[^-]", words[0]) and words[0] != "-h":
                word += f"={words.popleft()}"
        yield word


def _names_in(argv: Sequence[str], table: str) -> Iterator[str]:
    """Yield the names that ``--table.NAME`` and ``--table.NAME.key`` options in ``argv`` use."""
    for word in argv:
        if word.startswith(f"--{table}."):
            yield word.removeprefix(f"--{table}.").partition("=")[0].partition(".")[0]


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, name = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"--{key}: {section} is a value, not a section")
    tree[name] = value


# --- help -------------------------------------------------------------------------------------------------


_FORMS = {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


def _form(kind: Any) -> str:
    """Return the placeholder of type ``kind`` in ``--help``, e.g. ``INT`` or ``{None,hybrid,e4m3}``."""
    inner, optional = unwrapped(kind)
    if get_origin(inner) is tuple:
        return _form(get_args(inner)[0])
    form = (
        "{" + ",".join(get_args(inner)) + "}" if get_origin(inner) is Literal else _FORMS.get(inner, "VALUE")
    )
    if not optional or inner is Any:
        return form
    return form.replace("{", "{None,") if form.startswith("{") else f"{form}|None"


def _text(docstring: str | None) -> str:
    """Return a docstring for argparse, with ``%`` escaped and single backticks."""
    return inspect.cleandoc(docstring or "").replace("%", "%%").replace("``", "`")


def _unknown(where: str, roots: Sequence[type[BaseModel]]) -> str:
    section = where.rpartition(".")[0]
    nearest = max(
        (key for root in roots for key in _all_keys(root)),
        key=lambda key: (
            _likeness(key, where)
            + _likeness(_leaf(key), _leaf(where))
            + 0.3 * (key.rpartition(".")[0] == section)
        ),
    )
    if all(issubclass(root, Options) for root in roots):
        return f"unknown option '--{where}': did you mean '--{nearest}'?"
    return f"unknown config key {where!r}: did you mean {nearest!r}?"


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _leaf(key: str) -> str:
    return key.rpartition(".")[2]


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = [prefix[:-1]] if prefix else []
    for name, field in section.model_fields.items():
        kind = field.annotation
        element = get_args(kind)[-1] if get_origin(kind) is dict else None
        if _is_section(kind):
            keys += _all_keys(kind, f"{prefix}{name}.")
        elif _is_section(element):
            keys += _all_keys(element, f"{prefix}{name}.*.")
        else:
            keys.append(prefix + (field.alias or name))
    return keys


def _is_section(kind: Any) -> TypeGuard[type[BaseModel]]:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)
