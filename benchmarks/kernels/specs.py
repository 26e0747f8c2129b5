"""What is measured: one spec per op, shape and dtype."""

from __future__ import annotations

import dataclasses

import torch

TOKEN = "token_logprobs"
LINEAR = "linear_token_logprobs_with_units"
FOLD = "precondition_accumulate"
RANK = 16  # of the LoRA factors


@dataclasses.dataclass(frozen=True)
class Spec:
    """One op at one shape in one dtype.

    Attributes:
        op: one of TOKEN, LINEAR, FOLD.
        dtype: of logits, hidden states and output layer, or gradients, as torch names it.
        rows: N.
        vocabulary: V.
        hidden: H, of the output layer; for FOLD of the model whose LoRA factors are folded.
        entropy: whether entropies (and their unit gradients) are wanted.
        layers: FOLD: number of layers.
        key_value: FOLD: width of keys and values.
        intermediate: FOLD: width of the MLP.
        timed: False to measure memory alone.
        memory: whether memory is measured.
    """

    op: str
    dtype: str
    rows: int = 0
    vocabulary: int = 0
    hidden: int = 0
    entropy: bool = False
    layers: int = 0
    key_value: int = 0
    intermediate: int = 0
    timed: bool = True
    memory: bool = True

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def shape(self) -> str:
        if self.op == FOLD:
            return f"{len(self.factor_shapes())} tensors, {self.elements() / 1e6:.1f} M elements"
        hidden = f" H={self.hidden}" if self.op == LINEAR else ""
        return f"N={self.rows}{hidden} V={self.vocabulary}{' entropy' if self.entropy else ''}"

    @property
    def label(self) -> str:
        return f"{self.op}, {self.dtype}, {self.shape}"

    def factor_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the A and B factors of q, k, v, o, gate, up and down, layer by layer."""
        h, kv, m = self.hidden, self.key_value, self.intermediate
        linears = [(h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h)]
        return [shape for n_in, n_out in linears for shape in ((RANK, n_in), (n_out, RANK))] * self.layers

    def elements(self) -> int:
        return sum(rows * columns for rows, columns in self.factor_shapes())

    def small(self) -> Spec:
        """The same op at a size that costs nothing, for what happens once per process."""
        return dataclasses.replace(
            self,
            rows=min(self.rows, 64),
            vocabulary=min(self.vocabulary, 512),
            hidden=min(self.hidden, 64),
            layers=min(self.layers, 1),
            key_value=min(self.key_value, 16),
            intermediate=min(self.intermediate, 64),
        )


SMOLLM_VOCABULARY, LARGE_VOCABULARIES = 49152, (129920, 151936)

TOKEN_FP32 = Spec(TOKEN, "float32", 1024, SMOLLM_VOCABULARY, entropy=True)
LINEAR_FP32 = Spec(LINEAR, "float32", 1024, SMOLLM_VOCABULARY, 576)
LINEAR_BF16 = Spec(LINEAR, "bfloat16", 1024, SMOLLM_VOCABULARY, 576)
LINEAR_MANY_ROWS = tuple(dataclasses.replace(s, rows=4096, timed=False) for s in (LINEAR_FP32, LINEAR_BF16))
# The linears of a 7B model with 28 layers (Qwen2.5-7B): 392 factors, 40.4 M elements.
FOLD_FP32 = Spec(FOLD, "float32", hidden=3584, layers=28, key_value=512, intermediate=18944)

TARGET_SPECS = (TOKEN_FP32, LINEAR_FP32, LINEAR_BF16, *LINEAR_MANY_ROWS, FOLD_FP32)


def _more() -> list[Spec]:
    def without_memory(spec: Spec, **changes: object) -> Spec:
        return dataclasses.replace(spec, memory=False, **changes)

    token = [without_memory(TOKEN_FP32, entropy=False)]
    token += [without_memory(TOKEN_FP32, dtype=d) for d in ("bfloat16", "float16", "float64")]
    token += [without_memory(TOKEN_FP32, dtype="bfloat16", entropy=False)]
    token += [without_memory(TOKEN_FP32, rows=256, vocabulary=v) for v in LARGE_VOCABULARIES]
    linear = [without_memory(s, entropy=True) for s in (LINEAR_FP32, LINEAR_BF16)]
    linear += [without_memory(LINEAR_BF16, rows=256, vocabulary=v, hidden=896) for v in LARGE_VOCABULARIES]
    return [*token, *linear, without_memory(FOLD_FP32, dtype="bfloat16")]


MORE_SPECS = tuple(_more())

# The order is that of the ops. Nothing about these sizes says how fast an op is.
QUICK_SPECS = tuple(
    dataclasses.replace(spec.small(), rows=spec.rows and 8)
    for spec in (TOKEN_FP32, LINEAR_FP32, LINEAR_BF16, FOLD_FP32)
)

# What a GPU is measured on: enough rows to fill it.
CUDA_TARGET_SPECS = (
    Spec(TOKEN, "float32", 8192, LARGE_VOCABULARIES[1], entropy=True),
    Spec(TOKEN, "bfloat16", 8192, LARGE_VOCABULARIES[1], entropy=True),
    Spec(LINEAR, "bfloat16", 8192, LARGE_VOCABULARIES[1], 3584),
    FOLD_FP32,
)
CUDA_MORE_SPECS = (
    TOKEN_FP32,
    LINEAR_FP32,
    LINEAR_BF16,
    dataclasses.replace(CUDA_TARGET_SPECS[2], entropy=True, memory=False),
    dataclasses.replace(FOLD_FP32, dtype="bfloat16", memory=False),
)
