"""What the page says in words and tables: what was run, what came of it, each round's figures, the prompts' fates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import yaml

from pipeline.config import entry_of
from pipeline.gate import is_promoted
from pipeline.numbers import count, finite, number, percent, three_decimals, with_error
from stages.score.config import reward_name
from stages.vocab import FATE_MEANINGS, Fate

Report = Mapping[str, Any]


# ---- what was run ---------------------------------------------------------------------------------------------------


def facts(settings: Mapping[str, Any], num_settled: int, asked: int | None) -> list[tuple[str, str]]:
    """The settings that a reader asks for first; none before the config is written.

    Args:
        asked: how many rounds the run has, added ones among them.
    """
    if not settings:
        return []
    policy, prompts, sample, update = (settings.get(key) or {} for key in ("policy", "prompts", "sample", "update"))
    pairs, score = settings.get("pairs"), settings.get("score") or {}
    told = [
        ("policy", f"{policy.get('path')} in {policy.get('dtype')}"),
        ("loss_type", _objectives(update)),
        ("beta", "the objective's own" if update.get("beta") is None else str(update["beta"])),
        ("learning_rate", str(update.get("learning_rate"))),
        ("reference", _reference(settings)),
        ("rounds", f"{num_settled} settled of {asked}" if asked != num_settled else str(asked)),
    ]
    if pairs:
        told.append(("pairs", f"{pairs.get('path')}, as they came"))
    if prompts:
        told += [
            ("prompts", f"{prompts.get('path')}, {prompts.get('per_round'):,} a round"),
            ("candidates", f"{sample.get('num_generations')} a prompt, temperature {sample.get('temperature')}"),
            ("pairing", _pairing(settings.get("pair") or {})),
        ]
    if score:
        told.append(("rewards", ", ".join(map(_reward, score.get("rewards", [])))))
    told += [
        ("evaluated on", _evaluated_on(settings.get("evaluate"))),
        ("gate", _gate(settings.get("gate")) if settings.get("evaluate") else "nothing to look at"),
        ("seed", str(settings.get("run", {}).get("seed"))),
    ]
    if (settings.get("cluster") or {}).get("allow_unauthenticated"):
        told.append(("cluster", "one that asks for no token was allowed (cluster.allow_unauthenticated)"))
    by_round = [(key, ", then ".join(map(str, found))) for key, found in (settings.get("schedules") or {}).items()]
    return told + by_round + _of_single_rounds(settings.get("rounds"), asked or 0)


def _objectives(update: Mapping[str, Any]) -> str:
    names = update.get("loss_type")
    if not isinstance(names, list):
        return str(names)
    weights = update.get("loss_weights") or [1.0] * len(names)
    return " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)
    )


def _reference(settings: Mapping[str, Any]) -> str:
    """What the objective refers to, and what rounds start from where it is not simply the policy before."""
    named = settings.get("reference")
    told = ", ".join(named) if isinstance(named, list) else str(named)
    if settings.get("start") == "initial":
        told += "; every round trains from the first policy"
    if settings.get("momentum"):
        told += f"; rounds start {settings['momentum']:g} times the last change beyond the policy before"
    return told


def _of_single_rounds(rounds: Any, asked: int) -> list[tuple[str, str]]:
    """What the entries of a list of rounds override; the last entry holds in rounds that were added, too."""
    num_entries = len(rounds) if isinstance(rounds, list) else 0
    told = []
    for round in range(1, num_entries + 1):
        if own := entry_of(rounds, round):
            added = round == num_entries and asked > num_entries
            label = f"rounds {round} to {asked}" if added else f"only round {round}"
            told.append((label, yaml.safe_dump(own, default_flow_style=True, width=10**6).strip()))
    return told


def _reward(reward: Mapping[str, Any]) -> str:
    return f"{reward_name(reward)} ({reward.get('role')})"


def _pairing(pair: Mapping[str, Any]) -> str:
    """The strategy, and what differs from doing nothing more."""
    plain = {"strategy": pair.get("strategy"), "truncated": "drop"}
    more = [f"{name} {v}" for name, v in pair.items() if v not in (None, False, 0, plain.get(name))]
    return ", ".join([str(pair.get("strategy", "best_worst")), *more])


def _gate(gate: Mapping[str, Any] | None) -> str:
    """The limits that are set, and what happens to a result that breaks one."""
    if not gate:
        return "none: every result is promoted"
    return ", ".join(f"{name} {limit}" for name, limit in gate.items() if limit is not None)


def _evaluated_on(evaluate: Mapping[str, Any] | None) -> str:
    if not evaluate:
        return "nothing"
    source = evaluate.get("path") or f"a share of {evaluate.get('holdout')} of the prompts"
    return f"{source}, at most {evaluate.get('num_prompts'):,} prompts"


# ---- what came of it ------------------------------------------------------------------------------------------------


def headline(reports: Sequence[Report], standing: int | None) -> str:
    """The result in one sentence; the run stands behind the policy of round `standing`, None before any is settled."""
    evaluated = _evaluated(reports)
    if standing is None and 0 not in evaluated:
        return "No round is settled yet."
    last = standing or 0
    if last not in evaluated or 0 not in evaluated:
        why = "the policy that stands was not evaluated" if evaluated else "nothing was evaluated"
        return f"{_trained(reports)}; {why}, so whether the policy got better is not known."
    before, after = evaluated[0], evaluated[last]
    if not last:
        told = "No round's result was promoted, and the first policy stands"
        told = "No round is settled yet" if standing is None else told
        return f"{told}; before the first, the reward is {number(before['reward'])} {_over(before)}."
    told = f"{_change('Reward', before, after)} {_over(after)}"
    if rate := percent(after.get("win_rate")):
        told += f"; win rate against the first policy {rate}"
    for name, value in after.get("holdout", {}).items():
        if (first := finite(before.get("holdout", {}).get(name))) is not None and finite(value) is not None:
            told += f"; {name}, which training never sees, {_went(first, value)}"
    return told + "."


def _evaluated(reports: Sequence[Report]) -> dict[int, Report]:
    """The evaluations that gave a reward, by round."""
    return {r["round"]: r["evaluate"] for r in reports if finite(r.get("evaluate", {}).get("reward")) is not None}


def _trained(reports: Sequence[Report]) -> str:
    """How many rounds there were, and on how much data."""
    trained = max((report["round"] for report in reports), default=0)
    made = {name: sum(report.get(name, {}).get(f"num_{name}", 0) for report in reports) for name in ("pairs", "groups")}
    rounds = "One round" if trained == 1 else f"{trained} rounds"
    return f"{rounds} on {' and '.join(f'{num:,} {name}' for name, num in made.items() if num) or '0 pairs'}"


def warnings(reports: Sequence[Report], standing: int | None) -> list[str]:
    """What a reader should look at before trusting the reward of the policy that stands, that of round `standing`."""
    refused = [
        f"The result of round {report['round']} was not promoted ({report['decision']}): {report['reason']}."
        for report in reports
        if report["round"] and not is_promoted(report)
    ]
    evaluated = _evaluated(reports)
    before, after = evaluated.get(0), evaluated.get(standing or 0)
    if before is None or after is None or not after["reward"] > before["reward"]:
        return refused
    first, last = before.get("holdout", {}), after.get("holdout", {})
    return refused + [
        f"The reward rose while {name}, which training never sees, fell from {first[name]:.3f} to {last[name]:.3f}: "
        "the reward may be gamed. Read the rows below."
        for name in sorted(first.keys() & last.keys())
        if finite(first[name]) is not None and finite(last[name]) is not None and last[name] < first[name]
    ]


def _change(what: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Rose, fell, or neither by more than two standard errors of the difference, taking the two as independent."""
    noise = 2 * math.hypot(before.get("reward_se") or 0, after.get("reward_se") or 0)
    difference = after["reward"] - before["reward"]
    word = "hardly moved, within its noise," if abs(difference) <= noise else "rose" if difference > 0 else "fell"
    return f"{what} {word} from {number(before['reward'])} to {number(after['reward'])}"


def _went(first: float, last: float) -> str:
    before, after = f"{first:.3f}", f"{last:.3f}"
    return f"stayed at {after}" if before == after else f"went from {before} to {after}"


def _over(figures: Mapping[str, Any]) -> str:
    num = figures.get("num_prompts", 0)
    return f"on {num:,} held-out prompt{'s' * (num != 1)}"


# ---- by round -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoundTable:
    """The rounds' figures as texts; the first column names the round, the last says what was decided."""

    columns: list[str]
    rows: list[list[str]]


def round_table(reports: Sequence[Report]) -> RoundTable:
    """One row a round; columns that no round has are left out."""
    holdout = sorted({name for report in reports for name in report.get("evaluate", {}).get("holdout", {})})
    columns = {
        "": [_round_name(report["round"]) for report in reports],
        "reward": [_reward_of(report.get("evaluate", {})) for report in reports],
        "win rate": [percent(report.get("evaluate", {}).get("win_rate")) for report in reports],
        **{
            name: [three_decimals(report.get("evaluate", {}).get("holdout", {}).get(name)) for report in reports]
            for name in holdout
        },
        "KL, nats": [three_decimals(report.get("evaluate", {}).get("kl")) for report in reports],
        "given texts, nats a token": [
            three_decimals(report.get("evaluate", {}).get("texts_nll")) for report in reports
        ],
        "tokens an answer": [three_decimals(report.get("evaluate", {}).get("length")) for report in reports],
        "4-grams said before": [percent(report.get("evaluate", {}).get("repetition")) for report in reports],
        "pairs": [count(report.get("pairs", {}).get("num_pairs")) for report in reports],
        "groups": [count(report.get("groups", {}).get("num_groups")) for report in reports],
        "mean margin": [three_decimals(report.get("pairs", {}).get("margin_mean")) for report in reports],
        "steps": [count(report.get("update", {}).get("num_steps")) for report in reports],
        "last loss": [three_decimals(report.get("update", {}).get("last", {}).get("loss")) for report in reports],
        "rejected above reference, last step": [
            percent(report.get("update", {}).get("last", {}).get("rejected_active")) for report in reports
        ],
        "decision": [str(report.get("decision", "")) for report in reports],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return RoundTable(list(kept), [list(row) for row in zip(*kept.values(), strict=True)])


def _round_name(round: int) -> str:
    return f"after round {round}" if round else "before"


def _reward_of(evaluate: Mapping[str, Any]) -> str:
    return with_error(evaluate.get("reward"), evaluate.get("reward_se"))


# ---- fates ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fates:
    """How many prompts had which fate: by fate, its meaning and its counts in `rounds`, and each round's total."""

    rounds: list[int]
    rows: list[tuple[str, str, list[int]]]
    totals: list[int]


def fates(reports: Sequence[Report]) -> Fates:
    """The fates that occurred, ``paired`` first."""
    counted = [
        (report["round"], found["fates"])
        for report in reports
        if (found := report.get("pairs") or report.get("groups") or {}).get("fates")
    ]
    known = ("paired", *(fate for fate in get_args(Fate) if fate != "paired"))
    others = sorted({fate for _, found in counted for fate in found} - set(known))
    table = [
        (fate, FATE_MEANINGS.get(fate, ""), [int(found.get(fate, 0)) for _, found in counted])
        for fate in (*known, *others)
    ]
    return Fates(
        [round for round, _ in counted],
        [row for row in table if any(row[2])],
        [sum(map(int, found.values())) for _, found in counted],
    )
