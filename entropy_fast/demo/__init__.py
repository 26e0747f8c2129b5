"""The whole story on a small pretrained model: a few real GRPO steps, then the forecast for the next one."""

from entropy_fast.demo.story import DemoSettings, run_demo

__all__ = ["DemoSettings", "run_demo"]
