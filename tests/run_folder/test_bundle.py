"""A training step, kept: its forecast is repeated from files alone, and what is not whole is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from probe_models.architectures import add_lora, build_model, quantize_nf4
from probe_models.batches import make_rollouts
from safetensors.torch import load_file
from torch import Tensor, nn

from entropy_fast import EstimateOptions, Rollouts, RunOptions, fast_delta_h1
from entropy_fast.cli.app import run
from entropy_fast.columns import TokenScores
from entropy_fast.errors import BundleError, ConfigError, EntropyFastError, OptimizerStateError, RunFolderError
from entropy_fast.estimates.result import DeltaH1Result
from entropy_fast.run_folder import bundle as bundles
from entropy_fast.run_folder.bundle import read_bundle, write_bundle
from entropy_fast.run_folder.manifest import read_manifest

ESTIMATE = EstimateOptions(gradient="live", step="next")
FACTS = {"loss": "grpo", "lr": 1e-3, "temperature": 1.0, "clip": [0.2, 0.2]}


def batch() -> Rollouts:
    """Left padding, groups that take turns, a hole in a loss mask, a row without a response, and every optional field."""
    rollouts = make_rollouts((3, 3, 2, 2))
    mask = rollouts.loss_mask.clone()
    longest, shortest = int(rollouts.response_lengths.argmax()), int(rollouts.response_lengths.argmin())
    mask[longest, mask[longest].nonzero()[1]] = 0
    mask[shortest] = 0
    old = torch.where(mask == 1, -torch.rand(mask.shape) - 4, 0.0)
    texts = [f"prompt {k}" for k in range(rollouts.n_prompts)]
    return dataclasses.replace(rollouts, loss_mask=mask, old_logprobs=old, prompts=texts)


def scored(model: nn.Module, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies [N, T] with their graph, in the tokens' columns."""
    places = (rollouts.attention_mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": rollouts.input_ids, "attention_mask": rollouts.attention_mask, "position_ids": places}
    logp = model(**inputs).logits[:, :-1].log_softmax(-1)
    mask = rollouts.loss_mask[:, 1:] == 1
    s = logp.gather(-1, rollouts.input_ids[:, 1:, None]).squeeze(-1)
    tables = (torch.where(mask, table, 0.0) for table in (s, -(logp.exp() * logp).sum(-1)))
    s, h = (nn.functional.pad(table, (1, 0)) for table in tables)
    return s, h


def grpo(s: Tensor, h: Tensor, rollouts: Rollouts) -> Tensor:
    mask = rollouts.loss_mask
    ratios = (s - rollouts.old_logprobs).clamp(-2, 2).exp()  # some are clipped
    advantages = rollouts.advantages[:, None].to(s)
    return -((ratios * advantages + 0.05 * h) * mask).sum() / mask.sum()


class Step:
    """A step just before ``optimizer.step()``, its forecast, and how to keep it."""

    def __init__(self, model: nn.Module, base: str | None = None, estimate: EstimateOptions = ESTIMATE) -> None:
        self.rollouts, self.model, self.estimate = batch(), model, estimate
        trainable = [p for p in model.parameters() if p.requires_grad]
        # Groups against the model's order: numbers alone would not say whose state is whose.
        groups = [{"params": trainable[1::2][::-1], "weight_decay": 0.0}, {"params": trainable[::2], "lr": 5e-4}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
        for last in (False, False, False, True):
            self.optimizer.zero_grad()
            s, h = scored(model, self.rollouts)
            loss = grpo(s, h, self.rollouts)
            self.coefficients = tuple(-g for g in torch.autograd.grad(loss, (s, h), retain_graph=True))
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 0.5)
            if not last:
                self.optimizer.step()
        assert 4 < len(self.coefficients[0].unique()) < int(self.rollouts.loss_mask.sum())
        self.scores = TokenScores(s.detach(), h.detach())
        self.base = base

    def forecast(self, estimate: EstimateOptions | None = None) -> DeltaH1Result:
        return fast_delta_h1(
            self.model,
            self.optimizer,
            self.rollouts,
            coefficients=self.coefficients,
            estimate=estimate or self.estimate,
        )

    def keep(self, folder: Path, **options: object) -> Path:
        given = {
            "model": self.model,
            "optimizer": self.optimizer,
            "rollouts": self.rollouts,
            "coefficients": self.coefficients,
            "estimate": self.estimate,
            "run": RunOptions(),
            "step": 7,
            "facts": FACTS,
            "base_model": self.base,
        }
        return write_bundle(folder, **(given | options))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    build_model("qwen2").save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def steps(base: str) -> dict[str, Step]:
    torch.manual_seed(0)
    whole = build_model("qwen2")
    whole.model.layers[0].mlp.requires_grad_(False)
    return {"model": Step(whole), "adapter": Step(add_lora(build_model("qwen2")), base)}


@pytest.fixture(scope="module")
def stored(steps: dict[str, Step], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("kept")
    return {
        kind: step.keep(place / kind, result=step.forecast(), scores=step.scores, tokenizer=None)
        for kind, step in steps.items()
    }


def probed(folder: Path, out: Path, *options: str) -> dict:
    assert run(["probe", str(folder), "--out", str(out), "--no-picture", *options]) == 0
    return json.loads((out / "result.json").read_text())


@pytest.mark.filterwarnings("ignore::entropy_fast.errors.EntropyFastWarning")
@pytest.mark.parametrize("kind", ["model", "adapter"])
@pytest.mark.parametrize("change", [{}, {"sample": 3}, {"gradient": "rollouts"}], ids=str)
def test_the_number_found_online_is_found_again(steps, stored, tmp_path, kind, change):
    online = steps[kind].forecast(dataclasses.replace(ESTIMATE, **change))
    options = [word for name, value in change.items() for word in (f"--{name}", str(value))]
    offline = probed(stored[kind], tmp_path, *options)
    assert online.delta_h1 != 0 and online.geometry == offline["geometry"] == "next_step"
    assert offline["delta_h1"] == pytest.approx(online.delta_h1, rel=1e-6)
    assert offline["std_error"] == pytest.approx(online.std_error, rel=1e-5)
    for part in ("direct", "visitation", "total"):
        assert offline["split"][part]["value"] == pytest.approx(getattr(online.split, part).value, rel=1e-6)
    if not change:
        kept = read_bundle(stored[kind]).online
        assert (kept["delta_h1"], kept["split"]["direct"]) == (online.delta_h1, online.split.direct.value)
    if change.get("gradient") is None:
        agreement = online.diagnostics.live_gradient
        found = offline["diagnostics"]["live_gradient"]
        assert found["cosine"] == pytest.approx(agreement.cosine, rel=1e-6)
        assert found["scale"] == pytest.approx(agreement.scale, rel=1e-5)
        if not change:  # the coefficients are those of the loss
            assert agreement.cosine == pytest.approx(1, abs=1e-5)


def test_everything_comes_back(steps, stored):
    for kind, step in steps.items():
        bundle = read_bundle(stored[kind])
        assert (bundle.step, bundle.facts) == (7, FACTS)
        rollouts, given = bundle.read_rollouts(), step.rollouts
        assert rollouts.group_ids.tolist() == given.group_ids.tolist() and rollouts.prompts == given.prompts
        assert torch.equal(rollouts.advantages, given.advantages.double())
        assert rollouts.response_lengths.tolist() == given.response_lengths.tolist()
        here, there = rollouts.loss_mask == 1, given.loss_mask == 1
        assert torch.equal(rollouts.old_logprobs[here], given.old_logprobs[there].double())
        found, scores = bundle.coefficients(rollouts), bundle.scores(rollouts)
        for own, other in zip((*found, scores.logprobs), (*step.coefficients, step.scores.logprobs), strict=True):
            assert torch.equal(own[here], other[there].double()) and not own[~here].any()
        model, state = bundle.load()
        named = dict(model.named_parameters())
        for name, parameter in step.model.named_parameters():
            assert torch.equal(named[name], parameter) and named[name].requires_grad == parameter.requires_grad
            if parameter.requires_grad:
                assert torch.equal(named[name].grad, parameter.grad)
                kept = step.optimizer.state[parameter]
                assert torch.equal(state.moments[name].second_moment, kept["exp_avg_sq"])
                assert torch.equal(state.moments[name].first_moment, kept["exp_avg"])


def test_mixed_dtypes_come_back(tmp_path, base):
    model = add_lora(build_model("qwen2").to(torch.bfloat16))
    for part in (model.get_base_model().model.norm, model.get_base_model().lm_head):
        part.float()  # as preparing for quantised training does
    step = Step(model, base)
    step.keep(tmp_path / "kept")
    loaded, _ = read_bundle(tmp_path / "kept").load()
    for own, other in ((loaded.named_parameters, model.named_parameters), (loaded.named_buffers, model.named_buffers)):
        assert {n: t.dtype for n, t in own()} == {n: t.dtype for n, t in other()}


def test_the_optimizer_is_read_as_plain_tensors(stored, monkeypatch, tmp_path):
    seen, load = [], torch.load

    def watched(*arguments, **options):
        seen.append(options.get("weights_only"))
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", watched)
    read_bundle(stored["adapter"]).load()
    assert seen == [True]
    assert "param_names" in load(stored["adapter"] / "optimizer.pt", weights_only=True)["param_groups"][0]


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_flipped_byte_in_any_file_is_refused(stored, tmp_path, kind, capsys):
    folder = Path(shutil.copytree(stored[kind], tmp_path / "step"))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert {"manifest.json", "run.json", "gradient.safetensors", "coefficients.parquet"} <= {p.name for p in files}
    for path in files:
        content = path.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(BundleError, match=path.name):
                read_bundle(folder)
        assert run(["probe", str(folder), "--out", str(tmp_path / "out")]) != 0
        path.unlink()
        with pytest.raises(BundleError, match=path.name):
            read_bundle(folder)
        path.write_bytes(content)
    assert not (tmp_path / "out").exists()
    read_bundle(folder)
    (folder / kind / "added.bin").write_bytes(b"")
    with pytest.raises(BundleError, match=r"added\.bin was not in it"):
        read_bundle(folder)


def test_a_folder_without_its_manifest_is_refused(stored, tmp_path, capsys):
    folder = Path(shutil.copytree(stored["adapter"], tmp_path / "step"))
    (folder / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"no manifest\.json, which is written last"):
        read_bundle(folder)
    assert run(["probe", str(folder)]) != 0
    assert "manifest.json" in capsys.readouterr().err


def test_the_other_commands_take_it(stored, tmp_path):
    folder = str(stored["adapter"])
    assert run(["doctor", folder]) == 0
    out = tmp_path / "out"
    assert run(["validate", folder, "--etas", "0.1", "--no-picture", "--out", str(out)]) == 0
    (found,) = json.loads((out / "validation.json").read_text())["runs"].values()
    assert found["slope"] == pytest.approx(1, abs=0.05)


def test_files_of_another_step_are_refused(stored, tmp_path, capsys):
    other = str(stored["model"] / "rollouts.parquet")
    assert run(["probe", str(stored["adapter"]), "--rollouts", other, "--out", str(tmp_path / "out")]) != 0
    assert "belong to its own files" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["write_rollouts", "save_file", "write_token_tables", "write_manifest", "rendered"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(steps, tmp_path, monkeypatch, where, error):
    def stop(*arguments, **options):
        raise error("stopped")

    monkeypatch.setattr(bundles, where, stop)
    with pytest.raises((KeyboardInterrupt, EntropyFastError)):
        steps["adapter"].keep(tmp_path / "runs" / "step")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_a_folder_is_not_replaced(steps, tmp_path):
    (tmp_path / ".tmp-folder-1").mkdir()
    folder = steps["adapter"].keep(tmp_path / "step")
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(RunFolderError, match="is there already"):
        steps["adapter"].keep(folder)
    read_bundle(folder)


def test_a_base_that_has_changed_is_said(steps, stored, base, tmp_path, capsys):
    probed(stored["adapter"], tmp_path / "out")
    assert "online: " in (shown := capsys.readouterr().out) and "has the base model changed" not in shown
    build_model("qwen2", seed=1).save_pretrained(str(tmp_path / "other"))
    probed(stored["adapter"], tmp_path / "out", "--model", str(tmp_path / "other"))
    assert "has the base model changed" in capsys.readouterr().out


def test_what_could_not_be_repeated_is_refused(steps, tmp_path):
    step, folder = steps["adapter"], tmp_path / "step"
    named = [p for p in step.model.parameters() if p.requires_grad]
    with pytest.raises(
        OptimizerStateError,
        match=r"torch\.optim\.sgd\.SGD; a step is kept with the state of torch\.optim\.Adam or AdamW",
    ):
        step.keep(folder, optimizer=torch.optim.SGD(named))
    with pytest.raises(BundleError, match="is not the optimizer's"):
        step.keep(folder, optimizer=torch.optim.AdamW(named[1:]))
    with pytest.raises(BundleError, match="no JSON"):
        step.keep(folder, facts={"lr": torch.tensor(1.0)})
    with pytest.raises(ConfigError, match="coefficients have shape"):
        step.keep(folder, coefficients=(step.coefficients[0][:, :-1], None))
    other = add_lora(build_model("qwen2"))
    other.get_base_model().model.norm.requires_grad_(True)
    optimizer = torch.optim.AdamW(p for p in other.parameters() if p.requires_grad)
    with pytest.raises(BundleError, match="no part of the adapter"):
        step.keep(folder, model=other, optimizer=optimizer)
    other.get_base_model().model.norm.requires_grad_(False)
    with pytest.raises(BundleError, match=r"no trainable parameter has a \.grad"):
        step.keep(folder, model=other, optimizer=torch.optim.AdamW(p for p in other.parameters() if p.requires_grad))
    quantised = add_lora(quantize_nf4(build_model("qwen2")))
    with pytest.raises(BundleError, match="how they were quantised"):
        step.keep(
            folder, model=quantised, optimizer=torch.optim.AdamW(p for p in quantised.parameters() if p.requires_grad)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_step_left_open_is_kept_as_the_one_that_was_forecast(steps, tmp_path):
    folder = steps["adapter"].keep(tmp_path / "step", estimate=EstimateOptions(gradient="live"))
    manifest = read_manifest(folder)
    assert manifest.estimate.step == "next"
    assert manifest.gradient == "gradient.safetensors" and len(load_file(folder / manifest.gradient))
    assert json.loads((folder / "run.json").read_text())["schema"] == "entropy_fast.run/3"
