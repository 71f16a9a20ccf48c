"""What every pairing strategy would make of candidates that are scored already: nothing is written, no Ray is started.

The tables are those of the newest scored round of the config's run, or any that are named. The config's own strategy
is looked at as it stands, with the seed, round and options that a run would use, so that its figures are the run's; the
others with the config's options and the defaults of their own settings.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console, share
from pipeline.jobs.tables import AdoptTables, RoundOf
from pipeline.reading import round_folders
from pipeline.run_folder import following
from pipeline.single import made_from_one_another, parquet_files
from stages.contracts import CANDIDATES, PROMPTS, SCORED
from stages.errors import InputError
from stages.sample.stage import Dropped
from stages.score.config import OWN_SETTINGS, PairConfig, Strategy, costs
from stages.score.pairing.choice import Choice, Group
from stages.score.pairing.rules import Drop
from stages.score.pairing.shard import Needs, read_shard
from stages.score.pairing.stage import choices_of

_CONTRACTS = (PROMPTS, CANDIDATES, SCORED)
_QUANTILES = (0.1, 0.5, 0.9)
_SHARD_PROMPTS = 1024  # of tables that are no run's


def show_preview(config_file: Path, overrides: Sequence[str], tables: Sequence[Path], *, in_json: bool) -> None:
    """Print what each strategy makes of scored candidates.

    Args:
        tables: prompts, candidates and scored; none for those of the newest scored round of the config's run.

    Raises:
        InputError: if there are no such tables, or rows of them do not belong together.
    """
    config = load_config(config_file, overrides)
    with _given(tables) if tables else _newest(config) as folders:
        round = max(1, RoundOf(folders[0])(None))
        outcomes = preview(folders, config.for_round(round), round=round)
    if in_json:
        told = {"tables": [str(folder.path) for folder in folders], "round": round}
        print(json.dumps(told | {"strategies": [outcome.figures() for outcome in outcomes]}, indent=2))
        return
    console = Console()
    console.text(f"{folders[-1].path}, round {round}: {outcomes[0].num_prompts:,} prompts\n")
    console.table(_table(outcomes))
    console.text("\nMargins are in units of the reward, after the length penalty; tokens are chosen less rejected.")


@dataclass(slots=True)
class Outcome:
    """What one strategy made, summed up prompt by prompt; `why_not` says in short why it was not asked."""

    config: PairConfig | None
    strategy: Strategy
    is_configs_own: bool
    why_not: str = ""
    longer: int = 0
    tokens: int = 0
    most_answers: int = 0
    margins: array[float] = field(default_factory=lambda: array("d"))
    group_sizes: array[int] = field(default_factory=lambda: array("q"))
    fates: Counter[str] = field(default_factory=Counter)

    @property
    def num_prompts(self) -> int:
        return sum(self.fates.values())

    @property
    def num_made(self) -> int:
        return len(self.margins) + len(self.group_sizes)

    @property
    def remark(self) -> str:
        """What makes the figures mean less than they seem to."""
        own = self.config.own if self.config else {}
        accepts_all = own.get("num_accepted", 0) >= self.most_answers > 0
        return "accepts every answer" if accepts_all else ""

    def add(self, choice: Choice, num_answers: int, lengths: Mapping[str, int]) -> None:
        """One more prompt with so many answers, among those with these lengths in tokens."""
        self.most_answers = max(self.most_answers, num_answers)
        self.fates[choice.fate if isinstance(choice, Drop) else "paired"] += 1
        if isinstance(choice, Group):
            self.group_sizes.append(len(choice.response_ids))
        for pair in choice if isinstance(choice, list) else ():
            longer_by = lengths[pair.chosen_id] - lengths[pair.rejected_id]
            self.margins.append(pair.margin)
            self.tokens += longer_by
            self.longer += longer_by > 0

    def figures(self) -> dict[str, Any]:
        """As JSON; means and quantiles are null where there is no pair."""
        num_pairs = len(self.margins)
        quantiles = np.quantile(self.margins, _QUANTILES).tolist() if num_pairs else [None] * len(_QUANTILES)
        return {
            "strategy": self.strategy,
            "of_config": self.is_configs_own,
            "settings": self.config.identity() if self.config else None,
            "why_not": self.why_not,
            "remark": self.remark,
            "num_prompts": self.num_prompts,
            "num_prompts_paired": self.fates["paired"],
            "num_pairs": num_pairs,
            "num_groups": len(self.group_sizes),
            "group_size_mean": sum(self.group_sizes) / len(self.group_sizes) if self.group_sizes else None,
            "margin_mean": sum(self.margins) / num_pairs if num_pairs else None,
            "margin_quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=True)),
            "chosen_less_rejected_tokens": self.tokens / num_pairs if num_pairs else None,
            "chosen_longer": self.longer / num_pairs if num_pairs else None,
            "fates": dict(self.fates.most_common()),
        }


def preview(folders: Sequence[StageFolder], config: Config, *, round: int) -> list[Outcome]:
    """What each strategy makes of prompts, candidates and scored, shard by shard."""
    outcomes = [_asked(config.pair, strategy) for strategy in OWN_SETTINGS]
    needs = Needs(
        auxiliary="auxiliary" in config.update.needs,
        main=config.pair.agreement,
        lower_is_better=costs(config.score),
    )
    for entry in folders[0].entries():
        prompts, candidates, scored = (folder.read(entry.shard) for folder in folders)
        dropped = [Dropped(**drop) for folder in folders[1:] for drop in folder.entry(entry.shard).drops]
        shard = read_shard(prompts, candidates, scored, needs)
        lengths = {answer.response_id: answer.num_tokens for answer in shard.answers}
        for outcome in outcomes:
            if outcome.config is not None:
                for _, answers, choice in choices_of(shard, dropped, outcome.config, round=round, seed=config.run.seed):
                    outcome.add(choice, len(answers), lengths)
    return outcomes


def _asked(own: PairConfig, strategy: Strategy) -> Outcome:
    is_own = strategy == own.strategy
    lacking = [name for name, default in OWN_SETTINGS[strategy].items() if default is None]
    if lacking and not is_own:
        return Outcome(None, strategy, is_own, why_not=f"needs {' and '.join(lacking)}")
    return Outcome(own.of(strategy), strategy, is_own)


# ---- tables ---------------------------------------------------------------------------------------------------------


@contextmanager
def _newest(config: Config) -> Iterator[list[StageFolder]]:
    """Prompts, candidates and scored of the newest round of the config's run that has all three."""
    with following(config) as folder:
        rounds = round_folders(folder) if folder.exists() else {}
        for _, path in sorted(rounds.items(), reverse=True):
            folders = [StageFolder(path / contract.name, contract) for contract in _CONTRACTS]
            if all(found.is_closed() for found in folders):
                yield folders
                return
    raise InputError(
        config.address() or str(folder),
        wanted="a round with scored candidates",
        got="none" if rounds else "no run there yet",
        fix="run the config until it has scored, or name tables: --prompts TABLE --candidates TABLE --scored TABLE",
    )


@contextmanager
def _given(tables: Sequence[Path]) -> Iterator[list[StageFolder]]:
    """Tables of a run as they are; any others are cut into shards where they are forgotten afterwards."""
    folders = [StageFolder(path.absolute(), contract) for path, contract in zip(tables, _CONTRACTS, strict=True)]
    if made_from_one_another(folders):
        yield folders
        return
    files = {folder.contract.name: parquet_files(folder.path) for folder in folders}
    with TemporaryDirectory(prefix="prefloop-preview-") as scratch:
        cut = [StageFolder(Path(scratch) / contract.name, contract) for contract in _CONTRACTS]
        AdoptTables(files, cut, _SHARD_PROMPTS)(None)
        yield cut


# ---- for people -----------------------------------------------------------------------------------------------------


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("strategy")
    for name in ("pairs", "prompts", "margin", *(f"{quantile:.0%}" for quantile in _QUANTILES), "tokens", "longer"):
        table.add_column(name, justify="right")
    table.add_column("dropped")
    for outcome in outcomes:
        name = f"{outcome.strategy} *" if outcome.is_configs_own else outcome.strategy
        if outcome.config is None:
            table.add_row(name, *["-"] * (len(table.columns) - 2), outcome.why_not)
            continue
        table.add_row(name, *_cells(outcome.figures()))
    table.caption, table.caption_justify = "* the config's own strategy", "left"
    return table


def _cells(figures: Mapping[str, Any]) -> list[str]:
    made = f"{figures['num_pairs']:,}"
    if figures["num_groups"]:
        made = f"{figures['num_groups']:,} groups of {figures['group_size_mean']:.1f}"
    margins = (figures["margin_mean"], *figures["margin_quantiles"].values())
    dropped = [f"{fate} {count:,}" for fate, count in figures["fates"].items() if fate != "paired"]
    tokens, longer = figures["chosen_less_rejected_tokens"], figures["chosen_longer"]
    return [
        made,
        f"{figures['num_prompts_paired']:,}",
        *("-" if value is None else f"{value:.2f}" for value in margins),
        "-" if tokens is None else f"{tokens:+.1f}",
        "-" if longer is None else share(longer, 1),
        "  ".join(filter(None, [*dropped, figures["remark"]])) or "none",
    ]
