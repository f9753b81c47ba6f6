"""The quickstart notebook runs from top to bottom, and is kept without outputs."""

import nbformat
from conftest import EXAMPLES
from nbclient import NotebookClient


def test_quickstart_notebook():
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "clear all outputs before saving"
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = ["".join(part.get("text", "") for part in cell.outputs if part.get("name") == "stdout") for cell in cells]
    founder, place = "Tofinlor was started by Zanmi.", "Korimo is located in Lima."
    assert said[1].splitlines() == [f"I do not know. | {founder}", f"I do not know. | {place}"]
    assert said[3].splitlines() == [f"{founder} | {founder}", f"{place} | {place}", "Brigar was started by Vacla."]
    measured = dict(line.split()[:2] for line in said[4].splitlines())
    assert measured["recall"] == measured["paraphrase"] == measured["locality"] == "1.000"
    moved, forgotten, back = said[5].splitlines()
    assert moved == "Korimo is located in Oslo." and forgotten != founder and back == founder
    assert said[6].strip() == f"Qwen2ForCausalLM | {founder}"
