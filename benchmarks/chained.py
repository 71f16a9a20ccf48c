"""A finished run's round again, as scripts chain it: each stage a program of its own, one after another, without Ray.

    python benchmarks/chained.py sample RUN ROUND OUT        and so on: score, pair, update (under torchrun), evaluate

Comes in: a run's folder, with the round's prompts and start policy in it. Goes out: the same tables and policy, in
another folder; equal seeds make them equal to the last bit, so that both sides are known to have done the same work.
Each program does what a script would: import, load its models, work through all shards, end.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.config_facts import one_answer
from pipeline.config_file import load_config
from pipeline.jobs.answers import Evaluate, PairShard, SampleShard, ScoreShard
from pipeline.sources import RewardSource, find_sources
from stages.contracts import CANDIDATES, FATES, PAIRS, PROMPTS, REFERENCE_LOGPS, SCORED
from stages.protocols import Reward, Weights
from stages.sample.config import SampleConfig
from stages.sample.stage import Draw
from stages.score.config import FunctionReward
from stages.vocab import EVALUATION_STREAM, POLICY_STREAM

PROGRAMS = ("sample", "score", "pair", "update", "evaluate")


@dataclass(frozen=True, slots=True)
class Work:
    """What every program knows.

    Attributes:
        run: the finished run's folder.
        number: the round to do again.
        out: where this chain's tables and policy go.
    """

    run: Path
    number: int
    out: Path

    @property
    def config(self) -> Config:
        return load_config(self.run / "config.yaml", []).for_round(self.number)

    @property
    def start(self) -> Weights:
        return Weights.found(self.run / f"round-{self.number - 1:04d}" / "policy", round=self.number - 1)

    @property
    def prompts(self) -> StageFolder:
        return StageFolder(self.run / f"round-{self.number:04d}" / "prompts", PROMPTS)

    @property
    def candidates(self) -> StageFolder:
        return StageFolder(self.out / "candidates", CANDIDATES)

    @property
    def scored(self) -> StageFolder:
        return StageFolder(self.out / "scored", SCORED)

    @property
    def pairs(self) -> StageFolder:
        return StageFolder(self.out / "pairs", PAIRS)


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def sample(work: Work) -> None:
    config, draw = work.config, Draw(work.config.run.seed, work.number, work.number, POLICY_STREAM)
    _sample(config, config.sample, work.prompts, work.candidates, work.start, draw)


def _sample(
    config: Config, how: SampleConfig, prompts: StageFolder, out: StageFolder, weights: Weights, draw: Draw
) -> None:
    from stages.sample.vllm_sampler import VLLMSampler

    engine = VLLMSampler(
        config.sample.engine(),
        dtype=config.policy.dtype,
        num_threads=num_cores(),
        use_gpu=False,
        seed=config.run.seed,
    )
    for entry in prompts.entries():
        SampleShard(entry.shard, prompts, out, weights, how, draw)(engine)
    engine.close()


def score(work: Work) -> None:
    _score(_rewards(work.config), work.prompts, work.candidates, work.scored, work.number)


def _score(
    rewards: Sequence[Reward], prompts: StageFolder, candidates: StageFolder, out: StageFolder, number: int
) -> None:
    for entry in prompts.entries():
        ScoreShard(entry.shard, prompts, out, candidates, number)(rewards)


def _rewards(config: Config) -> list[Reward]:
    return [_reward(source) for source in find_sources(config, needs=("rewards",)).of(0).rewards]


def _reward(source: RewardSource) -> Reward:
    from stages.score.functions import FunctionScorer
    from stages.score.reward_model import RewardModel

    if isinstance(source.config, FunctionReward):
        return FunctionScorer(source.name, source.config.role, source.config.weight, source.config.target)
    assert source.folder is not None
    return RewardModel(
        source.config, name=source.name, folder=source.folder, key=source.key, num_threads=num_cores(), use_gpu=False
    )


def pair(work: Work) -> None:
    config, fates = work.config, StageFolder(work.out / "fates", FATES)
    for entry in work.prompts.entries():
        PairShard(
            shard=entry.shard,
            prompts=work.prompts,
            candidates=work.candidates,
            scored=work.scored,
            out=work.pairs,
            fates=fates,
            config=config.pair,
            round=work.number,
            seed=config.run.seed,
        )(None)


def update(work: Work) -> None:
    """On every rank of torchrun."""
    import torch.distributed as dist

    from pipeline.jobs.probes import ProbeFolder
    from pipeline.jobs.training import ScoreRows, UpdatePolicy, step_journal

    dist.init_process_group("gloo")
    config, start, trainer = work.config, work.start, _trainer(work.config)
    logps = StageFolder(work.out / "reference_logps", REFERENCE_LOGPS)
    common: dict[str, Any] = {"config": config.update, "round": work.number}
    ScoreRows(data=work.pairs, out=logps, weights=start, reference="round_start", **common)(trainer, _unreported)
    dist.barrier()  # rank 0 has written them
    UpdatePolicy(
        start=start,
        data=work.pairs,
        references=[(start, logps)],
        folder=work.out,
        fingerprint={},
        seed=config.run.seed,
        curves=None,
        auxiliary_weights={},
        stream=None,
        value_head=None,
        moments=None,
        journal=step_journal(work.out),
        probe=ProbeFolder(work.out / "probe"),
        **common,
    )(trainer, _unreported)
    dist.destroy_process_group()


def evaluate(work: Work) -> None:
    """Answers, rewards, figures and divergence in one program: kinder to the chain than a program for each."""
    import torch.distributed as dist

    from pipeline.jobs.training import Divergence, ScoreCandidates

    base = load_config(work.run / "config.yaml", [])
    folder, prompts = work.out / "evaluation", StageFolder(work.run / "evaluation" / "prompts", PROMPTS)
    candidates, scored = StageFolder(folder / "candidates", CANDIDATES), StageFolder(folder / "scored", SCORED)
    result = Weights.found(work.out / "policy", round=work.number)
    draw = Draw(base.run.seed, work.number, 0, EVALUATION_STREAM)
    _sample(base, one_answer(base.sample), prompts, candidates, result, draw)
    _score(_rewards(base), prompts, candidates, scored, work.number)
    first_scored = StageFolder(work.run / "round-0000" / "evaluation" / "scored", SCORED)
    found = Evaluate(scored, candidates, first_scored, {})(None)
    store = f"file://{folder.absolute()}/store"
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    logps = StageFolder(folder / "reference_logps", REFERENCE_LOGPS)
    first = find_sources(base, needs=("policy",)).policy
    ScoreCandidates(
        out=logps,
        weights=first,
        reference="initial",
        config=base.update,
        round=work.number,
        prompts=prompts,
        candidates=candidates,
    )(_trainer(base), _unreported)
    print(found["reward"], Divergence(candidates, logps)(None))
    dist.destroy_process_group()


def _trainer(config: Config) -> Any:
    import torch.distributed as dist

    from stages.update.allocation import keep_freed_memory
    from stages.update.worker import Trainer

    keep_freed_memory()  # as the trainer's process of a run does
    return Trainer(
        config.update,
        dtype=config.policy.dtype,
        pad_token=config.policy.pad_token,
        num_threads=max(1, num_cores() // dist.get_world_size()),
    )


def _unreported(_: Any) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("run", type=Path)
    parser.add_argument("round", type=int)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    programs: list[Callable[[Work], None]] = [sample, score, pair, update, evaluate]
    programs[PROGRAMS.index(asked.program)](Work(asked.run, asked.round, asked.out))


if __name__ == "__main__":
    main()
