"""One round's steps, each of them skipped where its result is published, checked, timed and told in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import figures, jobs
from pipeline.artifacts import StageFolder, found_model, read_json, refuse_changed_model, write_json
from pipeline.console import Stopwatch, duration
from pipeline.stage import Done, Stage, run_stage
from pipeline.tensorboard import plot_evaluation, step_curves
from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, REFERENCE_LOGPS, SCORED, Contract
from stages.errors import StageError
from stages.protocols import Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw
from stages.vocab import EVALUATION_STREAM, POLICY_STREAM

if TYPE_CHECKING:
    from pipeline.run import Run


ENGINE_GAP_LIMIT = 0.1  # nats a token; float32 differs by 1e-7, bfloat16 by some 1e-2

References = Sequence[tuple[Weights, StageFolder]]
"""The references of a round, each with the tables of its log-probs."""


class Round:
    """A round of a run.

    Args:
        run: the run it belongs to.
        number: counted from 1; 0 is the evaluation before the first round.
        start: the policy that samples and is trained.
        references: the policies that the objective refers to.
    """

    def __init__(self, run: Run, number: int, start: Weights, references: Sequence[Weights]) -> None:
        self.run, self.number, self.start, self.references = run, number, start, tuple(references)
        self.folder: Path = run.folder / f"round-{number:04d}"
        self.figures: figures.Figures = {}

    # ---- collect ----------------------------------------------------------------------------------------------------

    def collect(self, start: Weights) -> StageFolder:
        """Sample, score and pair; the pairs as a handle on their shards.

        Raises:
            StageError: if too many answers have no finite reward, all rewards are equal, or there is no pair.
        """
        config = self.run.config
        prompts = self._folder(PROMPTS)
        num_shards = -(-config.prompts.per_round // config.prompts.shard_size)
        draw_prompts = jobs.DrawPrompts(
            self.run.pool, prompts, self.number, config.prompts.per_round, config.prompts.shard_size, config.run.seed
        )
        fingerprint = {
            "pool": self.run.pool.digest(),
            "per_round": config.prompts.per_round,
            "shard_size": config.prompts.shard_size,
            "seed": config.run.seed,
        }
        self._run_stage(
            "prompts", [prompts], fingerprint, num_shards, lambda _: [draw_prompts], lambda _: self.run.crew.tasks
        )

        draw = Draw(config.run.seed, self.number, self.number, POLICY_STREAM)
        candidates, scored = self._sample_and_score(self.folder, prompts, start, config.sample, draw)
        return self._pair(prompts, candidates, scored)

    def _sample_and_score(
        self, folder: Path, prompts: StageFolder, weights: Weights, config: SampleConfig, draw: Draw
    ) -> tuple[StageFolder, StageFolder]:
        """Candidates of a policy and their rewards."""
        run, num_shards = self.run, len(prompts.entries())
        candidates, scored = StageFolder(folder / "candidates", CANDIDATES), StageFolder(folder / "scored", SCORED)
        sampled = self._run_stage(
            "sample",
            [candidates],
            {
                "prompts": prompts.digest(),
                "policy": weights.sha256,
                "dtype": run.config.policy.dtype,
                "seed": draw.run_seed,
                "stream": draw.stream,
                "sample": config.identity(),
            },
            num_shards,
            lambda missing: [jobs.SampleShard(i, prompts, candidates, weights, config, draw) for i in missing],
            lambda _: run.crew.samplers,
        )
        answers = figures.sampled(sampled.entries)
        if draw.stream == POLICY_STREAM:
            self.figures["sample"] = answers
            made_now = sampled.made / num_shards
            self._tell("sample", figures.sampled_line(answers, sampled.seconds, made_now=made_now), sampled)
        rewarded = self._run_stage(
            "score",
            [scored],
            {"candidates": candidates.digest(), "rewards": [source.identity() for source in run.sources.rewards]},
            num_shards,
            lambda missing: [jobs.ScoreShard(i, prompts, candidates, scored, draw.round) for i in missing],
            lambda _: run.crew.scorers,
        )
        spread = figures.scored(rewarded.entries)
        self._refuse_missing_rewards(spread, scored)
        if draw.stream == POLICY_STREAM:
            self._refuse_equal_rewards(spread, scored)
            self.figures["score"] = spread
            self._tell("score", figures.scored_line(spread, rewarded.seconds), rewarded)
        return candidates, scored

    def _pair(self, prompts: StageFolder, candidates: StageFolder, scored: StageFolder) -> StageFolder:
        config = self.run.config.pair
        pairs, fates = self._folder(PAIRS), self._folder(FATES)
        done = self._run_stage(
            "pair",
            [pairs, fates],
            {"scored": scored.digest(), "candidates": candidates.digest(), "pair": config.identity()},
            len(prompts.entries()),
            lambda missing: [
                jobs.PairShard(i, prompts, candidates, scored, pairs, fates, config, self.number) for i in missing
            ],
            lambda _: self.run.crew.tasks,
        )
        self.figures["pairs"] = figures.paired(pairs.entries(), done.entries)
        if not self.figures["pairs"]["num_pairs"]:
            for refused in (pairs, fates):
                refused.refuse("no pair")
            raise self._no_pair()
        self._tell("pair", figures.paired_line(self.figures["pairs"], done.seconds), done)
        return pairs

    def _no_pair(self) -> StageError:
        pairs, scores = self.figures["pairs"], self.figures["score"]
        fates = ", ".join(f"{fate} {count}" for fate, count in pairs["fates"].items())
        spread = "no reward" if scores["min"] is None else f"rewards from {scores['min']:.6g} to {scores['max']:.6g}"
        return StageError(
            f"round {self.number}: pair",
            wanted="at least one pair to train on",
            got=f"none from {pairs['num_prompts']} prompts: {fates}\n{spread}",
            fix="gap_too_small: lower pair.min_margin; all_truncated: raise sample.max_new_tokens; "
            "duplicate_answers or tied: raise sample.temperature or sample.num_generations; "
            "prompt_too_long: shorter prompts or a smaller sample.max_new_tokens",
        )

    def _refuse_missing_rewards(self, spread: figures.Figures, table: StageFolder) -> None:
        errors, scored = spread["num_errors"], spread["num_scored"]
        allowed = self.run.config.score.max_error_share
        if errors > allowed * (errors + scored):
            table.refuse("rewards missing")
            raise StageError(
                f"round {self.number}: score",
                wanted=f"finite rewards for all but {allowed:.1%} of the answers (score.max_error_share)",
                got=f"{errors:,} of {errors + scored:,} answers without one",
                fix="look at the reward on its own: NaN, infinity, None, or answers longer than its context",
            )

    def _refuse_equal_rewards(self, spread: figures.Figures, table: StageFolder) -> None:
        scored = spread["num_scored"]
        if scored > 1 and spread["min"] == spread["max"]:
            table.refuse("rewards all equal")
            raise StageError(
                f"round {self.number}: score",
                wanted="rewards that tell answers apart",
                got=f"{spread['min']:.6g} for every one of {scored:,} answers",
                fix="check the reward model (an untrained head gives a constant) or the reward function",
            )

    # ---- update -----------------------------------------------------------------------------------------------------

    def reference_logps(self, data: StageFolder, references: Sequence[Weights]) -> References:
        """The log-probs of all paired answers under each reference, from the training group."""
        run, tables = self.run, []
        num_pairs = sum(entry.rows for entry in data.entries())
        for index, weights in enumerate(references):
            folder = "reference_logps" if len(references) == 1 else f"reference_logps-{index}"
            out = StageFolder(self.folder / folder, REFERENCE_LOGPS)
            job = jobs.ScoreReference(data, out, weights, run.config.reference, self.number)
            done = self._run_stage(
                "reference",
                [out],
                {"pairs": data.digest(), "weights": weights.identity, "dtype": run.config.policy.dtype},
                len(data.entries()),
                lambda _, job=job: [job],  # type: ignore[misc]
                lambda bar: _OneByOne(run.crew.trainers, lambda scored: bar.at(scored, 2 * num_pairs)),
            )
            num_answers = sum(entry.rows for entry in done.entries)
            told = f"{num_answers:,} answers   {duration(done.seconds)}   under the policy of round {weights.round}"
            if weights.identity == self.start.identity:
                gap = run.crew.tasks.run(jobs.EngineGap(self._folder(CANDIDATES), out))
                self.figures["engine_gap"] = gap
                self._refuse_engine_gap(gap)
                told += f", its start; the engine differs by {gap:.0e} nats a token"
            self._tell("reference", told, done)
            tables.append((weights, out))
        return tables

    def _refuse_engine_gap(self, gap: float) -> None:
        if gap > ENGINE_GAP_LIMIT:
            raise StageError(
                f"round {self.number}: reference",
                wanted=f"log-probs of engine and trainer within {ENGINE_GAP_LIMIT} nats a token of each other",
                got=f"{gap:.3g}: the answers were not sampled from the policy that would be trained",
                fix="see that the policy's folder is whole, then delete the round's folder and run again; "
                "if it stays so, vLLM and transformers disagree on this model",
            )

    def update(self, start: Weights, data: StageFolder, references: References) -> Weights:
        """Train from `start` on all pairs; the new policy, published in the round's folder."""
        run, policy = self.run, self.folder / "policy"
        fingerprint = {
            "pairs": data.digest(),
            "start": start.identity,
            "references": [weights.identity for weights, _ in references],
            "update": run.config.update.identity(),
            "dtype": run.config.policy.dtype,
            "pad_token": run.config.policy.pad_token,
            "seed": run.config.run.seed,
        }
        watch = Stopwatch()
        manifest = found_model(policy, fingerprint)
        if manifest is None:
            seed = run.config.run.seed
            curves = step_curves(run.folder, round=self.number) if run.config.run.tensorboard else None
            job = jobs.UpdatePolicy(start, data, references, self.folder, fingerprint, self.number, seed, curves)
            with run.console.bar("update", total=None) as bar:
                run.crew.trainers.run(job, on_report=lambda step: bar.at(step["step"], step["steps"]))
            manifest = found_model(policy, fingerprint)
            assert manifest is not None, "the training group published no policy"
            self._tell("update", figures.updated_line(manifest["update"], watch.seconds))
        self.figures["update"] = manifest["update"]
        master = self.folder / "master" if manifest["master_sha256"] else None
        return Weights(policy, manifest["sha256"], self.number, master, manifest["master_sha256"])

    # ---- evaluate ---------------------------------------------------------------------------------------------------

    def evaluate(self, policy: Weights) -> dict[str, Any]:
        """The figures of a policy on the held-out prompts; empty where the config evaluates nothing."""
        run = self.run
        if run.evaluation is None:
            return {}
        watch, folder = Stopwatch(), self.folder / "evaluation"
        found_done = StageFolder(folder / "scored", SCORED).is_closed()
        draw = Draw(run.config.run.seed, self.number, 0, EVALUATION_STREAM)
        _, scored = self._sample_and_score(folder, run.evaluation, policy, one_answer(run.config.sample), draw)
        first = StageFolder(run.folder / "round-0000" / "evaluation" / "scored", SCORED)
        found: figures.Figures = run.crew.tasks.run(jobs.Evaluate(scored, first))
        if not found["num_prompts"]:
            raise StageError(
                f"round {self.number}: evaluate",
                wanted="an answer with a reward to at least one held-out prompt",
                got=f"none to {sum(entry.rows for entry in run.evaluation.entries())} prompts",
                fix="check that evaluation prompts leave room for sample.max_new_tokens in the context",
            )
        self.figures["evaluate"] = found
        if not found_done:
            self._tell("evaluate", figures.evaluated_line(found, watch.seconds))
        return found

    # ---- what all steps share ---------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides this round's result, as far as it is known before it runs."""
        config = self.run.config
        return {
            "start": self.start.identity,
            "references": [weights.identity for weights in self.references],
            "policy_files": self.run.sources.policy_files,
            "pad_token": config.policy.pad_token,
            "pool": self.run.pool.digest(),
            "evaluation": self.run.evaluation.digest() if self.run.evaluation else None,
            "rewards": [source.identity() for source in self.run.sources.rewards],
            "seed": config.run.seed,
            "dtype": config.policy.dtype,
            "per_round": config.prompts.per_round,
            "shard_size": config.prompts.shard_size,
            "sample": config.sample.identity(),
            "pair": config.pair.identity(),
            "update": config.update.identity(),
        }

    def refuse_damaged(self) -> None:
        """Check that what a settled round published is whole.

        Raises:
            ContractError: naming the first file that is not.
        """
        for contract in (PROMPTS, CANDIDATES, SCORED, PAIRS, FATES, REFERENCE_LOGPS):
            self._folder(contract).refuse_damaged()
        refuse_changed_model(self.folder / "policy")

    def write_report(self, decision: str, reason: str) -> None:
        """The round's figures, and what was decided on them."""
        file, run = self.folder / "report.json", self.run
        evaluated, told = self.figures.get("evaluate"), read_json(file).get("evaluate") if file.exists() else None
        if run.config.run.tensorboard and evaluated and evaluated != told:
            plot_evaluation(run.folder, round=self.number, figures=evaluated)
        write_json(file, {"round": self.number, "decision": decision, "reason": reason} | self.figures)

    def _folder(self, contract: Contract) -> StageFolder:
        return StageFolder(self.folder / contract.name, contract)

    def _run_stage(self, name: str, outputs: Any, fingerprint: Any, num_shards: int, make: Any, workers: Any) -> Done:
        return run_stage(Stage(name, outputs, fingerprint, num_shards, make, workers), self.run.console)

    def _tell(self, stage: str, text: str, done: Done | None = None) -> None:
        """A line for a stage that did something now."""
        if done is None or done.made:
            where = f"round {self.number}/{self.run.config.rounds}" if self.number else "before"
            self.run.console.line(where, stage, text)


class _OneByOne:
    """The training group in the place of a mapper: jobs one after another, each on all ranks."""

    def __init__(self, group: Any, on_report: Callable[[Any], None]) -> None:
        self._group, self._on_report = group, on_report

    def map(self, todo: Sequence[Any]) -> list[Any]:
        return [self._group.run(job, on_report=self._on_report) for job in todo]


def one_answer(config: SampleConfig) -> SampleConfig:
    """How evaluations sample: one answer a prompt from the policy itself, at temperature 1 and without truncation."""
    plain = {"num_generations": 1, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return config.model_copy(update=plain)
