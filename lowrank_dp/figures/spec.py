"""Specification of a figure: its experiment, configs, plot, headline, caption and table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[list[str], list[list[str]]]  # columns and rows
OPTIONS = ("model", "task", "device", "seed")  # options that change a config


@dataclass(frozen=True)
class FigureSpec:
    """An experiment, its configuration at each scale, and how its result is shown.

    Attributes:
        run: the experiment, a function from a config (and a source, if ``takes_source``) to a
            result.
        result: dataclass of the result.
        small: config that takes minutes on 2 cores.
        full: config of the published figure.
        plot: function from a result to a figure.
        headline: function from a result to its main quantities, by name.
        caption: text above the table.
        table: function from a result to columns and rows; None tabulates the headline.
        plan: function from a config to a description of the work, which is printed before the
            experiment; None prints none.
        takes_source: whether ``run`` accepts a prepared ``experiments.gradients.GradientSource``
            of ``config.gradients``.
        options: the options of the command that the experiment follows, among :data:`OPTIONS`.
            An experiment with models, tasks or seeds of its own lists fewer.
        lengthy: whether ``full`` takes from minutes to hours. The saved result of a lengthy figure
            is that of the full scale. The small scale is then a trial on generated text, which
            :func:`lowrank_dp.figures.show` computes, and never replaces the saved result.
    """

    run: Callable[..., Any]
    result: type
    small: Any
    full: Any
    plot: Callable[[Any], Figure]
    headline: Callable[[Any], Mapping[str, str]]
    caption: str
    table: Callable[[Any], Table] | None = None
    plan: Callable[[Any], str] | None = None
    takes_source: bool = False
    options: tuple[str, ...] = OPTIONS
    lengthy: bool = False

    def rows(self, result: Any) -> Table:
        """Tabulate a result: columns and rows of formatted cells."""
        if self.table is not None:
            return self.table(result)
        return ["quantity", "value"], [list(item) for item in self.headline(result).items()]


def lengthy(
    module: Any, plot: Callable[[Any], Figure], small: Any, full: Any, options: tuple[str, ...]
) -> FigureSpec:
    """Return the specification of a lengthy figure whose experiment is a module.

    The module has ``run``, ``Result``, ``headline``, ``CAPTION`` and ``table``, and may have
    ``plan``.
    """
    return FigureSpec(
        run=module.run,
        result=module.Result,
        small=small,
        full=full,
        plot=plot,
        headline=module.headline,
        caption=module.CAPTION,
        table=module.table,
        plan=getattr(module, "plan", None),
        options=options,
        lengthy=True,
    )
