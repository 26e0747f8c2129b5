"""Forwards with tangents: the rules beside torch's, what they hold in memory, and operations that have no rule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from probe_models.architectures import add_lora, build_model, enable_checkpointing, quantize_nf4, stepped_adamw
from probe_models.batches import make_rollouts
from probe_models.cases import Case, case_of
from probe_models.snapshot import assert_unchanged, take_snapshot
from probe_options import options_of
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel

from entropy_fast import DeltaH1Result, OfflineEntropyProbe, fast_delta_h1, reference
from entropy_fast.engines.forward_mode import functions, output
from entropy_fast.engines.forward_mode.forward import ForwardWithTangents
from entropy_fast.engines.forward_mode.functions import FunctionsWithTangents
from entropy_fast.engines.forward_mode.quantized import quantized_modules, quantized_with_tangents
from entropy_fast.errors import ForwardDerivativeError
from entropy_fast.ways.teacher_forcing import OutputLayer, pad_rows


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextlib.contextmanager
def rules() -> Iterator[None]:
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), FunctionsWithTangents():
        yield


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, dim=1) for t in (key, value))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("block", [1, 3, 1000], ids="{} queries at a time".format)
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "one row", "float with a tangent"])
def test_attention_by_blocks_of_queries(mask: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    n, heads, length, keys, width = 2, 4, 7, 7 if mask == "causal" else 9, 8
    monkeypatch.setattr(functions, "_SCORE_BYTES", block * n * heads * keys * 8)
    monkeypatch.setattr(functions, "_FEWEST_QUERIES", 1)
    inputs = [draw(n, heads, length, width, seed=1), draw(n, 2, keys, width, seed=2), draw(n, 2, keys, width, seed=3)]
    tangents = [draw(*t.shape, seed=10 + k) for k, t in enumerate(inputs)]
    chosen: Tensor | None = None
    if mask == "bool":
        chosen = draw(n, 1, length, keys, seed=4) > -0.5
    elif mask == "one row":
        chosen = draw(n, 1, 1, keys, seed=4) > -0.5
    elif mask.startswith("float"):
        chosen = draw(n, heads, length, keys, seed=4)
        inputs.append(chosen)
        tangents.append(draw(*chosen.shape, seed=14))
    causal = mask == "causal"

    def by_hand(query: Tensor, key: Tensor, value: Tensor, float_mask: Tensor | None = None) -> Tensor:
        return attention_by_hand(query, key, value, chosen if float_mask is None else float_mask, causal)

    expected, derivative = torch.func.jvp(by_hand, tuple(inputs), tuple(tangents))
    with rules():
        duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, tangents, strict=True)]
        found = F.scaled_dot_product_attention(
            *duals[:3], attn_mask=duals[3] if len(duals) > 3 else chosen, is_causal=causal, enable_gqa=True
        )
        value, along = forward_ad.unpack_dual(found)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(along, derivative, rtol=1e-11, atol=1e-11)


def test_queries_without_keys_are_zero_with_a_derivative_of_zero() -> None:
    query, key = draw(1, 1, 3, 4, seed=1), draw(1, 1, 3, 4, seed=2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]]).bool()
    with rules():
        found = F.scaled_dot_product_attention(forward_ad.make_dual(query, key), key, key, attn_mask=mask)
        value, along = forward_ad.unpack_dual(found)
    assert value[0, 0, 1].tolist() == along[0, 0, 1].tolist() == [0.0] * 4
    assert along[0, 0, 0].abs().min() > 0


def test_the_padding_row_of_a_look_up_is_a_constant() -> None:
    index = torch.tensor([[3, 0, 1], [0, 2, 2]])
    for padding in (0, -5, None):
        table = nn.Embedding(5, 4, padding_idx=padding, dtype=torch.float64)
        direction, upstream = draw(5, 4, seed=1), draw(2, 3, 4, seed=2)
        table(index).backward(upstream)
        expected = float((table.weight.grad * direction).sum())
        with rules():
            dual = forward_ad.make_dual(table.weight.detach(), direction)
            along = forward_ad.unpack_dual(F.embedding(index, dual, padding)).tangent
        assert float((along * upstream).sum()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", ["nothing", "weight", "bias", "both"])
@pytest.mark.parametrize("block_bytes", [1, 2**24], ids=["several blocks", "one block"])
def test_derivatives_at_the_output_layer(
    block_bytes: int, trained: str, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "_BLOCK_BYTES", block_bytes)
    rows, width, vocabulary = 9, 6, 203
    hidden, weight, bias = draw(rows, width, seed=1), draw(vocabulary, width, seed=2), draw(vocabulary, seed=3)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(4))
    of_hidden = draw(rows, width, seed=5)
    of_weight = draw(vocabulary, width, seed=6) if trained in ("weight", "both") else None
    of_bias = draw(vocabulary, seed=7) if trained in ("bias", "both") else None

    def values(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        found = reference.linear_token_logprobs(h, w, targets, bias=b, softcap=softcap, want_entropy=True)
        assert found.entropy is not None
        return found.logprob, found.entropy

    directions = (
        of_hidden,
        *(torch.zeros_like(t) if d is None else d for t, d in ((weight, of_weight), (bias, of_bias))),
    )
    expected, derivatives = torch.func.jvp(values, (hidden, weight, bias), directions)
    layer = OutputLayer(nn.Identity(), weight, bias, softcap)
    with rules():
        dual = forward_ad.make_dual(hidden, of_hidden)
        results = [output.derivatives_of_hidden(dual, layer, targets, of_weight, of_bias, want_entropies=True)]
        without = output.derivatives_of_hidden(dual, layer, targets, of_weight, of_bias, want_entropies=False)
        if softcap is None:
            pairs = ((weight, of_weight), (bias, of_bias))
            logits = F.linear(dual, *(t if d is None else forward_ad.make_dual(t, d) for t, d in pairs))
            results.append(output.derivatives_of_logits(logits, targets, want_entropies=True))
    for found in results:
        torch.testing.assert_close((found.logprobs, found.entropies), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close((found.of_logprobs, found.of_entropies), derivatives, rtol=1e-11, atol=1e-11)
    assert (without.entropies, without.of_entropies) == (None, None)
    torch.testing.assert_close(without.of_logprobs, derivatives[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("off", [0.05, -0.05])
def test_lse_and_entropy_of_logits_that_were_rounded_otherwise(off: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep the exponentials in range, and what is added up does not depend on them."""
    hidden, weight = draw(9, 6, seed=1), draw(203, 6, seed=2)
    targets = torch.randint(203, (9,), generator=torch.Generator().manual_seed(4))
    layer = OutputLayer(nn.Identity(), weight, None, None)
    whole = output.linear_token_logprobs_with_units

    def rounded(*arguments: object, **named: object) -> object:
        found = whole(*arguments, **named)
        return found._replace(lse=found.lse + off, entropy=found.entropy - 2 * off)

    def derivatives() -> tuple[Tensor, Tensor]:
        with rules():
            dual = forward_ad.make_dual(hidden, draw(9, 6, seed=5))
            found = output.derivatives_of_hidden(dual, layer, targets, draw(203, 6, seed=6), None, want_entropies=True)
        return found.of_logprobs, found.of_entropies

    expected = derivatives()
    monkeypatch.setattr(output, "linear_token_logprobs_with_units", rounded)
    torch.testing.assert_close(derivatives(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias_moves", [False, True])
def test_quantised_linear_maps(bits: int, bias_moves: bool) -> None:
    """The derivative is that of the module's own backward; the value is the module's own to the bit."""
    plain = nn.Linear(64, 48)
    if bits == 4:
        module = bitsandbytes.nn.Linear4bit(64, 48, compute_dtype=torch.float32, quant_type="nf4")
        module.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    else:
        module = bitsandbytes.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
        module.weight = bitsandbytes.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
    module = module.to("cpu").train()
    module.bias = nn.Parameter(plain.bias.data, requires_grad=bias_moves)
    x, of_x, of_bias = (draw(*s, seed=k).float() for k, s in enumerate([(2, 5, 64), (2, 5, 64), (48,)]))
    upstream = draw(2, 5, 48, seed=9).float()
    leaf = x.clone().requires_grad_()
    expected = module(leaf)
    expected.backward(upstream)
    product = float((leaf.grad * of_x).sum()) + (float((module.bias.grad * of_bias).sum()) if bias_moves else 0.0)
    found = quantized_modules(nn.Sequential(plain, module))
    assert found == [module]
    along = {id(module.bias): of_bias} if bias_moves else {}
    before = dict(vars(module))
    with rules(), quantized_with_tangents(found, along):
        value, tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, of_x)))
    assert vars(module).keys() == before.keys()
    assert torch.equal(value, expected)
    assert float((tangent * upstream).sum()) == pytest.approx(product, rel=1e-4)


class LiveBytes(TorchDispatchMode):
    """The most bytes that results of operations held at one time; storages that were there before are not counted."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known = {t.untyped_storage()._cdata for t in known}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._live = {k: (ref, size) for k, (ref, size) in self._live.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def deep_model(layers: int) -> nn.Module:
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=layers, n_head=4, n_positions=64, attn_implementation="sdpa")
    return GPT2LMHeadModel(config)


def peaks(layers: int) -> tuple[int, int]:
    """Live bytes of a forward with tangents, and of an ordinary forward with its graph."""
    model = deep_model(layers)
    # Without no_grad in the forward with tangents, this alone would make it keep a graph.
    model.enable_input_require_grads()
    rollouts = make_rollouts((4, 4))
    batch = pad_rows(rollouts, torch.arange(8), torch.device("cpu"))
    parameters = list(model.parameters())
    forward = ForwardWithTangents(model, parameters, contextlib.nullcontext, batch)
    direction = [torch.ones_like(p) for p in parameters]
    known = [*parameters, *direction, *model.buffers()]
    with LiveBytes(known) as along:
        forward.run(batch, direction)
    with LiveBytes(known) as graph:
        output_of_graph = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert output_of_graph.logits.requires_grad
    return along.peak, graph.peak


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    """2 layers and 8 of the same width; the meter sees the graph of an ordinary forward grow."""
    (shallow, shallow_graph), (deep, deep_graph) = peaks(2), peaks(8)
    assert deep_graph > 2.5 * shallow_graph
    assert deep <= 1.01 * shallow
    assert deep < 0.5 * deep_graph


class Undifferentiated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


torch.library.define("entropy_fast_test_tangents::halve", "(Tensor x) -> Tensor")
torch.library.impl("entropy_fast_test_tangents::halve", "CPU", lambda x: 0.5 * x)
torch.library.register_autograd("entropy_fast_test_tangents::halve", lambda ctx, gradient: 0.5 * gradient)


class Replaced(nn.Module):
    """An activation with something done to it."""

    def __init__(self, inner: nn.Module, what: str) -> None:
        super().__init__()
        self.inner, self.what = inner, what

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        if self.what == "function":
            return Undifferentiated.apply(x)
        if self.what == "operator":
            return y + 1e-3 * torch.cdist(x, x).mean()
        if self.what == "custom operator":
            return torch.ops.entropy_fast_test_tangents.halve(y)
        if self.what == "no_grad":
            with torch.no_grad():
                half = 0.5 * y
            return half + 0.5 * y
        assert self.what == "nothing"
        return y


def case_with(what: str) -> Case:
    case = case_of(add_lora(build_model("gpt2")))
    block = case.model.get_base_model().transformer.h[1]
    block.mlp.act = Replaced(block.mlp.act, what)
    return case


def probe(case: Case, **options: Any) -> DeltaH1Result:
    entropy = make_rollouts((2, 3, 2), seed=11)
    return fast_delta_h1(
        case.model, case.optimizer, case.rollouts, entropy_rollouts=entropy, **options_of(engine="jvp", **options)
    )


@pytest.mark.parametrize(
    ("what", "named"),
    [("function", "the autograd function Undifferentiated"), ("operator", "_cdist_forward")],
)
def test_an_operation_without_forward_derivative_is_named(what: str, named: str) -> None:
    case = case_with(what)
    before = take_snapshot(case.model, case.optimizer)
    with pytest.raises(ForwardDerivativeError, match=f"{named}.* has no forward derivative") as caught:
        probe(case)
    assert "h.1.mlp.act', a Replaced" in str(caught.value)
    assert "one_pass" in caught.value.fix
    assert_unchanged(before, case.model, case.optimizer)
    assert forward_ad._current_level == -1


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("what", ["custom operator", "no_grad"])
def test_a_tangent_that_is_lost_or_that_reverse_mode_does_not_see(what: str, autocast: torch.dtype | None) -> None:
    case = case_with(what)
    before = take_snapshot(case.model, case.optimizer)
    with pytest.raises(ForwardDerivativeError, match=r"forward mode and .* by reverse mode"):
        probe(case, autocast_dtype=autocast)
    assert_unchanged(before, case.model, case.optimizer)
    probe(case_with("nothing"), autocast_dtype=autocast)


def test_a_parameter_that_is_not_read_from_its_module() -> None:
    """One of sixteen LoRA matrices, kept by a list of the model's own, as recurrent layers keep their weights."""
    case = case_of(add_lora(build_model("gpt2")))
    down = case.model.get_base_model().transformer.h[0].mlp.c_proj.lora_A["default"]
    kept = [down.weight]
    down.forward = lambda x: F.linear(x, kept[0])
    with pytest.raises(ForwardDerivativeError, match="not read from its module"):
        probe(case)


def test_detached_parts_are_detached_in_both_modes() -> None:
    case = case_of(add_lora(build_model("gpt2", dtype=torch.float64)).double())
    case.model.get_base_model().transformer.h[1].mlp.act.register_forward_hook(lambda _m, _i, out: out.detach())
    entropy = make_rollouts((2, 3, 2), seed=11)
    expected = OfflineEntropyProbe(case.model, case.optimizer, **options_of()).run_mixed_probe(
        entropy_rollouts=entropy, update_rollouts=case.rollouts
    )
    assert probe(case).delta_h1 == pytest.approx(expected.delta_h1, rel=1e-10)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["lora", "nf4", "checkpointed"])
def test_everything_comes_back_after_an_exception_among_tangents(kind: str, k: int, error: type[BaseException]) -> None:
    model = add_lora(quantize_nf4(build_model()) if kind == "nf4" else build_model())
    if kind == "checkpointed":
        enable_checkpointing(model, reentrant=True)
    case = case_of(model)
    calls = 0

    def fail(module: nn.Module, arguments: Any) -> None:
        nonlocal calls
        calls += forward_ad._current_level >= 0
        if calls == k:
            raise error

    handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(fail)
    before = take_snapshot(model, case.optimizer)
    own = {name: vars(m).keys() for name, m in model.named_modules()}
    slots = {name: dict(m._parameters) for name, m in model.named_modules()}
    with pytest.raises(error):
        probe(case)
    assert calls == k
    assert_unchanged(before, model, case.optimizer)
    for name, module in model.named_modules():
        assert vars(module).keys() == own[name], name
        assert all(module._parameters[slot] is p for slot, p in slots[name].items())
    assert forward_ad._current_level == -1
    assert torch.is_grad_enabled()
    handle.remove()
    probe(case)


def test_the_optimizer_s_steps_go_on() -> None:
    """After a probe the parameters are leaves that train as before."""
    model = add_lora(build_model("gpt2"))
    optimizer = stepped_adamw(model)
    probe(Case(model, optimizer, [], make_rollouts((2, 2))))
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
