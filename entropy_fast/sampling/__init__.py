"""Sampling responses and rewarding them. Temperature, top-p, top-k and min-p exist here and nowhere else."""

from entropy_fast.sampling.sampler import SamplingSettings, sample_rollouts
from entropy_fast.sampling.tasks import PromptTask, read_tasks
from entropy_fast.sampling.verifiers import VERIFIERS, Verifier

__all__ = ["VERIFIERS", "PromptTask", "SamplingSettings", "Verifier", "read_tasks", "sample_rollouts"]
