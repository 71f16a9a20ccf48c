"""The numbers of the study's tasks: with a cell, all that a result depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.robustness.grid import Stage
from pipeline.embedded_models import Recipe as EmbeddedRecipe


@dataclass(frozen=True, slots=True)
class Recipe:
    """A task's numbers.

    Attributes:
        version: of the code that a result depends on; counted up when a change makes other results.
        learning_rate: that of rate 1x.
        num_pairs: of a table.
        num_prompts, num_generations: drawn for a table, and for a round on policy.
        num_held_out: prompts that policies are measured on.
        num_truths: known good texts whose likelihood is watched.
    """

    version: int
    learning_rate: float
    batch: int
    epochs: int
    num_pairs: int
    num_prompts: int
    num_generations: int
    max_new_tokens: int
    num_held_out: int
    num_truths: int
    min_margin: float


REVERSE = Recipe(
    version=1,
    learning_rate=3e-4,
    batch=32,
    epochs=2,
    num_pairs=512,
    num_prompts=640,
    num_generations=16,
    max_new_tokens=8,
    num_held_out=512,
    num_truths=512,
    min_margin=0.5,
)

STORIES = Recipe(
    version=1,
    learning_rate=5e-4,
    batch=16,
    epochs=2,
    num_pairs=96,
    num_prompts=256,
    num_generations=6,
    max_new_tokens=48,
    num_held_out=128,
    num_truths=48,
    min_margin=1.0,
)

NUM_ROUNDS = 3
ROUND_PROMPTS = 512  # a round


def recipes() -> dict[Stage, Mapping[str, Any]]:
    """By stage, what its cells' results depend on besides the cells."""
    taught = {f"embedded_{name}": value for name, value in asdict(EmbeddedRecipe()).items()}
    reverse = asdict(REVERSE) | taught
    rounds = {"num_rounds": NUM_ROUNDS, "round_prompts": ROUND_PROMPTS}
    return {"grid": reverse, "others": reverse, "rounds": reverse | rounds, "stories": asdict(STORIES)}
