"""What a run came to: ``report.json`` for machines, ``report.txt`` for a terminal, ``report.html``, ``metrics.jsonl``.

Everything here is read from the run's folder; nothing is remembered.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.table import Table

from pipeline.console import Console, duration, share
from pipeline.figures import others
from pipeline.files import read_json, write_json, write_text
from pipeline.mirror import place_of
from pipeline.numbers import percent, three_decimals, with_error
from pipeline.page.render import page
from pipeline.page.rows import ROUND_ROOM
from pipeline.reading import rounds_in
from stages.errors import StageError

_MOST_WIDTH = 10_000  # characters; a table in report.txt takes only what it needs


def write_reports(folder: Path) -> None:
    """Write the run's reports anew from its rounds'."""
    rounds = round_reports(folder)
    write_json(folder / "report.json", {"run": folder.name, "rounds": rounds})
    write_text(folder / "report.txt", _text(folder, rounds))
    write_text(folder / "report.html", page(folder, rounds, room=ROUND_ROOM))
    steps = [folder / f"round-{report['round']:04d}" / "metrics.jsonl" for report in rounds]
    write_text(folder / "metrics.jsonl", "".join(f.read_text(encoding="utf-8") for f in steps if f.exists()))


def show_page(folder: Path, out: Path | None) -> None:
    """Write the run's page anew, to `out` or into its folder, and say where it is.

    Raises:
        InputError: if the folder holds no run, or a file of it cannot be read.
        StageError: if the page cannot be written there.
    """
    file = out or folder / "report.html"
    text = page(folder, round_reports(folder))
    try:
        write_text(file, text)
    except OSError as error:
        raise StageError(
            str(file), wanted="a file to write the page to", got=str(error), fix="name another place: --out FILE"
        ) from None
    if out is None and (place := place_of(folder)) != str(folder):
        Console().text(f"{place}/{file.name}")
    Console().text(f"{file}   ({len(text.encode()) / 1000:,.0f} kB; open it in a browser)")


def round_reports(folder: Path) -> list[dict[str, Any]]:
    """The report of every round that has one, the evaluation before the first round included."""
    files = (path / "report.json" for path in rounds_in(folder).values())
    return [read_json(file) for file in files if file.exists()]


def result_table(rounds: list[dict[str, Any]]) -> Table:
    """One row a round: how good the policy was after it, and what the round did."""
    named = [others(report.get("evaluate", {})) for report in rounds]
    more = list(dict.fromkeys(name for figures in named for name in figures))
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("")
    for name in ("reward", "win rate", *more, "pairs", "last loss"):
        table.add_column(name, justify="right")
    for report, besides in zip(rounds, named, strict=True):
        figures, update = report.get("evaluate", {}), report.get("update")
        table.add_row(
            _row_name(report),
            with_error(figures.get("reward"), figures.get("reward_se")) or "-",
            percent(figures.get("win_rate")) or "-",
            *[three_decimals(besides.get(name)) or "-" for name in more],
            rows_made(report),
            three_decimals(update["last"].get("loss")) if update else "",
        )
    return table


def _row_name(report: Mapping[str, Any]) -> str:
    if not report["round"]:
        return "before"
    refused = {"hold": ", held", "roll_back": ", rolled back"}
    return f"after round {report['round']}{refused.get(report.get('decision', ''), '')}"


def rows_made(report: Mapping[str, Any]) -> str:
    """How many pairs a round trained on, or groups; nothing for the evaluation before the first."""
    if "groups" in report:
        return f"{report['groups']['num_groups']:,} groups"
    return f"{report['pairs']['num_pairs']:,}" if "pairs" in report else ""


def where_things_are(folder: Path) -> str:
    """Where a person finds what the run made; paths from here where the folder lies below."""
    place = place_of(folder)
    policy = f"prefloop export {place} --model FOLDER   (brings it as a Hugging Face folder)"
    if place == str(folder):
        place = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
        policy = f"{place}/final   (a Hugging Face folder)"
    lines = [
        f"policy   {policy}",
        f"report   {place}/report.html   (for a browser; also report.txt, report.json)",
        f"tables   {place}/round-*/{{prompts,candidates,scored,pairs,fates,reference_logps}}/part-*.parquet",
        f"steps    {place}/metrics.jsonl",
    ]
    if (folder / "tensorboard").exists():
        lines.append(f"curves   tensorboard --logdir {place}/tensorboard")
    return "\n".join(lines)


def _text(folder: Path, rounds: list[dict[str, Any]]) -> str:
    lines = [f"Run {folder.name}", "", _plain_text(result_table(rounds))]
    if any("evaluate" in report for report in rounds):
        lines += [
            "Each figure is over held-out prompts, one answer each at temperature 1; ± is the standard error.",
            "win rate: share of prompts whose answer gets a higher reward than the first policy's, ties half.",
            "KL: from the first policy, in nats an answer, estimated on the policy's own answers.",
            "texts NLL: mean negative log-likelihood of real texts, in nats a token; it rises when language decays.",
            "",
        ]
    for report in rounds:
        if report["round"]:
            lines += _round_lines(report)
    return "\n".join([*lines, where_things_are(folder), ""])


def _round_lines(report: dict[str, Any]) -> list[str]:
    sample, score, update = (report.get(key) for key in ("sample", "score", "update"))
    pairs = report.get("pairs") or report.get("groups")
    lines = [f"Round {report['round']}"]
    if sample and score:
        lines.append(
            f"  sampled  {sample['num_candidates']:,} answers, {share(sample['stop'], sample['num_candidates'])} "
            f"stopped by themselves; {_rewards_told(score)}"
        )
    if pairs:
        lines.append(f"  paired   {_pairs_told(pairs)}")
    if update:
        first, last = update["first"], update["last"]
        if "engine_gap" in report:
            lines.append(f"  checked  engine and trainer differ by {report['engine_gap']:.0e} nats a token")
        told = f"  updated  {update['num_steps']} steps, loss {first['loss']:.4f} -> {last['loss']:.4f}"
        if "rewards/margins" in last:
            told += f", reward margin {first['rewards/margins']:.3f} -> {last['rewards/margins']:.3f}"
        if (active := last.get("rejected_active")) is not None:
            told += f"; in the last step {share(active, 1)} of the rejected answers stood above their reference"
        if update.get("resumed_at") is not None:
            told += f"; it went on from step {update['resumed_at']}"
        lines.append(told)
    if skipped := (update or report.get("ended_update", {})).get("num_skipped"):
        lines.append(
            f"  skipped  {skipped} optimizer steps; skipped.jsonl in the round's folder says why, with the ids"
        )
    if "idle_share" in report:
        alone = " in the last call alone" if report.get("is_carried_on") else ""
        told = (
            f"  timed    {duration(report['seconds'])}{alone}, no stage at work {share(report['idle_share'], 1)} of it"
        )
        if "first_answers_s" in report:
            told += f"; new answers {report['first_answers_s']:.2f} s after the last step"
        lines.append(told)
    return [*lines, f"  {report['decision']}: {report['reason']}", ""]


def _rewards_told(score: Mapping[str, Any]) -> str:
    low, mean, high = (score[name] for name in ("min", "mean", "max"))
    return f"rewards {low:.2f} to {high:.2f}, mean {mean:.2f}" if score["num_scored"] else "none has a reward"


def _pairs_told(pairs: dict[str, Any]) -> str:
    if "fates" not in pairs:
        return f"{pairs['num_pairs']:,} ready pairs from {pairs['num_read']:,} rows"
    fates = ", ".join(f"{fate} {count}" for fate, count in pairs["fates"].items())
    if "num_groups" in pairs:
        mean = pairs["num_answers"] / pairs["num_groups"]
        return f"{pairs['num_groups']:,} groups of {mean:.1f} answers on average; fates: {fates}"
    margin = f", mean margin {pairs['margin_mean']:.2f}" if pairs["num_pairs"] else ""
    return f"{pairs['num_pairs']:,} pairs{margin}; fates: {fates}"


def _plain_text(table: Table) -> str:
    """A table as wide as it is; a name in it may hold what rich would take for markup."""
    out = io.StringIO()
    RichConsole(file=out, width=_MOST_WIDTH, markup=False, highlight=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"
