"""``python -m lowrank_dp.restore``: restore the noisy gradients in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowrank_dp import _validate
from lowrank_dp._options import name_value_pairs
from lowrank_dp.commands import _console
from lowrank_dp.commands._tables import in_sections, print_table, say, without_common_parts
from lowrank_dp.restore.names import NON_PRIVATE_SCHEMES, SCHEME_NAMES

# arguments of `restore_gradients` that are no options of a scheme
OWN = ("noisy", "noise_std", "scheme", "clean", "method", "below")
# a file of noisy gradients has no clean gradients for the other schemes
SCHEMES = tuple(name for name in SCHEME_NAMES if name not in NON_PRIVATE_SCHEMES)

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_dp.restore import Report

app = _console.new_app("Restore the singular values of noisy gradients: post-processing.")


@app.command()
def main(
    input: Annotated[Path, typer.Option(help="safetensors file with noisy gradients by name.")],
    noise_std: Annotated[
        float,
        typer.Option(
            help="Standard deviation of the noise on each entry, absolute, in the gradients' units."
        ),
    ],
    output: Annotated[Path, typer.Option(help="safetensors file for the restored gradients.")],
    scheme: Annotated[
        str, typer.Option(help=f"Restoration scheme. One of {', '.join(SCHEMES)}.")
    ] = "optimal",
    method: Annotated[
        str,
        typer.Option(
            help="Algorithm of the restoration: fast (leading singular triplets) or exact (full "
            "SVD)."
        ),
    ] = "fast",
    below: Annotated[
        str,
        typer.Option(
            help="Treatment of a matrix without a singular value above the bulk of the noise: keep "
            "(leave the matrix unchanged) or zero (set the matrix to 0)."
        ),
    ] = "keep",
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Option of the scheme as NAME=VALUE, such as kappa=1.2; may be repeated."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file --output if the file exists.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Restore the matrices in a file of noisy gradients.

    Vectors, matrices with a side of 1 and tensors of other axes are written unchanged.
    """
    from lowrank_dp import artifacts
    from lowrank_dp.restore import restore_gradients

    _validate.choice("--scheme", scheme, SCHEMES)
    options = name_value_pairs(option or [])
    for name in OWN:
        if name in options:
            raise ValueError(
                f"--option must name an option of the scheme, got {name!r}, which is an input or "
                "an option of the command"
            )
    _check_input(input, output)
    with _console.hold_output(output.parent, "the folder of --output", output.name):
        _check_replaceable(input, output, force)
        restored, reports = restore_gradients(
            _read(input, noise_std), noise_std, scheme, method=method, below=below, **options
        )
        _write(restored, output)
    if as_json:
        document = {name: artifacts.to_jsonable(report) for name, report in reports.items()}
        print(json.dumps(document, indent=1))
    else:
        _print(reports)


def _check_input(input: Path, output: Path) -> None:
    """Raise ValueError if ``input`` is no file, or if ``output`` is a folder."""
    if not input.is_file():
        _validate.fail("--input", "an existing safetensors file", str(input))
    if output.is_dir():
        _validate.fail("--output", "a file, and not a folder", str(output))


def _check_replaceable(input: Path, output: Path, force: bool) -> None:
    """Raise ValueError if ``output`` is the input under any name, or exists without ``force``."""
    if not output.exists():
        return
    if output.samefile(input):
        raise ValueError(f"--output must be another file than --input, got {output} for both")
    if not force:
        raise ValueError(
            f"--output {output} exists: choose another file, or replace it with --force"
        )


def _write(restored: Mapping[str, Tensor], output: Path) -> None:
    from safetensors.torch import save

    from lowrank_dp import artifacts

    with artifacts.atomic_write(output) as file:
        file.write(save({name: tensor.contiguous() for name, tensor in restored.items()}))


def _read(path: Path, noise_std: float) -> dict[str, Tensor]:
    """Read the tensors of a file; raise ValueError for a matrix without the stated noise."""
    import safetensors
    import torch
    from safetensors.torch import load_file

    from lowrank_dp.restore import require_noise

    _validate.real("noise_std", noise_std, low=0)
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"--input must be a safetensors file, got {path.name}: {error}") from None
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.dtype in types:
            wide = tensor if tensor.dtype == torch.float64 else tensor.float()
            require_noise(
                f"matrix {name}", wide, noise_std, remedy="give --noise-std in its own units"
            )
    return tensors


def _print(reports: Mapping[str, Report]) -> None:
    from rich.console import Console

    names, pattern = without_common_parts(list(reports))
    rows = [
        [
            "×".join(map(str, report.shape)),
            f"{report.edge:.3g}",
            "" if report.top is None else f"{report.top:.3g}",
            "" if report.num_above_edge is None else str(report.num_above_edge),
            report.action,
            f"{report.norm_before:.3g}",
            f"{report.norm_after:.3g}",
        ]
        for report in reports.values()
    ]
    console = Console()
    if not rows:
        say(
            console,
            "no tensor of the file is a matrix with both sides above 1: all are written unchanged",
        )
        return
    if pattern:
        say(console, f"matrices: {pattern}")
    columns = ["matrix", "shape", "edge", "top", "above", "action", "norm before", "norm after"]
    print_table(console, columns, in_sections(names, rows))
