"""Helpers of the command lines: options made from a dataclass, one-line errors, exit codes."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_dp import _terminal, _validate
from lowrank_dp.artifacts import locks

STOPPED = 130  # exit code after SIGINT


def new_app(help: str) -> typer.Typer:
    """Make a typer application without boxes, tracebacks of its own, or completion options."""
    return typer.Typer(
        help=help, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def run(app: typer.Typer, arguments: list[str] | None = None) -> None:
    """Run ``app`` and exit with 0, or with 2 after one line on stderr that says what to change.

    The exit code is 130 after SIGINT and 143 after SIGTERM; if the work so far is saved, one line
    on stderr says how to continue. Raises KeyboardInterrupt if nothing is saved.
    """
    warnings.showwarning = _terminal.warn_in_one_line
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that it cannot encode are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, standalone_mode=False)
        if code == STOPPED:  # typer returns this code after a KeyboardInterrupt
            raise KeyboardInterrupt
    except (ValueError, OSError) as error:
        code = _terminal.report(str(error))
    except _terminal.Interrupted as stopped:
        print(stopped, file=sys.stderr)
        code = stopped.code
    except Exception as error:
        if _terminal.is_lack_of_memory(error):
            code = _terminal.report(
                "there is too little memory: lower --micro-batch-size, --batch-size or "
                "--max-length, whichever the command has, or choose a smaller --model"
            )
        # typer holds a copy of click: usage errors are recognised by the method that they offer
        elif hasattr(error, "format_message"):
            code = _terminal.report(error.format_message())
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def check_output(folder: Path | None, option_name: str = "--output") -> None:
    """Raise ValueError if the folder of a command's files can't be created or written to.

    Missing folders are created and removed again: permissions alone do not tell whether the file
    system takes them.
    """
    if folder is None:
        return
    missing = []
    try:
        if folder.exists() and not folder.is_dir():
            _validate.fail(option_name, "a folder", str(folder))
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option_name} {folder} can't be written to ({error.strerror}): choose another folder"
        ) from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it was not created, or another process uses it
                path.rmdir()


@contextlib.contextmanager
def hold_output(
    folder: Path | None, option_name: str = "--output", name: str = ""
) -> Iterator[None]:
    """Hold the folder of a command's files, or its file ``name``, during the block.

    A command that checks what the folder holds, and writes later, does both in one block, so that
    no other command writes in between. The folder is created if it is missing, so that a bad path
    fails at once, and removed again if the command leaves it empty. Does nothing for None.

    Raises ValueError as :func:`check_output` does, and if another command holds the folder or file.
    """
    if folder is None:
        yield
        return
    check_output(folder, option_name)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / (f".{name}.lock" if name else ".lock")
        with locks.held(file, f"{option_name} {folder / name}"):
            yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it holds the command's files
                path.rmdir()


def holding_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a command to run in a block of :func:`hold_output` with its option ``output``."""

    @wraps(function)
    def command(*given: Any, **arguments: Any) -> Any:
        with hold_output(arguments["output"]):
            return function(*given, **arguments)

    return command


def check_new(folder: Path | None, name: str, option_name: str = "--output") -> None:
    """Raise ValueError if the folder of a command's files holds an earlier result ``name``."""
    if folder is not None and (folder / name).exists():
        raise ValueError(
            f"{option_name} {folder} holds {name} of an earlier command: choose another folder, or "
            "delete the file"
        )


def options_of(
    kind: type, *, without: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a command with one option per field of the dataclass ``kind``.

    The first argument of the decorated function becomes a dict, by field name, of the options that
    were given; the dataclass supplies the defaults of the others. The function's other parameters
    are options too. The fields of a nested dataclass become options as well.

    Args:
        kind: a dataclass whose fields are declared by ``_options.option``.
        without: names of options that the command does not offer.
    """
    declared = [(field, hint) for field, hint in _declared(kind) if _name(field) not in without]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def command(**arguments: Any) -> Any:
            values = {
                _name(field): _parsed(field, arguments.pop(_name(field))) for field, _ in declared
            }
            return function(_given(kind, values), **arguments)

        hints = typing.get_type_hints(function, include_extras=True)
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])
            for name, parameter in inspect.signature(function).parameters.items()
        ][1:] + [_parameter(field, hint) for field, hint in declared]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _declared(kind: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Yield the fields that become options, with their types; flatten nested dataclasses."""
    hints = typing.get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            yield from _declared(hints[field.name])
        else:
            yield field, hints[field.name]


def _given(kind: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of ``kind`` whose options were given, with nested dataclasses built."""
    hints: dict[str, Any] = typing.get_type_hints(kind)
    given: dict[str, Any] = {}
    for field in fields(kind):
        inner = hints[field.name]
        if isinstance(inner, type) and is_dataclass(inner):
            found = _given(inner, values)
            value = typing.cast(Any, inner)(**found) if found else None
        else:
            value = values.get(_name(field))
        if value is not None:
            given[field.name] = value
    return given


def _name(field: Field[Any]) -> str:
    return field.metadata.get("name") or field.name


def _parsed(field: Field[Any], value: Any) -> Any:
    parse = field.metadata.get("parse")
    if value is None or value == []:
        return None
    if value == "":  # for instance an unset variable of a shell script
        _validate.fail(f"--{_name(field).replace('_', '-')}", "a text that is not empty", value)
    if parse is not None:
        return parse(value)
    return tuple(value) if isinstance(value, list) else value


def _parameter(field: Field[Any], hint: Any) -> inspect.Parameter:
    """Make the keyword parameter that typer turns into an option; the default is None."""
    name, default = _name(field), field.default
    flags = [f"--{name.replace('_', '-')}"]
    if default is True:
        flags = [f"{flags[0]}/--no-{flags[0][2:]}"]
    silent = default is MISSING or isinstance(default, bool) or default in (None, "", ())
    shown = "" if silent or field.metadata.get("parse") else f" [default: {default}]"
    option = typer.Option(*flags, help=field.metadata["help"] + shown, show_default=False)
    typed = Annotated[_typed(field, hint) | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=typed)


def _typed(field: Field[Any], hint: Any) -> Any:
    """Return the type of an option for typer: a list for a tuple, a union's type without None."""
    parse = field.metadata.get("parse")
    if parse is not None:
        return list[str] if typing.get_origin(hint) is Mapping else str
    if isinstance(hint, types.UnionType):
        (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
    return list[typing.get_args(hint)[0]] if typing.get_origin(hint) is tuple else hint  # type: ignore[misc]
