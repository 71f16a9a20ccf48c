"""What an evaluation says of a policy: its rewards, its answers' form, and how it stands against other policies.

Every policy answers the same prompts, so that two are compared prompt by prompt: what is easy or hard about a prompt
falls out of the difference. Intervals are Student's t, at 95%.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline import student_t

NGRAM = 4  # tokens behind one unit of repetition


@dataclass(frozen=True, slots=True)
class Judged:
    """A policy's answers as they were judged: each reward's values by prompt.

    Attributes:
        main: the sum of the main rewards.
        others: by role and name, ``holdout`` and ``auxiliary``; one that gave no value at all is there, and empty.
        answered: the prompts with an answer, whether it got a value or not.
    """

    main: Mapping[str, float]
    others: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    answered: frozenset[str] = frozenset()

    @classmethod
    def of(cls, tables: Iterable[pa.Table], names: Mapping[str, Sequence[str]]) -> Judged:
        """From tables of `SCORED`, one answer a prompt.

        Args:
            names: of the rewards of each role but ``main``, as the config has them, and in its order.
        """
        main: dict[str, float] = {}
        others: dict[str, dict[str, dict[str, float]]] = {role: {name: {} for name in names[role]} for role in names}
        answered = set()
        for row in (row for table in tables for row in table.to_pylist()):
            answered.add(row["prompt_id"])
            if row["reward"] is not None:
                main[row["prompt_id"]] = row["reward"]
            for reward in row["rewards"]:
                if reward["name"] in (named := others.get(reward["role"], {})) and reward["value"] is not None:
                    named[reward["name"]][row["prompt_id"]] = reward["value"]
        return cls(main, others, frozenset(answered))


def evaluation_figures(mine: Judged, first: Judged) -> dict[str, Any]:
    """A policy's figures, and its win rate against the first one.

    Returns:
        ``reward``: mean over the scored answers; ``reward_se``: its standard error; ``win_rate``: see `comparison`;
        ``holdout`` and ``auxiliary``: mean by name of each reward of that role, None of one without a value;
        ``num_prompts``: answers scored.
    """
    reward = mean_with_error(list(mine.main.values()))
    return {
        "num_prompts": reward["num"],
        "reward": reward["mean"],
        "reward_se": reward["se"],
        "win_rate": _win_rate(mine, first)["mean"],
        **{
            role: {name: mean_with_error(list(found.values()))["mean"] for name, found in named.items()}
            for role in ("holdout", "auxiliary")
            for named in [mine.others.get(role, {})]
        },
    }


def comparison(mine: Judged, other: Judged, *, max_error_share: float) -> dict[str, Any]:
    """How a policy stands against another one, over the prompts on which both have a value.

    Args:
        max_error_share: of the prompts that either answered, the share that a reward of role holdout may lack.

    Returns:
        ``reward`` and, by name, ``holdout``: the mean difference, mine less the other's; ``win_rate``: the share of
        prompts with the higher reward, ties half; each as `mean_with_error` says. ``least_holdout``: the prompts that
        a difference under ``holdout`` must at least be of.
    """
    num_answered = len(mine.answered | other.answered)
    return {
        "least_holdout": num_answered - math.floor(max_error_share * num_answered + 1e-9),
        "reward": _difference(mine.main, other.main),
        "win_rate": _win_rate(mine, other),
        "holdout": {
            name: _difference(values, other.others.get("holdout", {}).get(name, {}))
            for name, values in mine.others.get("holdout", {}).items()
        },
    }


def mean_with_error(values: Sequence[float]) -> dict[str, Any]:
    """``num``, ``mean``, its standard error ``se``, and ``low`` and ``high``, the ends of its 95% interval.

    None where too few values are there to say: the mean of none, the error of one.
    """
    num = len(values)
    if not num:
        return {"num": 0, "mean": None, "se": None, "low": None, "high": None}
    mean = sum(values) / num
    if num == 1:
        return {"num": 1, "mean": mean, "se": None, "low": None, "high": None}
    se = math.sqrt(sum((value - mean) ** 2 for value in values) / (num - 1) / num)
    reach = student_t.quantile(0.025, df=num - 1) * se
    return {"num": num, "mean": mean, "se": se, "low": mean - reach, "high": mean + reach}


def _difference(mine: Mapping[str, float], other: Mapping[str, float]) -> dict[str, Any]:
    return mean_with_error([mine[key] - other[key] for key in mine if key in other])


def _win_rate(mine: Judged, other: Judged) -> dict[str, Any]:
    both = [(mine.main[key], other.main[key]) for key in mine.main if key in other.main]
    return mean_with_error([float(ours > theirs) + 0.5 * (ours == theirs) for ours, theirs in both])


def form_figures(candidates: Iterable[pa.Table]) -> dict[str, float | None]:
    """The form of the answers in tables of `CANDIDATES`: ``length``, mean tokens; ``repetition``, see below; ``cut``,
    the share that did not stop by itself."""
    answers = [
        (row["response_token_ids"], row["finish_reason"])
        for table in candidates
        for row in table.select(["response_token_ids", "finish_reason"]).to_pylist()
    ]
    if not answers:
        return {"length": None, "repetition": None, "cut": None}
    return {
        "length": sum(len(ids) for ids, _ in answers) / len(answers),
        "repetition": sum(repetition(ids) for ids, _ in answers) / len(answers),
        "cut": sum(reason == "length" for _, reason in answers) / len(answers),
    }


def repetition(token_ids: Sequence[int]) -> float:
    """The share of an answer's 4-grams that it has said before (seq-rep-4, arXiv:1908.04319); 0 for a short one."""
    grams = [tuple(token_ids[at : at + NGRAM]) for at in range(len(token_ids) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
