"""What all steps of a run share, and the two steps that rounds and evaluations have in common: sample and score."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.console import Bar, Console
from pipeline.crew import Crew
from pipeline.engine_sync import EngineSync
from pipeline.entries import Entry
from pipeline.jobs import answers as jobs
from pipeline.jobs.tables import FindDamages
from pipeline.sources import RewardSource, Sources
from pipeline.stage import Done, Mapper, Stage, run_stage
from pipeline.trackers import Trackers
from stages.contracts import CANDIDATES, SCORED
from stages.errors import StageError
from stages.protocols import Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw
from stages.score.combine import Moments, Term

LOOKED_THROUGH_AT_ONCE = 64
"""Parts; so few are read faster than a task starts."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """A run's config, what it names, who works on it, and where it lies and is told."""

    config: Config
    sources: Sources
    crew: Crew
    console: Console
    folder: Path
    sync: EngineSync
    trackers: Trackers = field(default_factory=Trackers)

    def run_stage(
        self,
        name: str,
        outputs: Sequence[StageFolder],
        fingerprint: Mapping[str, Any],
        num_shards: int,
        jobs: Callable[[list[int]], Sequence[Callable[..., Any]]],
        workers: Callable[[Bar | None], Mapper] | None = None,
    ) -> Done:
        """See `run_stage`; stateless tasks do it where no `workers` are named."""
        workers = workers or (lambda _: self.crew.tasks)
        stage = Stage(name, outputs, fingerprint, num_shards, jobs, workers, self.tell_damage, look=self.damages)
        return run_stage(stage, self.console)

    def tell_damage(self, damage: str) -> None:
        """A line for a published part that is made again, since it is not as it was published."""
        self.console.line("", "damaged", f"{damage}; it is made again")

    def damages(self, folder: StageFolder, shards: Sequence[int]) -> list[tuple[int, str]]:
        """See `StageFolder.damages`; where there are many parts, tasks read them, since the driver is one process."""
        if len(shards) <= LOOKED_THROUGH_AT_ONCE:
            return folder.damages(shards)
        starts = range(0, len(shards), LOOKED_THROUGH_AT_ONCE)
        looks = [FindDamages(folder, tuple(shards[first : first + LOOKED_THROUGH_AT_ONCE])) for first in starts]
        return sorted(damage for found in self.crew.tasks.map(looks) for damage in found)

    # ---- sample -----------------------------------------------------------------------------------------------------

    def sampling(
        self,
        folder: Path,
        prompts: StageFolder,
        weights: Weights,
        config: Config,
        draw: Draw,
        *,
        how: SampleConfig | None = None,
    ) -> Stage:
        """Candidates of a policy, in ``folder/candidates``; sampled as `how` says, else as the config does."""
        out, how = StageFolder(folder / "candidates", CANDIDATES), how or config.sample
        fingerprint = {
            "prompts": prompts.digest(),
            "policy": weights.sha256,
            "dtype": config.policy.dtype,
            "seed": draw.run_seed,
            "stream": draw.stream,
            "sample": how.identity(),
        }
        return Stage(
            "sample",
            [out],
            fingerprint,
            prompts.num_parts(),
            lambda missing: [jobs.SampleShard(i, prompts, out, weights, how, draw) for i in missing],
            lambda _: self.sync.samplers(weights, config),
            self.tell_damage,
            made_from=[prompts],
            look=self.damages,
        )

    def sample(
        self,
        folder: Path,
        prompts: StageFolder,
        weights: Weights,
        config: Config,
        draw: Draw,
        *,
        how: SampleConfig | None = None,
    ) -> tuple[StageFolder, Done]:
        """`sampling`, done."""
        stage = self.sampling(folder, prompts, weights, config, draw, how=how)
        return stage.outputs[0], run_stage(stage, self.console)

    # ---- score ------------------------------------------------------------------------------------------------------

    def scoring(
        self,
        folder: Path,
        prompts: StageFolder,
        candidates: StageFolder,
        config: Config,
        rewards: Sequence[RewardSource],
        *,
        round: int,
    ) -> Stage:
        """The candidates' rewards, in ``folder/scored``; in ``folder/unscaled`` where some are to be standardised."""
        first = StageFolder(folder / ("unscaled" if is_standardised(rewards) else "scored"), SCORED)
        return Stage(
            "score",
            [first],
            {"candidates": candidates.claim(), "rewards": [source.identity() for source in rewards]},
            prompts.num_parts(),
            lambda missing: [jobs.ScoreShard(i, prompts, first, candidates, round) for i in missing],
            lambda _: self.crew.scorers(config, rewards, kept_in=self.folder),
            self.tell_damage,
            made_from=[prompts, candidates],
            look=self.damages,
        )

    def score(
        self,
        folder: Path,
        prompts: StageFolder,
        candidates: StageFolder,
        config: Config,
        rewards: Sequence[RewardSource],
        *,
        round: int,
        scaled_by: Path | None = None,
    ) -> tuple[StageFolder, Done]:
        """`scoring`, done, and what is to be standardised standardised.

        Raises:
            StageError: if too many answers have no finite reward.
        """
        stage = self.scoring(folder, prompts, candidates, config, rewards, round=round)
        done = run_stage(stage, self.console)
        return self.scored(stage, done, folder, config, rewards, round=round, scaled_by=scaled_by)

    def scored(
        self,
        scoring: Stage,
        done: Done,
        folder: Path,
        config: Config,
        rewards: Sequence[RewardSource],
        *,
        round: int,
        scaled_by: Path | None = None,
    ) -> tuple[StageFolder, Done]:
        """What a scoring has come to, in ``folder/scored``.

        Standardised rewards take a second pass: less the mean and by the deviation over all of `folder`'s answers, or
        over those of the folder `scaled_by`.

        Raises:
            StageError: if too many answers have no finite reward.
        """
        (first,) = scoring.outputs
        self._refuse_missing_rewards(done.entries, first, config, round)
        if not is_standardised(rewards):
            return first, done
        basis = StageFolder(scaled_by / "unscaled", SCORED) if scaled_by is not None else first
        out, terms = StageFolder(folder / "scored", SCORED), scaled_terms(rewards, basis.entries())
        scaled = self.run_stage(
            "score",
            [out],
            {"unscaled": first.digest(), "terms": [[t.name, t.weight, t.mean, t.deviation] for t in terms]},
            scoring.num_shards,
            lambda missing: [jobs.SumShard(i, first, out, tuple(terms)) for i in missing],
        )
        return out, Done(scaled.entries, done.seconds + scaled.seconds, done.made or scaled.made)

    def _refuse_missing_rewards(self, entries: Sequence[Entry], table: StageFolder, config: Config, round: int) -> None:
        spread = figures.scored(entries)
        errors, scored = spread["num_errors"], spread["num_scored"]
        assert config.score is not None
        allowed = config.score.max_error_share
        if errors > allowed * (errors + scored):
            table.refuse("rewards missing")
            raise StageError(
                f"round {round}: score",
                wanted=f"finite rewards for all but {allowed:.1%} of the answers (score.max_error_share)",
                got=f"{errors:,} of {errors + scored:,} answers without one{_told(entries)}",
                fix="look at the reward on its own: NaN, infinity, None, or answers longer than its context",
            )


def _told(entries: Sequence[Entry]) -> str:
    """The most frequent reasons for a missing reward, if any were given."""
    reasons = Counter[str]()
    for entry in entries:
        found = {name: count for name, count in entry.stats.items() if name.startswith(jobs.NO_REWARD)}
        reasons.update({name.removeprefix(jobs.NO_REWARD): int(count) for name, count in found.items()})
    return "".join(f"\n{count:,} times {reason}" for reason, count in reasons.most_common(3))


def is_standardised(rewards: Sequence[RewardSource]) -> bool:
    """Whether a reward can only be summed once all answers have it."""
    return any(source.config.scale == "zscore" for source in rewards)


def scaled_terms(rewards: Sequence[RewardSource], entries: Sequence[Entry]) -> list[Term]:
    """The summands of the main rewards, those to standardise by the moments that the parts' entries hold."""
    terms = []
    for source in rewards:
        if source.config.role != "main":
            continue
        moments = Moments()
        if source.config.scale == "zscore":
            for entry in entries:
                moments = moments.merged(jobs.moments_of(entry, source.name))
            terms.append(Term(source.name, source.config.weight, moments.mean, moments.deviation))
        else:
            terms.append(Term(source.name, source.config.weight))
    return terms
