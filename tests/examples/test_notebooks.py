"""Notebooks run from their first cell to the last in a kernel of their own, and are kept without outputs."""

from __future__ import annotations

import base64
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_valid_and_kept_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs, cell.execution_count) == ([], None)


@pytest.mark.exhaustive
def test_from_rollouts_to_a_decision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, value in {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "rollouts_to_decision.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=250, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    # What the toy comes to was looked at once: half of the entropy in dozens of steps, and a bonus that keeps the reward.
    assert "decision: bonus 0.05" in printed and "the entropy is halved in" in printed
    assert "over 12 steps (direct)" in printed
    shown = [output.data for output in outputs if output.output_type == "execute_result"]
    assert sum("image/png" in data for data in shown) == 5
    for data in shown:
        assert "image/png" in data or "text/html" in data
        assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG") if "image/png" in data else True
        assert len(data["text/plain"]) < 2000
    assert any("95 % interval" in data.get("text/html", "") for data in shown)
