"""The notebook runs as it stands and prints what it shows.

`jupyter execute --inplace examples/notebook/cppo.ipynb` makes its outputs anew.
"""

import nbformat
from documented import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "examples" / "notebook" / "cppo.ipynb"


def printed(notebook):
    """What each cell prints; pictures and warnings depend on the machine."""
    outputs = [
        [output for output in cell.get("outputs", []) if output.get("name") == "stdout"] for cell in notebook.cells
    ]
    return ["".join(output["text"] for output in cell) for cell in outputs]


def test_the_notebook_prints_what_it_shows():
    shown = nbformat.read(NOTEBOOK, as_version=4)
    run = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(run, startup_timeout=600, resources=resources).execute()
    assert printed(run) == printed(shown)
    kinds = [kind for cell in run.cells for output in cell.get("outputs", []) for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2 and kinds.count("text/html") == 1
