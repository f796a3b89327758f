"""Every notebook runs top to bottom from the shipped artifacts."""

from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
every_notebook = pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem
)


def execute(notebook):
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()


def parameters(notebook):
    """The cells that tools such as papermill replace."""
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


@pytest.mark.slow
@every_notebook
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    execute(notebook)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@every_notebook
def test_notebook_is_well_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    (cell,) = parameters(notebook)
    assert [line.split(" = ")[0] for line in cell.source.splitlines()] == [
        "SCALE",
        "RECOMPUTE",
        "ARTIFACTS",
    ]
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert "\ndef " not in code and "\nclass " not in code  # logic belongs to the package
    assert path.stat().st_size < 400_000  # it is read on a code host


@pytest.mark.slow
def test_notebook_without_its_artifact_says_so(tmp_path):
    notebook = nbformat.read(FOLDER / "03_sample_efficiency.ipynb", as_version=4)
    parameters(notebook)[0].source += f"\nARTIFACTS = {str(tmp_path)!r}"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no result efficiency"):
        execute(notebook)
