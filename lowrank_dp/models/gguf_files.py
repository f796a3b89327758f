"""GGUF files: their headers, and assembly of a file that a package holds in parts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
# type code in the header -> format of the number, as in the module struct
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FILE_TYPE = "general.file_type"
# architectures whose files hold frequencies that transformers' configuration has of its own
_FIXED_ROPE = ("gemma4",)
_READING = threading.RLock()  # a context inside another one is allowed


class _Header(NamedTuple):
    """Header of a GGUF file.

    Attributes:
        fields: the fields that hold one number or one text, by name.
        tensors: names of all tensors.
    """

    fields: dict[str, Any]
    tensors: tuple[str, ...]


def require_gguf(what: str) -> None:
    """Raise ValueError if the package that reads GGUF files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{what} needs a package: pip install gguf")


def gguf_files(folder: Path) -> list[Path]:
    """List the GGUF files of a folder, by name."""
    return sorted(path for path in folder.iterdir() if is_gguf(path))


def is_gguf(path: Path) -> bool:
    """Return whether a path is an existing file with the suffix of GGUF files, in any case."""
    return path.suffix.lower() == SUFFIX and path.is_file()


def weights_in_words(path: Path) -> str:
    """Describe the weights of a GGUF file, such as "Q4_K_M quantised weights, dequantised".

    Raises ValueError if the file is no GGUF file, or damaged.
    """
    import gguf

    number = _header(path).fields.get(_FILE_TYPE)
    if number is None or number == gguf.LlamaFileType.GUESSED:
        return "weights of unnamed type"
    try:
        name = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:  # of a later version than the installed package
        return f"weights of type {number!r:.20}, which the installed gguf does not name"
    return (
        f"{name} weights"
        if name in ("F32", "F16", "BF16")
        else (f"{name} quantised weights, dequantised")
    )


def require_plain_rope(path: Path) -> None:
    """Raise ValueError if the file's rotary position embeddings (RoPE) are scaled.

    transformers 5.23 skips the fields ``rope.scaling`` and the tensors of frequencies, and so reads
    another model. Of gpt-oss it reads the fields, but it takes the length of a field's name for the
    field's value. Also raises ValueError if the file is no GGUF file, or damaged.
    """
    header = _header(path)
    rope = {
        key.partition(".rope.")[2]: value for key, value in header.fields.items() if ".rope." in key
    }
    # the defaults are llama.cpp's; scale_linear is an older name of the factor
    kind = rope.get("scaling.type", "linear")
    factor = rope.get("scaling.factor", rope.get("scale_linear", 0))
    scaled = kind not in ("none", "linear") or (kind == "linear" and factor not in (0, 1))
    tensors = [name for name in header.tensors if re.search(r"(^|\.)rope_(freqs|factors_)", name)]
    if header.fields.get("general.architecture") in _FIXED_ROPE:
        tensors = []
    if scaled or rope.get("scaling.attn_factor", 1) != 1 or tensors:
        raise ValueError(
            f"model file {path} uses RoPE scaling ({tensors[0] if tensors else kind}) that "
            "transformers does not read from GGUF: give the Hugging Face folder of the model"
        )


def _header(path: Path) -> _Header:
    """Read the header of a GGUF file; raise ValueError if there is none, or it is damaged."""
    stat = path.stat()
    return _kept_header(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=32)
def _kept_header(path: Path, size: int, changed: int) -> _Header:
    """Read a header once per version of the file, which its size and time of change identify."""
    try:
        with path.open("rb") as file:
            return _read_header(file, size)
    except (struct.error, ValueError, KeyError, OverflowError, RecursionError):
        _refuse(path)


def _refuse(path: Path) -> NoReturn:
    raise ValueError(f"model file {path} must be a GGUF file, got no valid header") from None


def _read_header(file: BinaryIO, size: int) -> _Header:
    """Return the fields without the arrays, and the names of the tensors.

    ``gguf.GGUFReader`` decodes every word of the vocabulary, which takes many times as long.
    """

    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def length() -> int:
        found = number("Q")
        if found > size:
            raise ValueError("a string in the header is longer than the file")
        return found

    def text() -> str:
        return file.read(length()).decode()

    def skip_array() -> None:
        inner, count = number("I"), number("Q")
        if inner in _NUMBERS:
            file.seek(count * struct.calcsize(_NUMBERS[inner]), os.SEEK_CUR)
        elif inner == _ARRAY:
            for _ in range(count):
                skip_array()
        elif inner == _STRING:
            for _ in range(count):
                file.seek(length(), os.SEEK_CUR)
        else:
            raise ValueError("an array in the header has an unknown type")

    if file.read(4) != _MAGIC:
        raise ValueError("the file does not begin with GGUF's magic number")
    _version, num_tensors, num_fields = number("I"), number("Q"), number("Q")
    fields, tensors = {}, []
    for _ in range(num_fields):
        name, kind = text(), number("I")
        if kind == _ARRAY:
            skip_array()
        else:
            fields[name] = text() if kind == _STRING else number(_NUMBERS[kind])
    for _ in range(num_tensors):
        tensors.append(text())
        file.seek(8 * number("I") + 12, os.SEEK_CUR)  # the sizes; type and place of the values
    return _Header(fields, tuple(tensors))


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
