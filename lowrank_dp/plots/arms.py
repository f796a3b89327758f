"""Colour, marker and line of every scheme, training arm and method, the same in all figures.

Black stands for gradients and runs without noise, grey for the plain noisy gradient and DP-Adam,
red for the optimal shrinker, blue for ``denoise``, green for partial restoration, brown for DP-SGD,
sky blue for LoRA, and orange for LoRA with a frozen A. Purple stands for the preconditioner; purple
and olive stand for projections with noise. Variants of one method have one colour and differ by
marker and line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_dp import _validate
from lowrank_dp.plots.style import (
    BLACK,
    BLUE,
    BROWN,
    GREEN,
    GREY,
    OLIVE,
    ORANGE,
    PINK,
    PURPLE,
    RED,
    SKY,
    YELLOW,
)


@dataclass(frozen=True)
class Look:
    """Look of an arm in a plot: matplotlib's colour, marker and line style."""

    colour: str
    marker: str
    line: str

    def curve(self, **options: Any) -> dict[str, Any]:
        """Return matplotlib's options for a curve with markers."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.line,
            **options,
        }

    def points(self, **options: Any) -> dict[str, Any]:
        """Return matplotlib's options for points without a line."""
        return self.curve(**{"linestyle": "none", **options})


_LOOKS: dict[str, Look] = {
    # schemes on one gradient
    "noisy": Look(GREY, "o", "-"),
    "truncate(8)": Look(SKY, "v", "-"),
    "power(3)": Look(ORANGE, "^", "-"),
    "hard": Look(PINK, "s", "-"),
    "soft": Look(YELLOW, "D", "-"),
    "clean": Look(BLACK, "o", "--"),
    "oracle profile": Look(BLACK, "x", ":"),
    "oracle weights": Look(BLACK, "+", "--"),
    # projections of one gradient, with noise for privacy
    "project, then noise": Look(PINK, "v", "-"),
    "noise, then project": Look(PURPLE, "^", "-"),
    "noise, then project, random A": Look(OLIVE, "D", "-"),
    # schemes and training arms
    "denoise": Look(BLUE, "X", "--"),
    "partial(0.5)": Look(GREEN, "P", "-"),
    "partial(0.9)": Look(GREEN, "P", "--"),
    "optimal": Look(RED, "*", "-"),
    "optimal, zeroed": Look(RED, ".", ":"),
    # training arms
    "DP-Adam": Look(GREY, "o", "-"),
    "DP-SGD": Look(BROWN, "s", "-"),
    "noise-free Adam (NON-PRIVATE)": Look(BLACK, "", ":"),
    "noise-free SGD (NON-PRIVATE)": Look(BLACK, "", "-."),
    "DP-SGD, torch's momentum": Look(BROWN, "v", "--"),
    "DP-SGD, vectors frozen": Look(BROWN, "D", ":"),
    "partial, power law, 0.5": Look(GREEN, "d", "-"),
    "partial, power law, 0.9": Look(GREEN, "d", "--"),
    "DOPPLER": Look(PINK, "s", "-."),
    "DiSK": Look(PINK, "d", ":"),
    "mean, denoise": Look(BLUE, "X", "-"),
    "mean, optimal": Look(RED, "*", "--"),
    "mean, optimal, zeroed": Look(RED, "*", "-."),
    "mean, polar, zeroed": Look(RED, "p", ":"),
    "DP-AdamBC": Look(YELLOW, "p", "-"),
    "DP-Muon": Look(SKY, "h", "-"),
    "DP-MuonBC": Look(SKY, "h", "--"),
    "DP-LoRA": Look(SKY, "<", "--"),
    "DP-LoRA, frozen A": Look(ORANGE, ">", "-."),
    "DP-LoRA, mean, optimal, zeroed": Look(SKY, "*", ":"),
    "preconditioned, generated text": Look(PURPLE, "P", "-"),
    "preconditioned, CoLA": Look(OLIVE, "D", "-"),
    "preconditioned, vectors trained": Look(PURPLE, "v", "--"),
    "preconditioned, noisy sums": Look(PURPLE, "^", ":"),
    # methods of membership inference and of training dynamics, without noise for privacy
    "full": Look(BLACK, "s", "-"),
    "LoRA": Look(SKY, "<", "-"),
    "frozen A": Look(ORANGE, ">", "--"),
    "full, DP restored": Look(RED, "d", "-"),
    "fresh A": Look(PURPLE, "D", "-"),
    "matched Gaussian noise": Look(GREEN, "o", "--"),
}
# other name -> name of the same arm
_SAME = {
    "partial, 0.5": "partial(0.5)",
    "partial, 0.9": "partial(0.9)",
    "full, DP": "DP-Adam",
    "lora": "LoRA",
    "lora-frozen-a": "frozen A",
    "fresh-a": "fresh A",
    "gaussian": "matched Gaussian noise",
    "Gaussian noise": "matched Gaussian noise",
    "LoRA, A frozen": "DP-LoRA, frozen A",
    "restored": "optimal",
}
NAMES = (*_LOOKS, *_SAME)


def look(arm: str) -> Look:
    """Return the look of an arm, scheme or method; ValueError with the nearest name if unknown.

    >>> look("partial, 0.5") == look("partial(0.5)")
    True
    """
    name = _SAME.get(arm, arm)
    return _LOOKS[_validate.choice("arm", name, NAMES)]
