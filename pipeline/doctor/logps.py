"""Log-probs of a few answers by an engine and by a trainer, each for a process of its own, without Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.apart import be_quiet
from stages.protocols import SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.update.config import UpdateConfig

_MOST_TOKENS = 32  # of an answer
_SEED = 1 << 40


def engine_logps(
    folder: Path, config: SampleConfig, dtype: str, prompts: Sequence[list[int]], use_gpu: bool
) -> list[tuple[list[int], list[int], float]]:
    """Prompt, sampled tokens, and the engine's log-prob of them, for every prompt that got an answer."""
    be_quiet()
    from stages.sample.vllm_sampler import VLLMSampler

    few = {"num_generations": 1, "max_new_tokens": min(config.max_new_tokens, _MOST_TOKENS), "tensor_parallel_size": 1}
    asked = config.model_copy(update=few)
    sampler = VLLMSampler(
        asked.engine(), dtype=dtype, num_threads=len(os.sched_getaffinity(0)), use_gpu=use_gpu, seed=0
    )
    sampler.load(Weights.found(folder, round=0))
    answers = sampler.generate([SampleRequest(prompt, _SEED + at) for at, prompt in enumerate(prompts)], asked)
    given = zip(prompts, (found[0] for found in answers), strict=True)
    return [
        (prompt, answer.token_ids, sum(answer.logps)) for prompt, answer in given if answer is not None and answer.logps
    ]


def trainer_logps(
    folder: Path, config: UpdateConfig, dtype: str, pad_token: str | None, rows: Sequence[tuple[list[int], list[int]]]
) -> list[float]:
    """The trainer's log-prob of every answer, as one rank of it computes them."""
    be_quiet()
    import torch.distributed as dist

    from stages.update.rows import AnswerRow
    from stages.update.worker import Trainer

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed asks for them
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    trainer = Trainer(config, dtype=dtype, pad_token=pad_token, num_threads=len(os.sched_getaffinity(0)))
    trainer.load(Weights.found(folder, round=0))
    found = trainer.logps([AnswerRow(str(at), prompt, tokens) for at, (prompt, tokens) in enumerate(rows)])
    return [found[str(at)] for at in range(len(rows))]
