"""One side of the sampling case, in a process of its own: the sampling stage of a run, or bare vLLM on its prompts.

    python benchmarks/sampling.py stage FOLDER NUM_PROMPTS     publishes the prompts, samples them, prints its figures
    python benchmarks/sampling.py bare FOLDER NUM_PROMPTS      the same prompts, seeds and settings in one `generate`

Both have the quickstart's policy and settings, and an engine that has sampled before. The stage's time runs from its
begin to its closed manifest: reading prompts, seeds, tables, hashes and files are in it, scoring is not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.config_file import load_config
from stages.contracts import PROMPTS
from stages.sample.stage import Draw
from stages.vocab import POLICY_STREAM

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
DRAW = Draw(0, 1, 1, POLICY_STREAM)


def stage(folder: Path, num_prompts: int) -> dict[str, Any]:
    """The run's own stage, on the actor that a run samples with."""
    from pipeline import figures
    from pipeline.config_facts import one_answer
    from pipeline.console import Console
    from pipeline.jobs.inputs import AllPrompts
    from pipeline.start import opened

    config = load_config(QUICKSTART, [])
    with opened(config, folder, Console(), needs=("policy", "prompts")) as shop:
        from pipeline.pools import read_prompts  # it imports Ray, which reads an environment that `opened` sets

        source, pool, prompts = shop.sources.of(1).prompts, StageFolder(folder / "pool", PROMPTS), _prompts(folder)
        assert source is not None and config.prompts is not None
        read_prompts(shop, pool, source, config.prompts, limit=num_prompts)
        size = config.prompts.shard_size
        cut = AllPrompts(pool, prompts, size)
        shop.run_stage("prompts", [prompts], {}, -(-num_prompts // size), lambda _: [cut])
        weights = shop.sources.policy
        shop.sample(folder / "warm", prompts, weights, config, DRAW, how=one_answer(config.sample))
        _, done = shop.sample(folder, prompts, weights, config, DRAW)
        return _told(int(figures.total(done.entries, "tokens")), done.seconds)


def bare(folder: Path, num_prompts: int) -> dict[str, Any]:
    """`vllm.LLM.generate` as a script calls it: all prompts at once."""
    cores = sorted(os.sched_getaffinity(0))
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # faster here than the default, and what the stage's engine has
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    from vllm import LLM, SamplingParams

    from pipeline.sources import find_sources

    config = load_config(QUICKSTART, [])
    llm = LLM(
        model=str(find_sources(config, needs=("policy",)).policy.path),
        dtype=config.policy.dtype,
        generation_config="vllm",
        disable_log_stats=True,
        enforce_eager=True,
        enable_chunked_prefill=False,  # a seeded request must not be split on a CPU
        max_num_batched_tokens=4096,
    )
    rows = [row for table in _prompts(folder).read_all() for row in table.to_pylist()]
    assert len(rows) == num_prompts
    prompts = [{"prompt_token_ids": row["prompt_token_ids"]} for row in rows]
    params = [_params(SamplingParams, config, row["prompt_id"], config.sample.num_generations) for row in rows]
    llm.generate(prompts, [_params(SamplingParams, config, row["prompt_id"], 1) for row in rows], use_tqdm=False)
    llm.reset_prefix_cache()
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return _told(sum(len(answer.token_ids) for output in outputs for answer in output.outputs), seconds)


def _params(kind: Any, config: Config, prompt_id: str, num_generations: int) -> Any:
    how = config.sample
    return kind(
        n=num_generations,
        temperature=how.temperature,
        top_p=how.top_p,
        top_k=how.top_k,
        min_p=how.min_p,
        max_tokens=how.max_new_tokens,
        logprobs=0,
        seed=DRAW.seed(prompt_id),
    )


def _prompts(folder: Path) -> StageFolder:
    return StageFolder(folder / "prompts", PROMPTS)


def _told(num_tokens: int, seconds: float) -> dict[str, Any]:
    return {"tokens": num_tokens, "seconds": round(seconds, 2), "tokens_per_s": round(num_tokens / seconds)}


if __name__ == "__main__":
    side, folder, num_prompts = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    print(json.dumps({"stage": stage, "bare": bare}[side](folder, num_prompts)), flush=True)
