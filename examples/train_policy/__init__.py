"""Train a policy by GRPO, the same way every time, and leave run folders at several steps, from which forecasts can be checked.

    python -m examples.train_policy --policy small --checkpoints 5,20,60
    entropy-fast probe FOLDER/step-0020 --out RESULTS

``small`` is a transformer of two layers that learns to add two numbers: a supervised warm-up until some of its sampled answers
are right, then Dr. GRPO on all of its parameters (a minute or two on one core). ``smollm2`` is SmolLM2-135M with a LoRA, on
products from reasoning-gym; its entropy falls to a tenth within 16 steps (about a minute a step on one core).

A checkpoint such as ``step-0020`` holds the policy after 20 steps, before the next: model or adapter, ``optimizer.pt``,
``run.json``, the very ``rollouts.jsonl`` that the next step is made from, ``held_out.jsonl`` (responses of the same policy to
other prompts), and ``training.json`` with the optimizer's settings. ``run.json`` asks for the whole next step, clipped.

A folder is complete when it has ``complete.json``, which also holds the log of the steps; whoever asks for the same settings is
then given what is there. It cannot be moved: where all of a model is trained, ``run.json`` has its absolute path.
"""

from examples.train_policy.settings import SMALL, SMOLLM2, Settings, default_folder
from examples.train_policy.training import policy_at, sampled, take_step, train

__all__ = ["SMALL", "SMOLLM2", "Settings", "default_folder", "policy_at", "sampled", "take_step", "train"]
