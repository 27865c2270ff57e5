"""examples/quickstart.ipynb: it runs, it shows what it says, and what is committed is its clean output."""

import json
import math
import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "quickstart.ipynb"


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def outputs(book):
    return [output for cell in code_cells(book) for output in cell.outputs]


def shown(book):
    """Return the text of a notebook's outputs and the number of its pictures."""
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs(book))
    return text, sum("image/png" in output.get("data", {}) for output in outputs(book))


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, 4)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Run a copy of the notebook beside the model and the text; a cell that raises is an error here."""
    book = nbformat.read(NOTEBOOK, 4)
    book.cells.append(nbformat.v4.new_code_cell("import json\nprint(json.dumps(results))"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        return nbclient.execute(book, cwd=str(NOTEBOOK.parent), timeout=300, coalesce_streams=True)


def test_training_brings_back_what_quantization_took_and_packing_changes_nothing(executed):
    results = json.loads(outputs(executed)[-1].text)
    names = ["original", "two bits, not trained", "two bits, trained", "packed, saved, loaded"]
    original, untrained, trained, loaded = (results[name] for name in names)
    assert 1 < original < trained < untrained
    assert math.log(trained / original) < 0.5 * math.log(untrained / original)
    assert loaded == trained


def test_the_committed_outputs_are_those_of_the_committed_cells(committed, executed):
    cells, again = code_cells(committed), code_cells(executed)[:-1]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [[[output.output_type for output in cell.outputs] for cell in book] for book in (cells, again)]
    assert kinds[0] == kinds[1]
    reports = [cell.outputs[0].data["text/plain"] for cell in (*cells, *again) if cell.source.endswith("\nreport")]
    assert len(reports) == 2 and reports[0] == reports[1]
    assert shown(committed)[1] == shown(executed)[1] == 1


def test_no_output_is_a_warning_a_progress_bar_or_a_path(committed, executed):
    for book in (committed, executed):
        assert {output.get("name", "stdout") for output in outputs(book)} == {"stdout"}
        text = shown(book)[0] + "".join(cell.source for cell in book.cells)
        assert not re.search(r"Warning|\d%\||\x1b|\r|/(home|root|tmp|usr|Users|opt)/|site-packages", text)
    assert NOTEBOOK.stat().st_size < 200_000
