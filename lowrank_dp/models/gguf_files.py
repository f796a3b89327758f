"""GGUF files: quantisation of the weights, and assembly of a file that a package holds in parts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
# type code in the header -> format of the number, as in the module struct
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FILE_TYPE = "general.file_type"
_READING = threading.RLock()  # a context inside another one is allowed


def require_gguf(what: str) -> None:
    """Raise ValueError if the package that reads GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{what} needs a package: pip install gguf")


def gguf_files(folder: Path) -> list[Path]:
    """List the GGUF files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix == SUFFIX and path.is_file())


@lru_cache(maxsize=32)
def weights_in_words(path: Path) -> str:
    """Describe the weights of a GGUF file, such as "Q4_K_M quantised weights, dequantised".

    The function reads the file up to the type of the weights, which precedes the vocabulary.
    ``gguf.GGUFReader`` parses the whole file, which takes seconds for a large vocabulary.

    Raises ValueError if the file is no GGUF file, or damaged.
    """
    import gguf

    try:
        with path.open("rb") as file:
            number = _file_type(file, path.stat().st_size)
        if number is None:
            return "weights of unnamed type"
        name = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (struct.error, ValueError, KeyError, OverflowError):
        raise ValueError(f"model file {path} must be a GGUF file, got no valid header") from None
    return (
        f"{name} weights"
        if name in ("F32", "F16", "BF16")
        else (f"{name} quantised weights, dequantised")
    )


def _file_type(file: BinaryIO, size: int) -> int | None:
    """Return the value of the header field ``general.file_type``, or None without this field."""

    def number(code: str) -> int:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def take() -> bytes:
        length = number("Q")
        if length > size:
            raise ValueError("a string in the header is longer than the file")
        return file.read(length)

    def skip(kind: int) -> None:
        if kind == _STRING:
            take()
        elif kind == _ARRAY:
            inner, count = number("I"), number("Q")
            if inner in _NUMBERS:
                file.seek(count * struct.calcsize(_NUMBERS[inner]), os.SEEK_CUR)
            else:
                for _ in range(count):
                    skip(inner)
        else:
            number(_NUMBERS[kind])

    if file.read(4) != _MAGIC:
        raise ValueError("the file does not begin with GGUF's magic number")
    _version, _tensors, fields = number("I"), number("Q"), number("Q")
    for _ in range(fields):
        name, kind = take().decode(), number("I")
        if name == _FILE_TYPE:
            return number(_NUMBERS[kind])
        skip(kind)
    return None


@contextmanager
def read_once(load: Mapping[str, Any]) -> Iterator[None]:
    """Let transformers read the header of each GGUF file once within the context.

    ``load`` holds the options of ``from_pretrained``. Without a GGUF file among them, the context
    does nothing.

    transformers parses the header, with the vocabulary, for the configuration, for the tokenizer
    and for the weights, and builds the table of tensor names once per tensor. The context keeps the
    first result of both, which saves more than half of the time that SmolLM2 takes to load.
    Contexts of several threads run one after the other.
    """
    if "gguf_file" not in load:
        yield
        return
    gguf: Any = importlib.import_module("gguf")  # Any: its names are replaced
    with _READING:
        reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
        gguf.GGUFReader, gguf.get_tensor_name_map = lru_cache(reader), lru_cache(names)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = reader, names


@lru_cache(maxsize=8)
def assembled(package: str) -> Path:
    """Return the GGUF file that is joined from the parts in a package; join the parts once.

    The package's own ``assemble`` joins the parts in the user's cache folder and checks their
    SHA-256. The joined file gets its name when it is complete, so that several processes can
    request the file at once.

    Raises ValueError if the parts are damaged, or the file cannot be written.
    """
    module = importlib.import_module(package)
    try:
        target = Path(module.default_output_path())
        if not target.is_file():
            part = target.with_name(f".{target.name}.{os.getpid()}")
            try:
                os.replace(module.assemble(part), target)
            finally:
                part.unlink(missing_ok=True)
        return Path(module.assemble(target))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"package {package} could not be joined to a GGUF file ({error}): install the package "
            "again, or free disk space"
        ) from None
