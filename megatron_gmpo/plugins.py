"""Resolve a name in the config: a built-in, or ``module:attribute`` on the Python path."""

from __future__ import annotations

import difflib
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import InputError, one_line


def resolve(field: str, name: str, builtin: Mapping[str, Any], form: str = "module:function") -> Any:
    """Return ``builtin[name]``, or import the attribute that ``module:attribute`` names.

    Args:
        field: the config field that holds the name, for the error line.
        form: what to give, for the error line.

    Raises:
        InputError: the name is unknown (the line names the nearest built-in name), or the module or the
            attribute cannot be imported. An InputError of the module passes.
    """
    if name in builtin:
        return builtin[name]
    if ":" not in name:
        known = (
            f"did you mean {nearest(name, builtin)!r}? Choose one of {sorted(builtin)} or " if builtin else ""
        )
        raise InputError(f"{field} = {name!r} is unknown: {known}give {form}")
    try:
        return pkgutil.resolve_name(name)
    except InputError:
        raise
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        reason = str(error)
    except (Exception, SystemExit) as error:  # whatever the module does when it is imported
        reason = f"{type(error).__name__}: {one_line(error)}"
    raise InputError(f"{field} = {name!r} cannot be imported ({reason}): give {form} on the Python path")


def check_callable(field: str, name: str, found: Any, remedy: str) -> None:
    """Check that ``found`` is callable.

    Raises:
        InputError: ``found`` is not callable; the line ends with ``remedy``.
    """
    if not callable(found):
        raise InputError(f"{field} = {name!r} is a {type(found).__name__}: {remedy}")


def check_installed(what: str, package: str, remedy: str) -> None:
    """Check that an optional package is installed.

    Raises:
        InputError: it is not; the line starts with ``what`` and ends with ``remedy``.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f"{what} needs the package {package}, which is not installed: {remedy}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return the entry of ``known`` that is most similar to ``word``."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]
