"""TRL's trainer on a tiny real model and a few preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

PREFERENCES = [
    ("48315>", "51384", "513"),
    ("12>", "21", "2111"),
    ("907>", "709", "9"),
    ("6>", "6", "61"),
    ("3344>", "4433", "3344"),
]
"""Prompt, chosen and rejected answer; answers of unequal lengths."""


def dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PREFERENCES])


def policy_and_reference(folder: Path) -> tuple[Any, Any]:
    """The model of a folder, and as its reference the same moved away."""
    from transformers import AutoModelForCausalLM

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.1)
    return policy, reference


def trl_trainer(models: tuple[Any, Any], folder: Path, out: Path, **settings: Any) -> Any:
    """A `DPOTrainer` of a policy and its reference, with the tokenizer of a folder."""
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        str(out),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        **settings,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return DPOTrainer(*models, args=config, train_dataset=dataset(), processing_class=tokenizer)
