"""The console script on a tiny saved model: what users type, what they get, and what they are told when it is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from small_policy import saved_model, saved_run

from entropy_fast import fast_delta_h1, read_rollouts, write_rollouts
from entropy_fast.cli.app import run
from entropy_fast.cli.exit_status import ExitStatus
from entropy_fast.run_folder.adapter import attach_adapter
from entropy_fast.run_folder.model_source import ModelSource, load_model

USAGE, REFUSED = ExitStatus.USAGE, ExitStatus.REFUSED


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return saved_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(stored, tmp_path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "run"))


def direct(folder):
    model = attach_adapter(load_model(ModelSource(str(folder / "base"))), folder / "adapter")
    return fast_delta_h1(model, folder / "optimizer.pt", read_rollouts(folder / "rollouts.jsonl"))


def test_probe_writes_what_the_library_returns(folder, capsys):
    out = folder / "out"
    assert run(["probe", str(folder), "--out", str(out), "--verbose"]) == 0
    expected = direct(folder)
    document = json.loads((out / "result.json").read_text())
    assert document["schema"] == "entropy_fast.result/2"
    assert document["delta_h1"] == expected.delta_h1
    assert document["std_error"] == expected.std_error
    assert document["row_sums"] == expected.row_sums.tolist()
    for name, table in expected.sequences.items():
        assert document["sequences"][name]["sequence_logprobs"] == table.sequence_logprobs.tolist()
    assert document["by_layer"] == expected.by_layer
    assert sum(document["by_layer"].values()) == pytest.approx(expected.delta_h1, rel=1e-9)
    assert document["entropy_level"] == expected.entropy_level > 0
    assert document["verdict"] == dataclasses.asdict(expected.verdict)
    table = pq.read_table(out / "per_prompt.parquet").to_pylist()
    assert [row["delta_h1"] for row in table] == [p.delta_h1 for p in expected.per_prompt]
    assert sum(row["delta_h1"] for row in table) == pytest.approx(expected.delta_h1, rel=1e-5)
    assert (out / "contributions.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert f"{expected.delta_h1:.17g}" in shown
    assert " ".join(shown.split()).startswith(expected.verdict.sentence)
    assert "Standard errors, and what each is about" in shown
    assert run(["probe", str(folder), "--out", str(out), "--no-picture"]) == 0
    assert "Standard errors" not in capsys.readouterr().out


def test_probe_from_single_files_equals_the_run_folder(folder):
    options = ["--model", str(folder / "base"), "--adapter", str(folder / "adapter")]
    options += ["--optimizer", str(folder / "optimizer.pt"), "--rollouts", str(folder / "rollouts.jsonl")]
    assert run(["probe", *options, "--out", str(folder / "a"), "--no-picture"]) == 0
    assert run(["probe", str(folder), "--out", str(folder / "b"), "--no-picture"]) == 0
    first, second = (json.loads((folder / name / "result.json").read_text()) for name in "ab")
    for document, name in ((first, "a"), (second, "b")):
        assert str(folder / name) in document.pop("provenance")["commands"][0]
    assert first == second
    assert not (folder / "a" / "contributions.png").exists()


def test_options_go_over_the_run_folder(folder):
    command = ["probe", str(folder), "--no-picture", "--out", str(folder / "o")]
    assert run([*command, "--weighting", "sequence", "--learning-rate", "0.5", "--full-kernel", "--blocks", "2"]) == 0
    document = json.loads((folder / "o" / "result.json").read_text())
    assert document["estimate_options"]["weighting"] == "sequence"
    assert document["learning_rate"] == 0.5
    assert len(document["kernel"]) == 2
    assert run([*command, "--dtype", "bfloat16"]) == 0
    changed = json.loads((folder / "o" / "result.json").read_text())
    assert changed["delta_h1"] != direct(folder).delta_h1


def test_estimator_and_importance_ratios(folder, tmp_path):
    command = ["probe", str(folder), "--no-picture", "--out", str(folder / "o")]
    assert run([*command, "--entropy-estimator", "rao_blackwell"]) == 0
    document = json.loads((folder / "o" / "result.json").read_text())
    assert "Rao-Blackwell" in document["entropy_functional"]
    assert document["estimate_options"]["clip_range"] is None
    rollouts = read_rollouts(folder / "rollouts.jsonl")
    old = torch.where(rollouts.loss_mask == 1, -1.0, 0.0)
    write_rollouts(dataclasses.replace(rollouts, old_logprobs=old), tmp_path / "sampled.jsonl")
    command += ["--rollouts", str(tmp_path / "sampled.jsonl"), "--importance-ratio", "token"]
    changes = []
    for clip in ([], ["--clip-range", "0.2"], ["--clip-range", "0.2,0.3"]):
        assert run([*command, *clip]) == 0
        document = json.loads((folder / "o" / "result.json").read_text())
        changes.append((document["estimate_options"]["clip_range"], document["delta_h1"]))
    assert [clip for clip, _ in changes] == [None, [0.2, 0.2], [0.2, 0.3]]
    assert changes[0][1] != changes[1][1]


def test_the_direct_part_alone(folder, capsys):
    """The total is not known then, and stands nowhere as a number."""
    out = folder / "o"
    assert run(["probe", str(folder), "--out", str(out), "--parts", "direct", "--verbose"]) == 0
    shown = capsys.readouterr().out
    document = json.loads((out / "result.json").read_text())
    assert document["delta_h1"] is None and document["std_error"] is None
    assert document["split"]["total"]["value"] is None
    assert document["verdict"]["total_percent"] is None and document["verdict"]["total_established"] is None
    direct = document["split"]["direct"]["value"]
    assert direct == document["forecast"]["value"]
    assert f"{direct:.17g}" in shown
    assert "at the prefixes visited today" in shown and "in all" not in shown
    assert "nan" not in shown
    assert (out / "contributions.png").stat().st_size > 0
    assert run(["probe", str(folder), "--out", str(out), "--no-picture"]) == 0
    both = json.loads((out / "result.json").read_text())
    assert both["split"]["direct"]["value"] == pytest.approx(direct, rel=1e-4)
    assert set(both["functionals"]) == {"reward", "length"}
    assert both["explanation"].startswith("To first order this update")


def test_shares_of_sequences(folder, capsys):
    out = folder / "o"
    command = ["probe", str(folder), "--no-picture", "--out", str(out), "--engine", "one_pass"]
    assert run([*command, "--by-sequence", "--verbose"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    document = json.loads((out / "result.json").read_text())
    rows = pq.read_table(out / "per_sequence.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(read_rollouts(folder / "rollouts.jsonl").n_sequences))
    assert [row["delta_h1"] for row in rows] == document["by_sequence"]["both"]["delta_h1"]
    assert sum(row["delta_h1"] for row in rows) == pytest.approx(document["delta_h1"], rel=1e-4)
    assert sum(document["by_parameter"].values()) == pytest.approx(document["delta_h1"], rel=1e-9)
    largest = max(rows, key=lambda row: abs(row["delta_h1"]))
    assert f"of {len(rows)}): row {largest['row']} ({largest['delta_h1']:+.3e})" in shown
    # The next result has none, and must not stand beside those of this one.
    assert run(command) == 0
    assert not (out / "per_sequence.parquet").exists()
    assert run(["probe", str(folder), "--by-sequence", "--engine", "two_pass", "--out", str(out)]) == 2
    assert "`by_sequence` is True, and engine 'two_pass' has no use for it" in " ".join(capsys.readouterr().err.split())


def test_two_batches(folder):
    rollouts = str(folder / "rollouts.jsonl")
    shutil.copy(rollouts, folder / "entropy.jsonl")
    again = ["probe", str(folder), "--entropy-rollouts", str(folder / "entropy.jsonl"), "--out", str(folder / "same")]
    assert run([*again, "--no-picture"]) == REFUSED  # one batch under two names
    rows = [json.loads(line) for line in (folder / "entropy.jsonl").read_text().splitlines()]
    other = [{**row, "input_ids": [*row["input_ids"][:-1], 5]} for row in rows]
    (folder / "entropy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    command = ["probe", str(folder), "--entropy-rollouts", str(folder / "entropy.jsonl"), "--no-picture"]
    assert run([*command, "--out", str(folder / "o")]) == 0
    assert (
        run([*command, "--out", str(folder / "alpha"), "--conditional-variance", "alpha", "--accumulate-on", "cpu"])
        == 0
    )
    document = json.loads((folder / "o" / "result.json").read_text())
    alpha = json.loads((folder / "alpha" / "result.json").read_text())
    assert alpha["run_options"]["conditional_variance"] == "alpha"
    assert alpha["std_error"] == pytest.approx(document["std_error"], rel=1e-4)
    assert document["estimate"] == "two_batch"
    assert {p["role"] for p in document["per_prompt"]} == {"entropy", "update"}
    assert run([*command, "--out", str(folder / "jvp"), "--engine", "jvp"]) == 0
    forward = json.loads((folder / "jvp" / "result.json").read_text())
    assert forward["delta_h1"] == pytest.approx(document["delta_h1"], rel=1e-4)
    assert forward["column_sums"] is None
    assert len(forward["derivatives"]["sequences"]) == len(forward["derivatives"]["sequence_shares"])
    assert sum(forward["derivatives"]["sequence_shares"]) == pytest.approx(forward["delta_h1"], rel=1e-9)
    assert "tokens" not in forward["derivatives"]


def test_sample_then_probe(folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} plus 1 is", "answer": str(n + 1)}) + "\n" for n in range(3)))
    out = tmp_path / "sampled.parquet"
    command = [
        "sample",
        str(prompts),
        "--model",
        str(folder / "base"),
        "--adapter",
        str(folder / "adapter"),
        "--out",
        str(out),
    ]
    assert run([*command, "--responses", "16", "--max-new-tokens", "5", "--seed", "3"]) == 0
    rollouts = read_rollouts(out)
    assert (rollouts.n_prompts, rollouts.n_sequences) == (3, 48)
    assert (rollouts.temperature, rollouts.top_p) == (1.0, 1.0)
    assert set(rollouts.rewards.tolist()) <= {0.0, 1.0}
    assert run(["probe", str(folder), "--rollouts", str(out), "--out", str(tmp_path / "o"), "--no-picture"]) == 0


def test_a_truncated_sample_is_recorded_and_refused(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "500")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "sampled.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} plus 1 is", "answer": str(n + 1)}) + "\n" for n in range(3)))
    command = ["sample", str(prompts), "--model", str(folder / "base"), "--adapter", str(folder / "adapter")]
    command += ["--out", str(out), "--responses", "16", "--max-new-tokens", "5", "--seed", "3"]
    assert run([*command, "--top-k", "12", "--min-p", "0.01", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["responses"], said["prompts"], said["written"]) == (48, 3, str(out))
    assert read_rollouts(out).truncated_by == ("top-k 12", "min-p 0.01")
    probe = ["probe", str(folder), "--rollouts", str(out), "--out", str(tmp_path / "o"), "--no-picture"]
    assert run(probe) == REFUSED
    assert "sampled with top-k 12, min-p 0.01" in capsys.readouterr().err
    assert run([*probe, "--parts", "direct"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["probe"], "nowhere to write", USAGE),
        (["probe", "--out", "o", "--model", "m"], "--optimizer, --rollouts is missing", USAGE),
        (["probe", "RUN", "--engine", "warp"], "engine is 'warp'", USAGE),
        (["probe", "RUN", "--weighting", "none"], "`weighting` is 'none'", USAGE),
        (["probe", "RUN", "--entropy-estimator", "none"], "`entropy_estimator` is 'none'", USAGE),
        (["probe", "RUN", "--importance-ratio", "token"], "needs the update batch's `old_logprobs`", REFUSED),
        (["probe", "RUN", "--clip-range", "0.2"], "clip_range=(0.2, 0.2) with importance_ratio='none'", USAGE),
        (["probe", "RUN", "--clip-range", "0.2,x", "--importance-ratio", "token"], "`clip_range` is '0.2,x'", USAGE),
        (["probe", "RUN", "--learning-rate", "fast"], "`learning_rate` is 'fast'", USAGE),
        (["probe", "RUN", "--learning-rate", "nan"], "learning rate", REFUSED),
        (["probe", "RUN", "--blocks", "2.5"], "`blocks` is '2.5'", USAGE),
        (["probe", "RUN", "--prompts-per-microbatch", "0"], "`prompts_per_microbatch` is 0", USAGE),
        (["probe", "RUN", "--learning-rate", "0"], "learning rate", REFUSED),
        (["probe", "RUN", "--blocks", "99"], "blocks=99", USAGE),
        (["probe", "RUN", "--rollouts", "missing.jsonl"], "missing.jsonl", REFUSED),
        (["probe", "RUN", "--optimizer", "missing.pt"], "does not exist", REFUSED),
        (["probe", "RUN", "--adapter", "missing"], "adapter_config.json", REFUSED),
        (["probe", "RUN", "--model", "/missing/model"], "does not exist", REFUSED),
        (["probe", "RUN", "--model", "base_without_weights"], "cannot be loaded", REFUSED),
        (["probe", "RUN", "--device", "gpu"], "device is 'gpu'", USAGE),
        (["probe", "RUN", "--out", "base_without_weights/config.json"], "results cannot be written", REFUSED),
        (["probe", "RUN", "--dtype", "int4"], "dtype", USAGE),
        (["probe", "RUN", "--accumulate-on", "disk"], "`accumulate_on` is 'disk'", USAGE),
        (["probe", "RUN", "--max-excluded-share", "2"], "`max_excluded_share` is 2", USAGE),
        (["sample", "none.jsonl", "--model", "m", "--out", "x.jsonl"], "cannot be read", REFUSED),
        (
            ["sample", "none.jsonl", "--model", "m", "--out", "x.jsonl", "--verifier", "oracle"],
            "verifier is 'oracle'",
            USAGE,
        ),
        (["doctor", "--device", "cpu"], "without a model", USAGE),
        (["probe", "RUN", "--optimizer", "pipe"], "pipe is not a file", REFUSED),
        (["probe", "RUN", "--rollouts", "pipe"], "pipe is not a file", REFUSED),
        (["doctor", "--model", "m", "--rollouts", "pipe"], "pipe is not a file", REFUSED),
        (["doctor", "--model", "m", "--optimizer", "pipe"], "pipe is not a file", REFUSED),
    ],
)
def test_wrong_input_is_a_message_not_a_traceback(folder, tmp_path, monkeypatch, capsys, arguments, message, status):
    monkeypatch.setenv("COLUMNS", "500")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base_without_weights").mkdir()
    shutil.copy(folder / "base" / "config.json", tmp_path / "base_without_weights")
    os.mkfifo(tmp_path / "pipe")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert run([str(folder) if a == "RUN" else a for a in arguments]) == status
    shown = capsys.readouterr()
    assert message in shown.err
    assert "what to do:" in shown.err
    assert "Traceback" not in shown.err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"run", "base_without_weights"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["probe", "RUN", "--out", ""],
        ["probe", "RUN", "--out", "  "],
        ["probe", ""],
        ["probe", "RUN", "--adapter", ""],
        ["probe", "RUN", "--rollouts", ""],
        ["demo", "--out", ""],
        ["sample", "RUN", "--model", "m", "--out", ""],
        ["doctor", ""],
    ],
)
def test_an_empty_path_is_refused(folder, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert run([str(folder) if a == "RUN" else a for a in arguments]) == 2
    assert "the path is empty" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_a_truncated_rollouts_line_is_named(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    path = folder / "rollouts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], lines[2][:30]]) + "\n")
    assert run(["probe", str(folder)]) == REFUSED
    assert "line 3" in capsys.readouterr().err
    assert not (folder / "result.json").exists()


def test_text_rows_load_the_tokenizer(folder):
    rows = []
    for group in range(3):
        for response, reward in (("3 plus 4 <eos>", 1.0), ("stop", 0.0)):
            rows.append({"group_id": group, "prompt": f"{group} is", "response": response, "reward": reward})
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "probe",
        str(folder),
        "--rollouts",
        str(folder / "text.jsonl"),
        "--out",
        str(folder / "o"),
        "--no-picture",
    ]
    assert run(command) == 0


def test_markup_and_escapes_in_prompts_are_shown_as_text(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    marked = "".join(json.dumps({**row, "prompt": "[red]$x$ \x1b[31m" + row["prompt"]}) + "\n" for row in rows)
    (folder / "rollouts.jsonl").write_text(marked)
    assert run(["probe", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "[red]$x$ [31m" in shown
    assert "\x1b[31m" not in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message is for machines without CUDA")
def test_a_missing_gpu_is_a_message(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    assert run(["probe", str(folder), "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_run_folders_switch_can_be_switched_off(folder):
    document = json.loads((folder / "run.json").read_text())
    document["probe"]["run"]["full_kernel"] = True
    (folder / "run.json").write_text(json.dumps(document))
    command = ["probe", str(folder), "--no-picture", "--engine", "two_pass"]
    assert run(command) == 0
    assert json.loads((folder / "result.json").read_text())["kernel"] is not None
    assert run([*command, "--no-full-kernel"]) == 0
    assert json.loads((folder / "result.json").read_text())["kernel"] is None


def test_usage_errors_and_version(capsys):
    assert run(["probe", "--no-such-option"]) == 2
    assert "No such option" in capsys.readouterr().err
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip().count(".") == 2


def test_a_full_model_without_an_adapter(tmp_path):
    base = saved_model(tmp_path / "base")
    model = load_model(ModelSource(str(base)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    ids = torch.arange(model.config.vocab_size).repeat(2, 1)
    model(input_ids=ids, labels=ids.flip(0)).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    rows = [
        {"group_id": n, "prompt_token_ids": [3 + n], "response_token_ids": [4 + i, 5], "reward": float(i)}
        for n in range(3)
        for i in range(2)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["probe", "--model", str(base), "--optimizer", str(tmp_path / "optimizer.pt"), "--no-picture"]
    assert run([*command, "--rollouts", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "o")]) == 0
