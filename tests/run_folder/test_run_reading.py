"""What a run left is found, whatever of it is there."""

from __future__ import annotations

import json

import pytest
from saved_results import made_result

from entropy_fast.errors import BundleError, LedgerError, ResultError, RunFolderError
from entropy_fast.run_folder.bundle_reading import BUNDLE_NAME, BUNDLE_SCHEMA, rendered
from entropy_fast.run_folder.result_files import write_result
from entropy_fast.run_folder.run_reading import read_run
from entropy_fast.truth import EntropyLedger

ONLINE = {
    "delta_h1": None, "std_error": None, "forecast": -0.2, "unit": "nats per token", "learning_rate": 1e-4,
    "engine": "one_pass", "split": {"direct": -0.2, "visitation": None, "total": None},
}  # fmt: skip


def keep_step(folder, step: int, online=None) -> None:
    folder.mkdir(parents=True)
    document = {
        "schema": BUNDLE_SCHEMA, "version": "0", "step": step, "facts": {}, "online": online, "trainable": [], "dtypes": {},
        "files": {},
    }  # fmt: skip
    (folder / BUNDLE_NAME).write_text(rendered(document))


def test_a_training_run_with_ledgers_and_kept_steps(tmp_path):
    for name in ("ledger.parquet", "ledger.from-50.parquet"):
        EntropyLedger(tmp_path / name).record(1, part="direct", forecast=-0.1)
    keep_step(tmp_path / "step-000100", 100)
    keep_step(tmp_path / "step-000020", 20, ONLINE)
    write_result(made_result(), tmp_path / "step-000020")
    (tmp_path / "other").mkdir()
    found = read_run(tmp_path)
    assert found.result is None and found.validations == {}
    assert [ledger.path.name for ledger in found.ledgers] == ["ledger.from-50.parquet", "ledger.parquet"]
    assert [(kept.step, kept.folder.name, kept.probed) for kept in found.steps] == [
        (20, "step-000020", True),
        (100, "step-000100", False),
    ]
    online = found.steps[0].online
    assert online.forecast == online.split["direct"] == -0.2
    assert repr(online.delta_h1) == repr(online.split["total"]) == "nan"
    assert found.steps[1].online is None


def test_a_kept_step_that_was_probed(tmp_path):
    folder = tmp_path / "step-000020"
    keep_step(folder, 20, ONLINE)
    assert read_run(folder).result is None
    write_result(made_result(), folder)
    found = read_run(folder)
    assert found.result.result.unit == "nats per token"
    assert [kept.folder for kept in found.steps] == [folder]


def test_a_ledger_by_its_file(tmp_path):
    EntropyLedger(tmp_path / "any name").record(1, part="direct", forecast=-0.1)
    found = read_run(tmp_path / "any name")
    assert [entry.forecast for entry in found.ledgers[0].rows()] == [-0.1]


def test_nothing_of_a_run_is_an_error(tmp_path):
    with pytest.raises(RunFolderError, match="does not exist"):
        read_run(tmp_path / "none")
    (tmp_path / "per_prompt.parquet").write_bytes(b"")
    with pytest.raises(RunFolderError, match=r"no result\.json, no ledger\*\.parquet") as caught:
        read_run(tmp_path)
    assert "entropy-fast probe" in caught.value.fix


def test_what_is_damaged_is_named(tmp_path):
    (tmp_path / "ledger.parquet").write_bytes(b"x")
    with pytest.raises(LedgerError, match=r"ledger\.parquet"):
        read_run(tmp_path)
    (tmp_path / "ledger.parquet").unlink()
    keep_step(tmp_path / "step", 1)
    text = (tmp_path / "step" / BUNDLE_NAME).read_text()
    (tmp_path / "step" / BUNDLE_NAME).write_text(text.replace('"step": 1', '"step": 2'))
    with pytest.raises(BundleError, match="its hash does not fit"):
        read_run(tmp_path)
    (tmp_path / "step" / BUNDLE_NAME).write_text(rendered({**json.loads(text), "online": {"delta_h1": "x"}}))
    with pytest.raises(ResultError, match="online"):
        read_run(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ResultError, match="has schema None"):
        read_run(tmp_path)
