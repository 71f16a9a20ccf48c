"""Rejection sampling over a round's shards: scored candidates in, published pairs or groups and fates out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.config_facts import made_by
from pipeline.jobs.answers import PairShard
from pipeline.stage import Done, Stage
from pipeline.workshop import Workshop
from stages.contracts import FATES, GROUPS
from stages.errors import StageError
from stages.score.config import costs


@dataclass(frozen=True, slots=True)
class Paired:
    """What pairing published.

    Attributes:
        made: the pairs, or the groups.
        figures: with a line for a person (`line`); without one row there is none.
    """

    made: StageFolder
    fates: StageFolder
    figures: figures.Figures
    done: Done

    @property
    def num_made(self) -> int:
        return sum(entry.rows for entry in self.made.entries())

    @property
    def line(self) -> str:
        told = figures.grouped_line if self.made.contract is GROUPS else figures.paired_line
        return told(self.figures, self.done.seconds)


def pairing(
    shop: Workshop,
    folder: Path,
    prompts: StageFolder,
    candidates: StageFolder,
    scored: StageFolder,
    config: Config,
    *,
    round: int,
) -> Stage:
    """The pairs, or the groups, in ``folder/pairs`` or ``folder/groups``, and every prompt's fate.

    Where the update trains on auxiliary rewards, an answer without them is of no use.
    """
    needs_auxiliary = "auxiliary" in config.update.needs
    made, fates = (StageFolder(folder / contract.name, contract) for contract in (made_by(config), FATES))
    seed, lower_is_better = config.run.seed, costs(config.score) if config.pair.agreement else frozenset[str]()
    fingerprint = {
        "scored": scored.claim(),
        "candidates": candidates.claim(),
        "pair": config.pair.identity(),
        "seed": seed,
        "needs_auxiliary": needs_auxiliary,
        "lower_is_better": sorted(lower_is_better),
    }

    def job(shard: int) -> PairShard:
        return PairShard(
            shard=shard,
            prompts=prompts,
            candidates=candidates,
            scored=scored,
            out=made,
            fates=fates,
            config=config.pair,
            round=round,
            seed=seed,
            needs_auxiliary=needs_auxiliary,
            lower_is_better=lower_is_better,
        )

    return Stage(
        "pair",
        [made, fates],
        fingerprint,
        prompts.num_parts(),
        lambda missing: [job(shard) for shard in missing],
        lambda _: shop.crew.tasks,
        shop.tell_damage,
        made_from=[prompts, candidates, scored],
        look=shop.damages,
    )


def paired(stage: Stage, done: Done) -> Paired:
    """What a finished `pairing` has made."""
    made, fates = stage.outputs
    summed = figures.grouped if made.contract is GROUPS else figures.paired
    return Paired(made, fates, summed(made.entries(), done.entries), done)


def nothing_made(found: Paired, scores: figures.Figures | None, *, round: int) -> StageError:
    """The refusal of a round without a row to train on.

    Args:
        scores: the round's `figures.scored`, where it scored the candidates itself.
    """
    counts, kind = found.figures, found.made.contract.name.removesuffix("s")
    fates = ", ".join(f"{fate} {count}" for fate, count in counts["fates"].items())
    spread = f"\nrewards from {scores['min']:.6g} to {scores['max']:.6g}" if scores and scores["num_scored"] else ""
    return StageError(
        f"round {round}: pair",
        wanted=f"at least one {kind} to train on",
        got=f"none from {counts['num_prompts']} prompts: {fates}{spread}",
        fix="gap_too_small: lower pair.min_margin; all_truncated: raise sample.max_new_tokens; "
        "duplicate_answers or tied: raise sample.temperature or sample.num_generations; "
        "disagreement: pair.agreement=false; no_pair_by_rule: see the details in the table of fates, and "
        "prefloop pair --preview; prompt_too_long: shorter prompts or a smaller sample.max_new_tokens"
        + (_FOR_THIS_ROUND if round > 1 else ""),
    )


_FOR_THIS_ROUND = (
    ".\nSettled rounds keep their settings: write rounds as a list, and override this round alone, for example "
    "rounds: [{}, {pair: {min_margin: 0}}]"
)
