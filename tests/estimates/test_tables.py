"""Tables hold a result's own numbers, null where it knows none, and what it lacks is an error that says how to get it."""

from __future__ import annotations

import dataclasses
import math
import sys

import pyarrow as pa
import pytest
import torch
from shown_results import bare, full, prompts, rollouts, static_blocks, two_batches, unknown_errors

from entropy_fast.errors import ConfigError, MissingPackageError, ResultError
from entropy_fast.estimates.held import kernel_shares, part_of

pytestmark = pytest.mark.filterwarnings("ignore:.*without response tokens were left out")


def forecast_row(row, forecast, unit):
    low, high = forecast.interval()
    expected = {
        "value": forecast.value, "std_error": forecast.std_error, "low": low, "high": high,
        "population_std_error": forecast.population_std_error, "unit": unit,
    }  # fmt: skip
    for name, value in expected.items():
        found = row[name]
        assert found == value or (found is None and math.isnan(value))
    return True


def test_forecasts_are_those_of_the_result():
    result = full()
    parts = {row["part"]: row for row in result.to_arrow("parts").to_pylist()}
    assert list(parts) == ["direct", "visitation", "total"]
    for name, row in parts.items():
        assert forecast_row(row, getattr(result.split, name), result.unit)
    others = result.to_arrow("functionals").to_pylist()
    assert [row["functional"] for row in others] == ["length", "odd"]
    assert all(forecast_row(row, result.functionals[row["functional"]], None) for row in others)
    steps = {(row["part"], row["of"]): row for row in result.to_arrow("step_parts").to_pylist()}
    assert list(dict.fromkeys(part for part, _ in steps)) == list(result.step_parts)
    assert forecast_row(steps["fresh", "direct"], result.step_parts["fresh"].split.direct, result.unit)
    assert forecast_row(steps["momentum", "length"], result.step_parts["momentum"].functionals["length"], None)
    whole = sum(steps[part, "total"]["value"] for part in result.step_parts)
    assert whole == pytest.approx(result.delta_h1, rel=1e-12)
    updates = {(row["update"], row["of"]): row for row in result.to_arrow("updates").to_pylist()}
    assert forecast_row(updates["planned", "total"], result.forecast, result.unit)
    assert forecast_row(updates["bonus", "visitation"], result.updates["bonus"].split.visitation, result.unit)


def test_shares_of_prompts_add_up_and_texts_are_there_as_they_were():
    result = full()
    rows = result.to_arrow().to_pylist()
    assert [row["prompt"] for row in rows] == prompts()
    for row, own in zip(rows, result.per_prompt, strict=True):
        for field in dataclasses.fields(own):
            value = getattr(own, field.name)
            assert row[field.name] == (list(value) if field.name == "group_ids" else value)
        assert row["direct"] + row["visitation"] == pytest.approx(row["delta_h1"], rel=1e-9)
    assert sum(row["delta_h1"] for row in rows) == pytest.approx(result.delta_h1, rel=1e-12)
    assert result.to_arrow().schema.metadata == {b"unit": result.unit.encode()}


def test_layers_and_parameters_add_up():
    result = full()
    for kind, name, shares in (("layers", "layer", result.by_layer), ("parameters", "parameter", result.by_parameter)):
        rows = result.to_arrow(kind).to_pylist()
        assert {row[name]: row["share"] for row in rows} == shares
        for part in ("direct", "visitation"):
            assert sum(row[part] for row in rows) == pytest.approx(getattr(result.split, part).value, rel=1e-9)


def test_rows_of_sequences_and_tokens_are_those_of_the_rollouts():
    result, batch = full(), rollouts()
    sequences = result.to_arrow("sequences").to_pylist()
    assert len(sequences) == batch.n_sequences
    lengths = batch.response_lengths.tolist()
    for row in sequences:
        assert row["counted"] == (lengths[row["row"]] > 0) == (row["group_id"] is not None)
        if row["counted"]:
            assert row["group_id"] == int(batch.group_ids[row["row"]])
            assert result.per_prompt[row["prompt_index"]].group_ids == (row["group_id"],)
    known = [row["sequence_logprob"] for row in sequences if row["counted"]]
    assert known == result.sequences["entropy"].sequence_logprobs.tolist()
    tokens = result.to_arrow("tokens").to_pylist()
    assert [[row["row"], row["column"]] for row in tokens] == batch.loss_mask.nonzero().tolist()
    for row in tokens:
        place = row["row"], row["column"]
        assert row["token_id"] == int(batch.input_ids[place])
        assert row["share"] == float(result.by_token[place])
        assert row["direct"] == float(result.split.direct.by_token[place])
        assert row["position"] == int(batch.loss_mask[row["row"], : row["column"]].sum())
    assert sum(row["share"] for row in tokens) == pytest.approx(result.delta_h1, rel=1e-9)


def test_shares_of_pairs_add_up_to_what_the_fresh_gradient_does():
    result = full()
    assert result.diagnostics.clip_factor < 1
    fresh = result.step_parts["fresh"]
    for part, forecast in (
        ("total", fresh.forecast),
        ("direct", fresh.split.direct),
        ("visitation", fresh.split.visitation),
    ):
        assert float(kernel_shares(result, part).nansum()) == pytest.approx(forecast.value, rel=1e-9)
    rows = result.to_arrow("kernel").to_pylist()
    for row in rows:
        pair = row["entropy_unit"], row["update_unit"]
        assert row["kernel"] == float(result.kernel[pair])
        assert (row["share"] is None) == (pair[0] == pair[1])
    blocks = static_blocks()
    assert [len(unit.group_ids) for unit in blocks.per_prompt] == [3, 2, 2]
    assert float(kernel_shares(blocks).nansum()) == pytest.approx(blocks.delta_h1, rel=1e-9)


def test_errors_are_those_of_the_diagnostics():
    result = bare()
    rows = result.to_arrow("errors").to_pylist()
    assert [row["method"] for row in rows] == [error.name for error in result.diagnostics.standard_errors]
    for row, error in zip(rows, result.diagnostics.standard_errors, strict=True):
        assert row["value"] == error.value or (row["value"] is None and math.isnan(error.value))


def test_what_is_not_known_is_null():
    rows = unknown_errors(full()).to_arrow("parts").to_pylist()
    assert all(row["std_error"] is row["low"] is row["high"] is None for row in rows)
    assert all(row["value"] is not None for row in rows)
    [total] = bare().to_arrow("parts").to_pylist()
    assert total["part"] == "total"
    assert bare().to_arrow("prompts")["direct"].null_count == len(bare().per_prompt)
    two = two_batches()
    assert [row["part"] for row in two.to_arrow("parts").to_pylist()] == ["direct"]
    prompts = two.to_arrow("prompts").to_pylist()
    assert [row["direct"] for row in prompts if row["role"] == "entropy"] == two.forecast.by_unit.tolist()
    tokens = two.to_arrow("tokens")
    assert tokens["visitation"].null_count == len(tokens) > 0
    assert sum(tokens["direct"].to_pylist()) == pytest.approx(two.forecast.value, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("step_parts", "step='next'"),
        ("updates", "updates="),
        ("functionals", "functionals="),
        ("sequences", "by_sequence=True"),
        ("tokens", "by_token=True"),
        ("kernel", "full_kernel=True"),
    ],
)
def test_what_is_lacking_is_an_error_that_names_the_option(kind, option):
    with pytest.raises(ResultError, match="does not hold") as caught:
        bare().to_arrow(kind)
    assert option in caught.value.fix


@pytest.mark.parametrize(
    ("kind", "option"),
    [("layers", "engine='one_pass'"), ("kernel", "entropy_rollouts out"), ("sequences", "by_sequence")],
)
def test_what_two_batches_lack(kind, option):
    with pytest.raises(ResultError) as caught:
        two_batches().to_arrow(kind)
    assert option in caught.value.fix


def test_parts_are_named():
    assert part_of(full(), None)[0] == "total" and part_of(two_batches(), None)[0] == "direct"
    with pytest.raises(ResultError, match="visitation"):
        part_of(two_batches(), "visitation")
    with pytest.raises(ResultError, match="rao_blackwell"):
        part_of(bare(), "direct")
    with pytest.raises(ConfigError, match="use one of total, direct, visitation"):
        part_of(full(), "momentum")


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"'gradients'.*\n.*use one of parts, prompts"):
        full().to_arrow("gradients")


def test_data_frames_are_the_tables():
    result = unknown_errors(full())
    for kind in ("prompts", "parts", "tokens", "kernel"):
        table, frame = result.to_arrow(kind), result.to_dataframe(kind)
        assert frame.attrs == {"unit": result.unit}
        assert list(frame.columns) == table.column_names
        for name in table.column_names:
            if pa.types.is_floating(table[name].type):
                expected = torch.tensor([math.nan if v is None else v for v in table[name].to_pylist()])
                assert torch.equal(torch.tensor(frame[name].to_numpy()).isnan(), expected.isnan())
                assert frame[name].dropna().tolist() == table[name].drop_null().to_pylist()
            elif name != "group_ids":
                assert frame[name].tolist() == table[name].to_pylist()


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    for package in ("pandas", "xarray"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="pandas is not installed") as caught:
        full().to_dataframe("prompts")
    assert caught.value.fix == "pip install pandas, or take to_arrow."
    with pytest.raises(ImportError, match="xarray is not installed"):
        full().to_xarray()
    assert len(full().to_arrow("prompts")) == 5


def test_the_kernel_with_its_coordinates():
    result = full()
    found = result.to_xarray()
    assert torch.equal(torch.tensor(found["kernel"].to_numpy()), result.kernel)
    assert float(found["share"].sum()) == pytest.approx(result.step_parts["fresh"].forecast.value, rel=1e-9)
    assert found["update_prompt"].to_numpy().tolist() == prompts()
    assert found["share"].attrs["units"] == result.unit
