"""A stage's figures, summed from its shards' entries, and the line in which a person reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.console import duration, share
from pipeline.entries import Entry
from pipeline.numbers import percent, three_decimals, with_error

Figures = dict[str, Any]


def total(entries: Sequence[Entry], stat: str) -> float:
    """A figure summed over the shards."""
    return sum(entry.stats.get(stat, 0) for entry in entries)


def sampled(entries: Sequence[Entry], *, num_made: int) -> Figures:
    """Prompts asked, candidates, tokens, and how the answers ended.

    Args:
        num_made: the shards that were made now; ``num_tokens_now`` is their share of all tokens.
    """
    num_tokens = int(total(entries, "tokens"))
    return {
        "num_prompts": int(total(entries, "prompts")),
        "num_dropped": sum(len(entry.drops) for entry in entries),
        "num_candidates": sum(entry.rows for entry in entries),
        "num_tokens": num_tokens,
        "num_tokens_now": num_tokens * num_made // max(1, len(entries)),
        "stop": int(total(entries, "stop")),
        "length": int(total(entries, "length")),
    }


def sampled_line(figures: Figures, seconds: float) -> str:
    rows, rate = figures["num_candidates"], figures["num_tokens_now"] / max(seconds, 1e-9)
    return (
        f"{figures['num_prompts']:,} prompts -> {rows:,} candidates   {duration(seconds)}   "
        f"{rate:,.0f} tokens/s   "
        f"stop {share(figures['stop'], rows)}   length {share(figures['length'], rows)}"
        + (f"   prompts without candidates {figures['num_dropped']:,}" if figures["num_dropped"] else "")
    )


def engine_sync(reports: Sequence[Mapping[str, Any]]) -> str:
    """How engines took other weights, for the end of a line: ``   new weights in 0.12 s, proved``."""
    if not reports:
        return ""
    attempts = [attempt for report in reports for attempt in report["attempts"]]
    seconds = max(
        sum(attempt["loading"]["seconds"] + attempt["probe_s"] for attempt in report["attempts"]) for report in reports
    )
    verdicts = [report["attempts"][-1]["verdict"] for report in reports]
    kinds = sorted({verdict["kind"] if verdict else "by a new engine" for verdict in verdicts})
    restarts = sum(attempt["loading"]["way"] == "started" for attempt in attempts)
    return f"   new weights in {seconds:.2f} s, {', '.join(kinds)}" + (f", {restarts} restarted" if restarts else "")


def scored(entries: Sequence[Entry]) -> Figures:
    """Answers with and without a finite reward; the rewards' least, greatest and mean (None where there are none)."""
    num_scored = int(total(entries, "scored"))
    return {
        "num_scored": num_scored,
        "num_errors": int(total(entries, "errors")),
        "min": min((entry.stats["reward_min"] for entry in entries if "reward_min" in entry.stats), default=None),
        "max": max((entry.stats["reward_max"] for entry in entries if "reward_max" in entry.stats), default=None),
        "mean": total(entries, "reward_sum") / num_scored if num_scored else None,
    }


def scored_line(figures: Figures, seconds: float) -> str:
    low, mean, high = (figures[name] for name in ("min", "mean", "max"))
    spread = f"reward {mean:.2f}   from {low:.2f} to {high:.2f}" if figures["num_scored"] else "none has a reward"
    return f"{figures['num_scored']:,} candidates   {duration(seconds)}   {spread}"


def paired(pairs: Sequence[Entry], fates: Sequence[Entry]) -> Figures:
    """Pairs, their mean margin, the mean tokens of both sides, and how many prompts had which fate."""
    num_pairs = sum(entry.rows for entry in pairs)
    means = {"margin_mean": "margin_sum", "chosen_tokens_mean": "chosen_tokens"}
    means |= {"rejected_tokens_mean": "rejected_tokens", "chosen_longer": "chosen_longer"}
    return {
        "num_prompts": sum(entry.rows for entry in fates),
        "num_pairs": num_pairs,
        **{name: total(pairs, stat) / num_pairs if num_pairs else None for name, stat in means.items()},
        "fates": _fates(fates),
    }


def grouped(groups: Sequence[Entry], fates: Sequence[Entry]) -> Figures:
    """Groups, their answers, the mean distance of best and worst reward, and how many prompts had which fate."""
    num_groups = sum(entry.rows for entry in groups)
    return {
        "num_prompts": sum(entry.rows for entry in fates),
        "num_groups": num_groups,
        "num_answers": int(total(groups, "answers")),
        "spread_mean": total(groups, "spread_sum") / num_groups if num_groups else None,
        "fates": _fates(fates),
    }


def _fates(entries: Sequence[Entry]) -> dict[str, int]:
    """How many prompts had which fate, most frequent first."""
    counts = Counter[str]()
    for entry in entries:
        counts.update({fate: int(count) for fate, count in entry.stats.items()})
    return dict(counts.most_common())


def ready_pairs(entries: Sequence[Entry]) -> Figures:
    """Pairs that came as they are, and why rows among them were left out."""
    num_pairs = sum(entry.rows for entry in entries)
    left_out = {"two equal answers": "equal", "too long": "long", "repeated": "merged"}
    return {
        "num_pairs": num_pairs,
        "num_read": int(total(entries, "read")),
        "left_out": {why: int(total(entries, stat)) for why, stat in left_out.items() if total(entries, stat)},
    }


def ready_pairs_line(figures: Figures, seconds: float) -> str:
    left_out = "  ".join(f"{why} {count:,}" for why, count in figures["left_out"].items())
    return (
        f"{figures['num_read']:,} rows -> {figures['num_pairs']:,} pairs   {duration(seconds)}   "
        f"left out: {left_out or 'none'}"
    )


def paired_line(figures: Figures, seconds: float) -> str:
    return (
        f"{figures['num_prompts']:,} prompts -> {figures['num_pairs']:,} pairs   {duration(seconds)}   "
        f"margin {figures['margin_mean']:.2f}   {_dropped(figures)}"
    )


def grouped_line(figures: Figures, seconds: float) -> str:
    return (
        f"{figures['num_prompts']:,} prompts -> {figures['num_groups']:,} groups of {figures['num_answers']:,} answers"
        f"   {duration(seconds)}   best less worst {figures['spread_mean']:.2f}   {_dropped(figures)}"
    )


def _dropped(figures: Figures) -> str:
    dropped = "  ".join(f"{fate} {count}" for fate, count in figures["fates"].items() if fate != "paired")
    return f"dropped: {dropped or 'none'}"


def updated_line(summary: Mapping[str, Any], seconds: float, *, rows: str) -> str:
    """`summary` is an `UpdateSummary` as JSON, `rows` what it was trained on: pairs or groups."""
    first, last = summary["first"], summary["last"]
    active, resumed = last.get("rejected_active"), summary["resumed_at"]
    return (
        f"{summary['num_pairs']:,} {rows}, {summary['num_steps']} steps   {duration(seconds)}   "
        f"loss {first['loss']:.3f} -> {last['loss']:.3f}   "
        f"accuracy {first['rewards/accuracies']:.2f} -> {last['rewards/accuracies']:.2f}"
        + (f"   rejected above reference {share(active, 1)}" if active is not None else "")
        + (f"   went on from step {resumed}" if resumed is not None else "")
        + (f"   steps skipped {skipped}" if (skipped := summary.get("num_skipped")) else "")
    )


def evaluated_line(figures: Figures, seconds: float) -> str:
    """The figures that there are: an answer may have no reward, or none in common with the first policy's."""
    named = {"reward": with_error(figures["reward"]), "win rate": percent(figures["win_rate"])}
    named |= {name: three_decimals(value) for name, value in others(figures).items()}
    told = "".join(f"   {name} {value}" for name, value in named.items() if value)
    return f"{figures['num_prompts']:,} held-out prompts   {duration(seconds)}{told}"


def others(evaluation: Figures) -> dict[str, float]:
    """An evaluation's figures besides reward and win rate, by the names that people read; those that there are."""
    named = evaluation.get("holdout", {}) | evaluation.get("auxiliary", {})
    named |= {"KL": evaluation.get("kl"), "texts NLL": evaluation.get("texts_nll")}
    return {name: value for name, value in named.items() if value is not None}
