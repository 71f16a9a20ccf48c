"""How fast answers become pairs on one core: shards like a real round's, each strategy, one JSON line a case.

    python benchmarks/pairing.py --candidates 1000000

A case makes its shards one after another (1,024 prompts, 16 answers of 128 tokens each), and takes only the time of
pairing: joining, grouping, the rule, and the tables of pairs and fates. ``--publish FOLDER`` goes through the run's own
job instead: parts read, checked by hash, paired, synced and written. On a machine that others use, `cpu_seconds` is the
figure to look at. Peak memory is that of the whole process, the making of the shards among it; two sizes show that it
does not grow with their number.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from pipeline.artifacts import StageFolder
from pipeline.jobs.answers import PairShard
from stages.contracts import CANDIDATES, FATES, GROUPS, PAIRS, PROMPTS, REWARD, SCORED
from stages.score.config import PairConfig
from stages.score.pairing.stage import pair

PROMPTS_A_SHARD, PROMPT_TOKENS, ANSWER_TOKENS = 1024, 64, 128

CASES = {
    "best_worst": {},
    "best_worst with every option": {
        "length_penalty": 0.001,
        "min_margin": 0.1,
        "max_length_ratio": 1.5,
        "agreement": True,
    },
    "all_above": {"strategy": "all_above"},
    "all_above, 4 a prompt": {"strategy": "all_above", "max_pairs": 4},
    "best_random": {"strategy": "best_random"},
    "best_second": {"strategy": "best_second"},
    "top_bottom": {"strategy": "top_bottom"},
    "gap_band": {"strategy": "gap_band", "low": 0.7, "high": 0.9, "unit": "quantile", "max_pairs": 4},
    "correct_wrong": {"strategy": "correct_wrong", "num_pairs": 4},
    "mean_minus_2sd": {"strategy": "mean_minus_2sd"},
    "statistical": {"strategy": "statistical"},
    "groups": {"strategy": "groups"},
}


def shard(number: int, num_prompts: int, num_generations: int) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Prompts, candidates and scored of one shard; one answer in eight repeats another's text, one in fifty is cut."""
    rng = np.random.default_rng(number)
    rows = num_prompts * num_generations
    prompt_ids = [f"{number:016x}{p:016x}" for p in range(num_prompts)]
    repeated = np.where(rng.random(rows) < 1 / 8, 1, 0)  # the text of the answer before
    texts = ["".join((f"answer {row} ", "word " * ANSWER_TOKENS)) for row in np.maximum(np.arange(rows) - repeated, 0)]
    lengths = rng.integers(ANSWER_TOKENS // 2, ANSWER_TOKENS * 3 // 2, rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    reward, other = rng.normal(0, 1.5, rows), rng.normal(0, 1.5, rows)
    prompts = {
        "prompt_id": prompt_ids,
        "prompt": [f"prompt {p} " + "word " * PROMPT_TOKENS for p in range(num_prompts)],
        "conversation": pa.nulls(num_prompts, PROMPTS.schema.field("conversation").type),
        "prompt_token_ids": [list(range(PROMPT_TOKENS))] * num_prompts,
        "answer": pa.nulls(num_prompts, pa.string()),
        "extra": ["{}"] * num_prompts,
    }
    ids = {"response_id": [f"{number:016x}{i:016x}" for i in rng.permutation(rows)]}
    ids |= {"prompt_id": np.repeat(prompt_ids, num_generations)}
    candidates = {
        "stream": ["policy"] * rows,
        "sample_index": np.tile(np.arange(num_generations, dtype=np.int16), num_prompts),
        "response": texts,
        "response_token_ids": pa.ListArray.from_arrays(
            offsets, pa.array(rng.integers(0, 32000, offsets[-1].as_py(), np.int32))
        ),
        "response_logps": pa.ListArray.from_arrays(offsets, pa.array(np.full(offsets[-1].as_py(), -1.0, np.float32))),
        "finish_reason": np.where(rng.random(rows) < 0.02, "length", "stop"),
        "policy_version": ["w" * 64] * rows,
        "policy_round": np.zeros(rows, np.int32),
        "seed": np.arange(rows),
    }
    names = pa.array(["judge", "other"] * rows), pa.array(["main"] * 2 * rows)
    single = pa.StructArray.from_arrays(
        [names[0], pa.array(np.stack([reward, other], 1).ravel()), names[1]], fields=list(REWARD)
    )
    scored = {
        "reward": reward + other,
        "rewards": pa.ListArray.from_arrays(pa.array(np.arange(0, 2 * rows + 1, 2, dtype=np.int32)), single),
    }
    found = ((PROMPTS, prompts), (CANDIDATES, ids | candidates), (SCORED, ids | scored))
    return tuple(  # type: ignore[return-value]
        pa.table(
            {
                name: columns.get(name, np.ones(len(next(iter(columns.values()))), np.int32))
                for name in contract.schema.names
            },
            schema=contract.schema,
        )
        for contract, columns in found
    )


def measure(name: str, num_candidates: int, num_generations: int, *, publish: bool) -> dict[str, object]:
    """One case, in this process."""
    config = PairConfig(**CASES[name])  # type: ignore[arg-type]
    num_prompts = -(-num_candidates // num_generations)
    seconds, cpu_seconds, pairs = 0.0, 0.0, 0
    for number, start in enumerate(range(0, num_prompts, PROMPTS_A_SHARD)):
        tables = shard(number, min(PROMPTS_A_SHARD, num_prompts - start), num_generations)
        if publish:
            with TemporaryDirectory() as folder:
                job, out = job_of(Path(folder), tables, config)
                began = time.perf_counter(), time.process_time()
                job(None)
                pairs += out.entry(0).rows
                ended = time.perf_counter(), time.process_time()
        else:
            began = time.perf_counter(), time.process_time()
            pairs += pair(*tables, [], config, round=1, seed=0)[0].num_rows
            ended = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = seconds + ended[0] - began[0], cpu_seconds + ended[1] - began[1]
    return {
        "case": name,
        "published": publish,
        "candidates": num_prompts * num_generations,
        "num_generations": num_generations,
        "prompts_a_shard": PROMPTS_A_SHARD,
        "answer_tokens": ANSWER_TOKENS,
        "cores": len(os.sched_getaffinity(0)),
        "rows_made": pairs,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "candidates_per_s": round(num_prompts * num_generations / seconds),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def job_of(folder: Path, tables: tuple[pa.Table, ...], config: PairConfig) -> tuple[PairShard, StageFolder]:
    """The run's own job on one shard, whose tables are published here, and where it publishes."""
    given = [StageFolder(folder / contract.name, contract) for contract in (PROMPTS, CANDIDATES, SCORED)]
    for stage, table in zip(given, tables, strict=True):
        stage.publish(0, table)
    contract = GROUPS if config.strategy == "groups" else PAIRS
    out, fates = StageFolder(folder / contract.name, contract), StageFolder(folder / "fates", FATES)
    prompts, candidates, scored = given
    job = PairShard(
        shard=0,
        prompts=prompts,
        candidates=candidates,
        scored=scored,
        out=out,
        fates=fates,
        config=config,
        round=1,
        seed=0,
    )
    return job, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, nargs="+", default=[100_000, 1_000_000], help="a case for each")
    parser.add_argument("--num-generations", type=int, default=16)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--publish", action="store_true", help="read and write Parquet as a run does")
    asked = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    if len(asked.case) * len(asked.candidates) == 1:
        found = measure(asked.case[0], asked.candidates[0], asked.num_generations, publish=asked.publish)
        print(json.dumps(found), flush=True)
        return
    for name in asked.case:
        for count in asked.candidates:  # each in a process of its own, whose peak memory is its own
            own = ["--case", name, "--candidates", str(count), "--num-generations", str(asked.num_generations)]
            more = ["--publish"] if asked.publish else []
            subprocess.run([sys.executable, __file__, *own, *more], check=True)


if __name__ == "__main__":
    main()
