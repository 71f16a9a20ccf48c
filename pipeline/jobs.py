"""Units of work for the workers: open the input shard, call the stage, publish the output shard.

Each is a picklable record whose call does the work, in a worker of `cluster`, and returns entries of manifests or
figures, never rows. All are safe to run twice: what is published is left alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Entry, StageFolder, close_model, found_model
from pipeline.prompts import HeldOut, distinct, draw, prompt_rows, read_rows
from pipeline.tensorboard import StepCurves
from stages.errors import InputError
from stages.protocols import Reward, Sampler, Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw, Dropped, sample
from stages.score.config import PairConfig
from stages.score.pairing import pair
from stages.score.stage import score
from stages.seeds import hashed_seed
from stages.tokenizers import load_tokenizer
from stages.update.rows import answers_of, pair_rows, reference_logps, reference_table


@dataclass(frozen=True, slots=True)
class CheckTokenizers:
    """Load every tokenizer of a run before anything costs time: (folder, pad token, config key) each."""

    tokenizers: Sequence[tuple[Path, str | None, str]]

    def __call__(self, _state: None) -> None:
        for folder, pad_token, key in self.tokenizers:
            load_tokenizer(folder, pad_token=pad_token, key=key)


# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparePrompts:
    """A source of prompts as one table: read, rendered, tokenised, equal rows merged.

    Attributes:
        held_out: keep one side of a held-out share; None keeps all.
        exclude: prompts whose text is left out, because they are evaluated on.
        limit: keep this many, drawn by `seed`; None keeps all in the source's order.
    """

    source: Path
    key: str
    tokenizer: Path
    pad_token: str | None
    columns: Mapping[str, str]
    system: str | None
    out: StageFolder
    seed: int
    held_out: HeldOut | None
    exclude: StageFolder | None
    limit: int | None

    def __call__(self, _state: None) -> list[Entry]:
        tokenizer = load_tokenizer(self.tokenizer, pad_token=self.pad_token, key="policy.path")
        rows = read_rows(self.source, key=self.key)
        everything, merged = distinct(prompt_rows(rows, tokenizer, columns=self.columns, system=self.system))
        table = everything
        if self.held_out is not None:
            kept = [self.held_out.keeps(prompt) for prompt in table["prompt"].to_pylist()]
            table = table.filter(pa.array(kept, pa.bool_()))
        num_evaluated = table.num_rows
        if self.exclude is not None:
            evaluated = pa.concat_tables(self.exclude.read_all())["prompt"]
            table = table.filter(pc.invert(pc.is_in(table["prompt"], evaluated)))
        num_evaluated -= table.num_rows
        if not table.num_rows:
            raise InputError(
                f"{self.key}: {self.source}",
                wanted="at least one prompt",
                got=f"{everything.num_rows} rows, none of which is left" if everything.num_rows else "no row",
                fix="check evaluate.path and evaluate.holdout: what is evaluated on is not trained on"
                if everything.num_rows
                else "check the file's content",
            )
        if self.limit is not None:
            order = draw(table.num_rows, round=1, per_round=min(self.limit, table.num_rows), seed=self.seed)
            table = table.take(order)
        return [self.out.publish(0, table, stats={"merged": merged, "evaluated": num_evaluated})]


@dataclass(frozen=True, slots=True)
class DrawPrompts:
    """A round's prompts from the pool, cut into shards."""

    pool: StageFolder
    out: StageFolder
    round: int
    per_round: int
    shard_size: int
    seed: int

    def __call__(self, _state: None) -> list[Entry]:
        pool = self.pool.read(0)
        table = pool.take(draw(pool.num_rows, round=self.round, per_round=self.per_round, seed=self.seed))
        return _publish_shards(self.out, table, self.round, self.shard_size, [self.pool.entry(0)])


@dataclass(frozen=True, slots=True)
class AllPrompts:
    """Every prompt of a pool, in order, cut into shards."""

    pool: StageFolder
    out: StageFolder
    shard_size: int

    def __call__(self, _state: None) -> list[Entry]:
        return _publish_shards(self.out, self.pool.read(0), 0, self.shard_size, [self.pool.entry(0)])


def _publish_shards(out: StageFolder, table: pa.Table, round: int, size: int, parents: Sequence[Entry]) -> list[Entry]:
    column = table.schema.get_field_index("round")
    table = table.set_column(column, table.schema.field(column), pa.array([round] * table.num_rows, pa.int32()))
    return [
        out.publish(shard, table.slice(start, size), parents=parents)
        for shard, start in enumerate(range(0, table.num_rows, size))
    ]


# ---- sample, score, pair --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SampleShard:
    """One shard's candidates, on an engine."""

    shard: int
    prompts: StageFolder
    out: StageFolder
    weights: Weights
    config: SampleConfig
    draw: Draw

    def __call__(self, sampler: Sampler) -> Entry:
        sampler.load(self.weights)
        prompts = self.prompts.read(self.shard)
        table, dropped = sample(prompts, sampler, self.config, weights=self.weights, draw=self.draw)
        finished = Counter(table["finish_reason"].to_pylist())
        return self.out.publish(
            self.shard,
            table,
            parents=[self.prompts.entry(self.shard)],
            drops=[asdict(drop) for drop in dropped],
            stats={
                "prompts": prompts.num_rows,
                "tokens": sum(len(ids) for ids in table["response_token_ids"].to_pylist()),
                "stop": finished["stop"],
                "length": finished["length"],
            },
        )


@dataclass(frozen=True, slots=True)
class ScoreShard:
    """One shard's rewards, on the scorers."""

    shard: int
    prompts: StageFolder
    candidates: StageFolder
    out: StageFolder
    round: int

    def __call__(self, rewards: Sequence[Reward]) -> Entry:
        candidates = self.candidates.read(self.shard)
        table = score(self.prompts.read(self.shard), candidates, rewards, round=self.round)
        finite = [value for value in table["reward"].to_pylist() if value is not None]
        spread = {"reward_min": min(finite), "reward_max": max(finite)} if finite else {}
        return self.out.publish(
            self.shard,
            table,
            parents=[self.prompts.entry(self.shard), self.candidates.entry(self.shard)],
            stats={"scored": len(finite), "errors": table.num_rows - len(finite), "reward_sum": sum(finite)} | spread,
        )


@dataclass(frozen=True, slots=True)
class PairShard:
    """One shard's pairs and fates."""

    shard: int
    prompts: StageFolder
    candidates: StageFolder
    scored: StageFolder
    pairs: StageFolder
    fates: StageFolder
    config: PairConfig
    round: int

    def __call__(self, _state: None) -> Entry:
        inputs = (self.prompts, self.candidates, self.scored)
        entries = [folder.entry(self.shard) for folder in inputs]
        prompts, candidates, scored = (folder.read(self.shard) for folder in inputs)
        dropped = [Dropped(**drop) for drop in entries[1].drops]
        pairs, fates = pair(prompts, candidates, scored, dropped, self.config, round=self.round)
        assert fates.num_rows == prompts.num_rows, "every prompt has one fate"
        counts = Counter(fates["fate"].to_pylist())
        self.pairs.publish(self.shard, pairs, parents=entries, stats={"margin_sum": sum(pairs["margin"].to_pylist())})
        return self.fates.publish(self.shard, fates, parents=entries, stats=dict(counts))


# ---- update ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScoreReference:
    """The log-probs of all paired answers under one reference, by the training group."""

    pairs: StageFolder
    out: StageFolder
    weights: Weights
    reference: str
    round: int

    def __call__(self, trainer: Any, report: Callable[[Any], None]) -> None:
        trainer.load(self.weights)
        shards = self.pairs.entries()
        answers = {entry.shard: answers_of(pair_rows([self.pairs.read(entry.shard)])) for entry in shards}
        logps = trainer.logps([row for rows in answers.values() for row in rows], progress=report)
        if trainer.rank == 0:
            for entry in shards:
                table = reference_table(
                    answers[entry.shard],
                    logps,
                    weights=self.weights,
                    reference=self.reference,
                    dtype=trainer.dtype,
                    round=self.round,
                )
                self.out.publish(entry.shard, table, parents=[entry])


@dataclass(frozen=True, slots=True)
class UpdatePolicy:
    """A round's update, by the training group: all pairs, then the new policy's folder."""

    start: Weights
    pairs: StageFolder
    references: Sequence[tuple[Weights, StageFolder]]
    folder: Path
    fingerprint: Mapping[str, Any]
    round: int
    seed: int
    curves: StepCurves | None

    def __call__(self, trainer: Any, report: Callable[[Any], None]) -> None:
        policy = self.folder / "policy"
        if found_model(policy, self.fingerprint) is not None:
            return
        trainer.load(self.start)
        rows = pair_rows(self.pairs.read_all())
        references = [reference_logps(folder.read_all(), rows) for _, folder in self.references]
        from_reference = [weights.identity for weights, _ in self.references] == [self.start.identity]
        with self._recorder(trainer, report) as on_step:
            summary = trainer.update(
                rows,
                references,
                from_reference=from_reference,
                seed=hashed_seed("update", self.seed, self.round),
                on_step=on_step,
            )
        trainer.save(self.folder)
        if trainer.rank == 0:
            master = self.folder / "master"
            result = Weights.found(policy, round=self.round, master=master if master.exists() else None)
            close_model(
                policy,
                self.fingerprint,
                sha256=result.sha256,
                master_sha256=result.master_sha256,
                update=asdict(summary),
            )

    @contextmanager
    def _recorder(self, trainer: Any, report: Callable[[Any], None]) -> Iterator[Callable[[dict[str, float]], None]]:
        """What follows an optimizer step on rank 0: a line in ``metrics.jsonl``, a point on every curve, a report."""
        steps_file = self.folder / "metrics.jsonl"
        if trainer.rank == 0:
            steps_file.write_text("", encoding="utf-8")
        with self.curves.plotting() if self.curves and trainer.rank == 0 else nullcontext(lambda _: None) as plot:

            def on_step(metrics: dict[str, float]) -> None:
                with steps_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"round": self.round} | metrics) + "\n")
                plot(metrics)
                report(metrics)

            yield on_step


@dataclass(frozen=True, slots=True)
class EngineGap:
    """How far the engine's log-probs of the paired answers are from the trainer's under the same weights."""

    candidates: StageFolder
    reference: StageFolder

    def __call__(self, _state: None) -> float:
        """Mean absolute difference in nats a token."""
        trainers = {row["response_id"]: row for table in self.reference.read_all() for row in table.to_pylist()}
        gap, num_tokens = 0.0, 0
        for table in self.candidates.read_all():
            for row in table.select(["response_id", "response_logps"]).to_pylist():
                if (found := trainers.get(row["response_id"])) is not None:
                    gap += abs(found["logp"] - sum(row["response_logps"]))
                    num_tokens += found["num_tokens"]
        return gap / max(1, num_tokens)


# ---- evaluation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Evaluate:
    """A policy's figures on held-out prompts, against the first policy's answers to the same prompts."""

    mine: StageFolder
    first: StageFolder

    def __call__(self, _state: None) -> dict[str, Any]:
        from pipeline.evaluate import evaluation_figures

        return evaluation_figures(list(self.mine.read_all()), list(self.first.read_all()))
