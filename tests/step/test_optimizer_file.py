"""Adam state from files: matched to the model by order and shape, and never by running what is in the file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from probe_oracle import models
from torch import nn

from entropy_fast.errors import OptimizerStateError
from entropy_fast.step import AdamState, adam_state_from_file


class Interleaved(nn.Module):
    """Biases and norms between the matrices, several parameters of the same shape: order alone tells them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.some_norm = nn.LayerNorm(4)
        self.second = nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.third = nn.Linear(4, 4)
        self.rms_norm = nn.ParameterDict({"weight": nn.Parameter(torch.ones(4))})


def assert_same(found: AdamState, expected: AdamState) -> None:
    assert found.groups == expected.groups
    assert dict(found.group_of) == dict(expected.group_of)
    assert found.moments.keys() == expected.moments.keys()
    for name, moments in expected.moments.items():
        assert found.moments[name].step == moments.step
        assert torch.equal(found.moments[name].second_moment, moments.second_moment), name


def randomly_stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def saved(optimizer: torch.optim.Optimizer, folder: Path) -> Path:
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder / "optimizer.pt"


@pytest.mark.parametrize("amsgrad", [False, True])
def test_one_group_in_the_order_of_the_model(tmp_path: Path, amsgrad: bool) -> None:
    model = Interleaved()
    optimizer = randomly_stepped(model, torch.optim.AdamW(model.parameters(), lr=2e-4, amsgrad=amsgrad))
    assert_same(adam_state_from_file(saved(optimizer, tmp_path), model), AdamState.from_optimizer(optimizer, model))


def test_frozen_parameters_are_not_counted(tmp_path: Path) -> None:
    model = Interleaved()
    model.second.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    randomly_stepped(model, optimizer)
    found = adam_state_from_file(str(saved(optimizer, tmp_path)), model)  # a plain string will do
    assert_same(found, AdamState.from_optimizer(optimizer, model))
    assert "second.weight" not in found.group_of


def trainer_optimizer(model: nn.Module, folder: Path) -> torch.optim.Optimizer:
    """What transformers' own Trainer makes for this model: matrices with weight decay, biases and norms without."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, weight_decay=0.1, report_to=[], optim="adamw_torch"
    )
    return transformers.Trainer(model=model, args=arguments).create_optimizer()  # type: ignore[no-any-return]


@pytest.mark.parametrize("make", [Interleaved, models.tiny_transformer, models.qwen2, models.gpt2])
def test_the_two_groups_of_transformers_trainer(tmp_path: Path, make: Any) -> None:
    model = make()
    optimizer = randomly_stepped(model, trainer_optimizer(model, tmp_path))
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    assert len(sizes) == 2
    assert min(sizes) > 0
    found = adam_state_from_file(saved(optimizer, tmp_path), model)
    assert_same(found, AdamState.from_optimizer(optimizer, model))


def test_the_trainers_order_is_not_the_models_order() -> None:
    """Else the test above would pass for a reader that simply counts."""
    model = Interleaved()
    decayed = [name for name, p in model.named_parameters() if p.dim() == 2 or name == "scale"]
    assert decayed != [name for name, _ in model.named_parameters()][: len(decayed)]


def test_groups_that_are_consecutive_slices(tmp_path: Path) -> None:
    model = Interleaved()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "lr": 1e-3}, {"params": parameters[3:], "lr": 5e-3, "eps": 1e-5}]
    optimizer = randomly_stepped(model, torch.optim.AdamW(groups))
    assert_same(adam_state_from_file(saved(optimizer, tmp_path), model), AdamState.from_optimizer(optimizer, model))


def test_names_in_the_file_win_over_any_order(tmp_path: Path) -> None:
    model = Interleaved()
    reversed_order = list(model.named_parameters())[::-1]
    optimizer = randomly_stepped(model, torch.optim.AdamW(reversed_order))
    path = saved(optimizer, tmp_path)
    assert "param_names" in torch.load(path, weights_only=True)["param_groups"][0]
    assert_same(adam_state_from_file(path, model), AdamState.from_optimizer(optimizer, model))


def test_parameters_that_were_never_stepped_have_no_moments(tmp_path: Path) -> None:
    model = Interleaved()
    optimizer = torch.optim.AdamW(model.parameters())
    model.first.weight.grad = torch.ones(4, 4)
    optimizer.step()
    found = adam_state_from_file(saved(optimizer, tmp_path), model)
    assert set(found.moments) == {"first.weight"}
    assert len(found.group_of) == len(list(model.parameters()))


def test_another_number_of_parameters_is_refused_with_both_counts(tmp_path: Path) -> None:
    model = Interleaved()
    path = saved(randomly_stepped(model, torch.optim.AdamW(model.parameters())), tmp_path)
    model.scale.requires_grad_(False)
    with pytest.raises(OptimizerStateError, match="covers 9 parameters, the model has 8 trainable ones"):
        adam_state_from_file(path, model)


def test_other_shapes_are_refused_with_name_and_shapes(tmp_path: Path) -> None:
    wide, narrow = nn.Linear(5, 3), nn.Linear(3, 3)
    path = saved(randomly_stepped(wide, torch.optim.AdamW(wide.parameters())), tmp_path)
    with pytest.raises(OptimizerStateError, match=r"entry 0 has shape \[3, 5\] where 'weight' has \[3, 3\]"):
        adam_state_from_file(path, narrow)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_files_of_other_optimizers_are_refused(tmp_path: Path, momentum: float) -> None:
    model = Interleaved()
    path = saved(randomly_stepped(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)), tmp_path)
    with pytest.raises(OptimizerStateError, match=r"momentum_buffer|betas and eps"):
        adam_state_from_file(path, model)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptimizerStateError, match="does not exist"):
        adam_state_from_file(tmp_path / "none.pt", Interleaved())
    with pytest.raises(OptimizerStateError, match="cannot be read"):
        adam_state_from_file(tmp_path, Interleaved())


@pytest.mark.filterwarnings("ignore")  # torch remarks on the formats it tries
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an optimizer",
        b"\0" * 500,
        b"PK\x03\x04 and no archive",
        b"\x80\x02K\x00" + b"junk" * 9,
        b"0" * 20,  # "pop": an unpickler with an empty stack raises IndexError
        b"l.",
        pickle.dumps(3),
    ],
)
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "optimizer.pt"
    path.write_bytes(content)
    with pytest.raises(OptimizerStateError, match=r"cannot be read|expected 'state'"):
        adam_state_from_file(path, Interleaved())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kept", [10, 100, 0.5, 0.99])
@pytest.mark.parametrize("archive", [True, False])
def test_truncated_files_are_refused(tmp_path: Path, kept: float, archive: bool) -> None:
    model = Interleaved()
    optimizer = randomly_stepped(model, torch.optim.AdamW(model.parameters()))
    path = tmp_path / "optimizer.pt"
    torch.save(optimizer.state_dict(), path, _use_new_zipfile_serialization=archive)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept if kept >= 1 else kept * len(content))])
    with pytest.raises(OptimizerStateError, match="cannot be read"):
        adam_state_from_file(path, model)


def test_the_old_file_format_has_no_checksums_and_is_read_once_rewritten(tmp_path: Path) -> None:
    model, path = Interleaved(), tmp_path / "old.pt"
    optimizer = randomly_stepped(model, torch.optim.AdamW(model.parameters()))
    torch.save(optimizer.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(OptimizerStateError, match=r"before 1\.6 has no checksums"):
        adam_state_from_file(path, model)
    torch.save(torch.load(path, weights_only=True), path)
    assert_same(adam_state_from_file(path, model), AdamState.from_optimizer(optimizer, model))


@pytest.mark.parametrize(
    "content",
    [
        None,
        [1, 2],
        {"state": {}},
        {"state": {}, "param_groups": None},
        {"state": {}, "param_groups": [{"lr": 1.0}]},
        {"state": {}, "param_groups": [{"params": 9}]},
        {"state": [], "param_groups": [{"params": list(range(9))}]},
        {"state": {0: None}, "param_groups": [{"params": list(range(9))}]},
        {"state": {}, "param_groups": []},
        {"state": {}, "param_groups": [{"params": list(range(9)), "lr": "fast", "betas": (0.9, 0.99), "eps": 1e-8}]},
        {"state": {}, "param_groups": [{"params": list(range(9)), "lr": 1.0, "betas": 0.9, "eps": 1e-8}]},
    ],
)
def test_tensors_files_that_hold_something_else_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError):
        adam_state_from_file(tmp_path / "optimizer.pt", Interleaved())


def renumbered(key: Any, twice: bool = False) -> Any:
    def change(content: dict[str, Any]) -> None:
        content["state"][key] = content["state"].pop(3)
        if twice:
            content["param_groups"][0]["params"][4] = key

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renumbered("3"), "'state' has an entry for '3', which no parameter group lists"),
        (renumbered(99), "'state' has an entry for 99, which no"),
        (renumbered(3.0), r"'state' has an entry for 3\.0, which no"),
        (renumbered((1, 2)), r"'state' has an entry for \[1, 2\], which no"),
        (renumbered(5, twice=True), "parameter 5 is listed twice"),
        (renumbered("3", twice=True), "some parameters are listed by number and others by name"),
        (renumbered(True, twice=True), "lists no numbers or names as 'params'"),
    ],
)
def test_entries_and_lists_that_do_not_belong_together_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    """An entry that no group lists would leave its parameter without second moments, in silence."""
    model = Interleaved()
    content = randomly_stepped(model, torch.optim.AdamW(model.parameters())).state_dict()
    change(content)
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(OptimizerStateError, match=message):
        adam_state_from_file(tmp_path / "optimizer.pt", model)


class Malicious:
    """Unpickles by writing a file: harmless here, and proof that code ran."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.proof)!r}, 'w').close()",)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_file_that_would_run_code_is_refused_and_its_code_does_not_run(
    tmp_path: Path, archive: bool, inside: bool
) -> None:
    model, proof = Interleaved(), tmp_path / "code_has_run"
    optimizer = randomly_stepped(model, torch.optim.AdamW(model.parameters()))
    content: Any = {**optimizer.state_dict(), "extra": Malicious(proof)} if inside else Malicious(proof)
    path = tmp_path / "optimizer.pt"
    torch.save(content, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(OptimizerStateError, match="cannot be read as plain tensors"):
        adam_state_from_file(path, model)
    assert not proof.exists()
    # The one unsafe load of the project, on purpose and of a file this test wrote: without it the refusal above could be that
    # of a harmless file.
    torch.load(path, weights_only=False)
    assert proof.exists()


def test_a_plain_pickle_that_would_run_code_is_refused_too(tmp_path: Path) -> None:
    proof = tmp_path / "code_has_run"
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Malicious(proof)))
    with pytest.raises(OptimizerStateError, match="cannot be read as plain tensors"):
        adam_state_from_file(tmp_path / "optimizer.pt", Interleaved())
    assert not proof.exists()
