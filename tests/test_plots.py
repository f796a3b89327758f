"""Every figure states its privacy and its intervals, and draws in a user's own axes."""

import functools
import importlib
import inspect
import pkgutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image

from lowrank_dp import artifacts, figures, plots
from lowrank_dp.experiments import alignment, arms, dynamics, noisy_release
from lowrank_dp.experiments.implicit_noise_configs import FAMILIES
from lowrank_dp.plots import style
from lowrank_dp.plots.arms import NAMES, look
from lowrank_dp.theory.privacy import PROFILE_ERROR

ROOT = Path(__file__).parent.parent
PAPER, DRAWN = ROOT / "paper_artifacts", ROOT / "figures"
SAVED = [name for name in figures.NAMES if (PAPER / f"{name}.json").exists()]
INTERVALS = {  # figure -> what its caption line says about bars, bands or points
    "spectra": "one noise draw",
    "total_variation": "",  # exact values
    "vector_privacy": "c alone is measured",
    "lora_noise": "95% interval over draws of A",
    "momentum": "bands: their range",
    "plan_check": "mean of 2 noise draws",
    "plan_gap": "relative error of 30%",
    "plan_gap_large_batch": "relative error of 30%",
    "gap": "Ratios of means over 5 seeds",
    "gap_large_batch": "Ratios of means over 5 seeds",
    "gap_all_layers": "Ratios of means over 5 seeds",
    "projection_privacy": "95% intervals, 300 trials",
    "matrix_attack": "95% intervals, 100 trials",
    "noisy_projection": "95% intervals, 100 trials",
    "noise_cost": "95% t-intervals of the logarithm, 3 warm-ups",
}


@functools.cache
def drawn(name):
    spec = figures.find(name)
    result = artifacts.load_result(PAPER, name, spec.result)
    return result, spec.plot(result)


def pdf_text(text):
    return text.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)").encode()


@pytest.mark.slow
def test_every_figure_states_its_privacy_and_its_intervals():
    marked = set()
    for name in SAVED:
        result, figure = drawn(name)
        line = figure.get_suptitle()
        assert ("NON-PRIVATE" in line) == ("NON-PRIVATE" in result.privacy), name
        marked |= {name} if "NON-PRIVATE" in line else set()
        assert INTERVALS.get(name, "95% t-interval") in line, (name, line)
        seeds = getattr(result.config, "num_seeds", None)
        assert seeds is None or f"{seeds} seeds" in line, (name, line)
    assert {"spectra", "alignment", "membership", "gap", "steps_sst2_gap"} <= marked
    assert "total_variation" not in marked


def test_no_exact_delta_is_drawn_below_its_error():
    for name, panel in (("vector_privacy", 1), ("projection_privacy", 0)):
        axis = drawn(name)[1].axes[panel]
        assert "δ" in axis.get_ylabel() and axis.get_yscale() == "log", name
        assert axis.get_ylim()[0] >= PROFILE_ERROR, name


def test_saved_figures_hold_the_privacy_statement_of_their_results():
    for name in SAVED:
        privacy = artifacts.load_result(PAPER, name, figures.find(name).result).privacy
        with Image.open(DRAWN / f"{name}.png") as image:
            assert image.info["Description"] == privacy, name
        assert b"/Subject (" + pdf_text(privacy) + b")" in (DRAWN / f"{name}.pdf").read_bytes(), (
            name
        )
    assert (DRAWN / "scaling.pdf").exists() and (DRAWN / "scaling.png").exists()


@pytest.mark.slow
def test_every_panel_has_a_letter_and_a_title():
    for name in SAVED:
        _, figure = drawn(name)
        letters = style.panels(figure)
        places = {str(axis.get_position().bounds[:2]) for axis in figure.axes}
        extra = 1 if name.startswith("gap") else 0  # the colour bar
        assert letters == list("abcdefghijklmnop"[: len(places) - extra]), name
        for axis in figure.axes:
            if axis.get_label() in letters:
                assert len(axis.get_title(loc="left")) > 3, (name, axis.get_label())


@pytest.mark.slow
def test_no_panel_covers_another():
    for name in SAVED:
        _, figure = drawn(name)
        figure.draw_without_rendering()
        shown = [axis for axis in figure.axes if axis.get_title(loc="left")]
        labels = {axis: axis.yaxis.get_tightbbox() for axis in shown}  # with the ticks'
        for axis, box in ((axis, box) for axis, box in labels.items() if box):
            for other in labels.keys() - {axis}:
                place = other.get_window_extent()
                wide = min(box.x1, place.x1) - max(box.x0, place.x0)
                high = min(box.y1, place.y1) - max(box.y0, place.y0)
                assert min(wide, high) <= 0, (name, axis.get_label(), other.get_label())


@pytest.mark.slow
def test_bands_are_inside_their_panels():
    """The band of plan_gap is a tolerance around a line, not data, so the test omits it."""
    seen = 0
    for name in SAVED:
        _, figure = drawn(name)
        bands = [
            (axis, band)
            for axis in figure.axes
            for band in axis.collections
            if isinstance(band, PolyCollection) and not name.startswith("plan_gap")
        ]
        for axis, band in bands:
            heights = np.concatenate([path.vertices[:, 1] for path in band.get_paths()])
            low, high = axis.get_ylim()
            assert low <= np.nanmin(heights) and np.nanmax(heights) <= high, name
            seen += 1
    assert seen > 40


@pytest.mark.slow
def test_targets_are_in_the_legend():
    for name in ("steps_sst2", "steps_e2e", "steps_sst2_gap"):
        _, figure = drawn(name)
        said = [text.get_text() for text in figure.legends[0].get_texts()]
        assert any(text.startswith("target: 90%") for text in said), name


def test_an_arm_looks_the_same_in_all_figures_and_like_no_other():
    every = {*arms.ARMS, *alignment.SCHEMES, *dynamics.ARMS, *FAMILIES}
    assert every <= set(NAMES)
    projected = [look(name) for name in noisy_release.MECHANISMS if name != noisy_release.PLAIN]
    assert len({*projected, look("noisy"), look("LoRA, A frozen")}) == 5
    for one, same in (
        ("partial, 0.5", "partial(0.5)"),
        ("lora", "LoRA"),
        ("full, DP", "DP-Adam"),
        ("Gaussian noise", "gaussian"),
    ):
        assert look(one) == look(same)
    looks = [look(arm) for arm in arms.ARMS]
    assert len(set(looks)) == len(looks)
    looks = [look(scheme) for scheme in alignment.SCHEMES]
    assert len(set(looks)) == len(looks)
    with pytest.raises(ValueError, match=r"^arm must be .*did you mean 'DP-Adam'"):
        look("DP-Adm")
    assert style.shade("rank", 8) == style.shade("rank", 8) != style.shade("rank", 16)


def test_plain_dp_reads_no_a_and_is_drawn_once_per_panel():
    result, figure = drawn("noisy_projection")
    for axis in figure.axes[:3]:
        points = {
            line.get_marker(): len(line.get_xdata())
            for line in axis.lines
            if line.get_linestyle() == "None"
        }
        ranks = len(result.config.ranks)
        assert points == {"o": 1, "v": ranks, "^": ranks, "D": ranks}, axis.get_label()


def test_wide_axes_have_fewer_labels():
    for high, wanted in ((9, [1, 1.5, 2, 3, 5, 7]), (900, [1, 2, 5])):
        axis = Figure().subplots()
        axis.set(yscale="log", ylim=(1, high))
        style.plain_log(axis.yaxis)
        ticks = axis.yaxis.get_majorticklocs()
        assert [*ticks[(ticks > 0.99) & (ticks < 9)]] == pytest.approx(wanted), high


def plot_functions():
    for module in pkgutil.iter_modules(plots.__path__):
        found = importlib.import_module(f"lowrank_dp.plots.{module.name}")
        for name, function in vars(found).items():
            if name.startswith("plot_") and function.__module__ == found.__name__:
                yield name, function


def test_every_plot_function_takes_axes():
    found = dict(plot_functions())
    assert len(found) >= 17 and "plot_roc" in found
    for name, function in found.items():
        parameters = inspect.signature(function).parameters
        given = parameters.get("axes", parameters.get("ax"))
        assert given is not None and given.default is None, name
        assert given.kind is inspect.Parameter.KEYWORD_ONLY, name
        assert hasattr(function, "__wrapped__"), f"{name} needs the decorator style.labelled"


def test_plots_draw_in_axes_of_the_user():
    for name in ("total_variation", "alignment"):
        result, _ = drawn(name)
        mine = Figure()
        others = mine.subplots(2, 2).ravel()
        got = figures.find(name).plot(result, axes=others[:3])
        assert got is mine and mine.get_suptitle() == "" and not mine.legends, name
        assert [bool(axis.lines or axis.patches) for axis in others] == [True] * 3 + [False], name
        said = "".join(text.get_text() for text in others[0].texts)
        assert ("NON-PRIVATE" in said) == (name == "alignment")
        mine.draw_without_rendering()
        with pytest.raises(ValueError, match=r"^axes must be 3 matplotlib axes.*, got 2"):
            figures.find(name).plot(result, axes=others[:2])


def test_a_panel_can_stand_alone():
    for name, panel, drawn_axes in (("alignment", "c", 1), ("membership", "a", 2)):
        spec = figures.find(name)
        figure = spec.plot(artifacts.load_result(PAPER, name, spec.result))
        before = figure.get_suptitle()
        style.keep_panel(figure, panel)
        assert style.panels(figure) == [panel] and len(figure.axes) == drawn_axes, name
        assert figure.get_suptitle() == before and "NON-PRIVATE" in before
        width, height = figure.get_size_inches()
        assert width / height == pytest.approx(16 / 9)
        figure.draw_without_rendering()
        place = figure.axes[0].get_position()
        assert place.width > 0.5 and place.height > 0.4, name
        with pytest.raises(ValueError, match=r"^panel must be one of"):
            style.keep_panel(figure, "z")
