"""What an evaluation says of a policy: mean reward, win rate against the first policy, and the held-out rewards."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa


def evaluation_figures(mine: Sequence[pa.Table], first: Sequence[pa.Table]) -> dict[str, Any]:
    """Figures from tables of `SCORED`, one answer a prompt, of a policy and of the first policy.

    Returns:
        ``reward``: mean over the scored answers; ``reward_se``: its standard error; ``win_rate``: share of prompts
        with the higher reward, ties half, over prompts that both answered; ``holdout`` and
        ``auxiliary``: mean by name of each reward of that role; ``num_prompts``: answers scored.
    """
    rewards, others = _by_prompt(mine)
    theirs, _ = _by_prompt(first)
    values = list(rewards.values())
    mean = sum(values) / len(values) if values else None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) if mean is not None else None
    both = [key for key in rewards if key in theirs]
    wins = sum((rewards[key] > theirs[key]) + 0.5 * (rewards[key] == theirs[key]) for key in both)
    return {
        "num_prompts": len(values),
        "reward": mean,
        "reward_se": deviation / math.sqrt(len(values)) if deviation is not None else None,
        "win_rate": wins / len(both) if both else None,
        **{role: {name: sum(v) / len(v) for name, v in others[role].items()} for role in ("holdout", "auxiliary")},
    }


def _by_prompt(tables: Sequence[pa.Table]) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """The reward of each prompt's answer, and the values of all rewards by role and name."""
    rewards: dict[str, float] = {}
    others: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for table in tables:
        for row in table.to_pylist():
            if row["reward"] is not None:
                rewards[row["prompt_id"]] = row["reward"]
            for reward in row["rewards"]:
                if reward["value"] is not None:
                    others[reward["role"]][reward["name"]].append(reward["value"])
    return rewards, others
