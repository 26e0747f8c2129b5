"""What a question costs, and how right error bars are: the commands run, and say what is wrong in place of a number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from own_benchmarks import make_importable
from probe_oracle.toy_policy import ToyPolicy


@pytest.fixture(autouse=True)
def _benchmarks_importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_importable(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.exhaustive
def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.probe import questions

    # Without the eight numbers, for which the two-pass engine takes long.
    monkeypatch.setattr(questions, "QUESTIONS", tuple(q for q in questions.QUESTIONS if "eight" not in q.name))
    assert questions.main(["--quick", "--workloads", "short", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "probe_questions.json").read_text())["found"][0]
    assert set(found["times"]) == {question.name for question in questions.QUESTIONS}
    assert not found["wrong"]
    assert "WRONG" not in shown


def test_what_is_wrong_gets_no_speed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.probe import questions

    real = questions.ask

    def off(setting: object, question: object, engine: str = "one_pass", **run: object) -> object:
        result = real(setting, question, engine, **run)  # type: ignore[arg-type]
        if engine == "one_pass" and question is questions.QUESTIONS[1]:
            return dataclasses.replace(result, row_sums=1.01 * result.row_sums)
        return result

    monkeypatch.setattr(questions, "ask", off)
    monkeypatch.setattr(questions, "QUESTIONS", questions.QUESTIONS[:2])
    assert questions.main(["--quick", "--workloads", "short", "--out", str(tmp_path)]) == 1
    assert "WRONG: entropy differs by" in capsys.readouterr().out


def test_population_gradients_are_what_batches_estimate() -> None:
    """The mean of X_n and of Y_n over many prompts, within six standard errors of it."""
    from benchmarks import error_bars

    simulation = error_bars.Simulation(ToyPolicy(prompts=3, limit=2, seed=1), fitted=True)
    x_population, y_population = simulation.population(3)
    x, y = simulation.batch(3000, 3)
    for found, expected in (
        (x["total"], x_population["total"]),
        (x["direct"], x_population["direct"]),
        (y, y_population),
    ):
        allowed = 6 * found.std(0) / len(found) ** 0.5 + 1e-12
        assert bool(((found.mean(0) - expected).abs() <= allowed).all())
