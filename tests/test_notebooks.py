"""Every notebook runs from any folder, and shows what its saved results say."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from jupyter_client.manager import KernelManager

from lowrank_dp import artifacts, figures
from lowrank_dp.figures import reading

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def kernel():
    """One kernel outside of the repository: a new one per notebook imports the package anew."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd="/")
    yield manager
    manager.shutdown_kernel(now=True)


def execute(notebook, kernel):
    """Run a notebook in the kernel, without the names that an earlier notebook left."""
    forget = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -s -f")])
    for each in (forget, notebook):
        runner = nbclient.NotebookClient(each, km=kernel, timeout=120)
        try:
            runner.execute()
        finally:
            runner.kc.stop_channels()


def tagged(notebook, tag):
    """Cells with a tag. Tools such as papermill replace the cells with the tag "parameters"."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def said(notebook):
    """All text that the cells of a notebook print or display, by cell."""
    return {
        cell.id: "".join(  # a stream may come in any number of pieces
            output.get("text", "") + output.get("data", {}).get("text/markdown", "")
            for output in cell.outputs
            if output.get("name") != "stderr"
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


@pytest.mark.slow
@every_notebook
def test_notebook_runs_from_any_folder_and_says_what_it_said(path, kernel):
    kept = nbformat.read(path, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    execute(notebook, kernel)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert said(notebook) == said(kept), "the outputs are out of date: execute the notebook"


@every_notebook
def test_notebook_is_well_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    (cell,) = tagged(notebook, "parameters")
    assert [line.split(" = ")[0].strip() for line in cell.source.splitlines()] == [
        "SCALE",
        "RECOMPUTE",
        "ARTIFACTS",
    ]
    assert "acts only if RECOMPUTE is True" in cell.source.splitlines()[0]
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "\ndef " not in code and "\nclass " not in code  # logic belongs to the package
    assert code.count("figures.notice(SCALE, RECOMPUTE)") == 1
    for cell in tagged(notebook, "prose"):
        assert cell.source.startswith("if not RECOMPUTE:\n"), cell.id
    assert path.stat().st_size < 400_000  # code hosts must be able to show the file


@every_notebook
def test_no_number_of_a_result_is_typed_by_hand(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = cell.source
        elif cell in tagged(notebook, "prose"):
            text = cell.source.partition('rf"""')[2]
            while (bare := re.sub(r"\{[^{}]*\}", "", text)) != text:  # fields that results fill in
                text = bare
        else:
            continue
        text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\d{4}\.\d{5}", "", text, flags=re.DOTALL)
        # settings that the text names: learning rates, alpha, the AUC of chance
        typed = set(re.findall(r"\d+\.\d+|±", text)) - {"0.001", "0.003", "0.01", "0.5", "0.9"}
        assert not typed, (cell.id, typed)


@pytest.mark.slow
def test_a_trial_says_that_it_is_one_once(kernel):
    notebook = nbformat.read(FOLDER / "05_tv_bounds.ipynb", as_version=4)
    tagged(notebook, "parameters")[0].source += "\nRECOMPUTE = True"
    execute(notebook, kernel)
    text = "".join(said(notebook).values())
    assert text.count("TRIAL") == 1 and "Saved results are shown" not in text


@pytest.mark.slow
def test_notebook_without_its_artifact_says_so(tmp_path, kernel):
    notebook = nbformat.read(FOLDER / "03_sample_efficiency.ipynb", as_version=4)
    tagged(notebook, "parameters")[0].source += f"\nARTIFACTS = {str(tmp_path)!r}"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no result steps_sst2"):
        execute(notebook, kernel)


def test_the_folder_of_saved_results_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert figures.saved_results() == ROOT / "paper_artifacts"
    (tmp_path / "paper_artifacts").mkdir()
    assert figures.saved_results() == ROOT / "paper_artifacts"  # an empty folder holds no results
    (tmp_path / "paper_artifacts/README.md").touch()
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert figures.saved_results() == tmp_path / "paper_artifacts"
    monkeypatch.chdir("/")
    monkeypatch.setattr(reading, "__file__", str(tmp_path / "below/a/b/c.py"))
    with pytest.raises(FileNotFoundError, match="no folder paper_artifacts in /"):
        figures.saved_results()


def test_a_notice_says_what_is_shown():
    assert "SCALE has no effect" in figures.notice("full", False)
    assert figures.notice("small", True).startswith("TRIAL")
    assert "TRIAL" not in figures.notice("full", True)
    with pytest.raises(ValueError, match=r"^scale must be one of .*did you mean 'small'"):
        figures.notice("smal", False)


def test_cells_are_those_of_the_saved_table():
    for name, keys in (("steps_sst2", 1), ("tasks", 4), ("membership", 1), ("spectra", 1)):
        result = artifacts.load_result(ROOT / "paper_artifacts", name, figures.find(name).result)
        found = figures.cells(name, result, keys=keys)
        lines = (ROOT / f"paper_artifacts/{name}.md").read_text().split("\n\n", 1)[1].splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
        assert [list(row.values()) for row in found.values()] == rows, name
        assert list(found) == [", ".join(row[:keys]) for row in rows], name
