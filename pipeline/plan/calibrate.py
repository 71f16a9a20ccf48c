"""A short calibration: the trainer's step, the engine and the reward models at work on a few random rows.

Each in a process of its own, without Ray, one after another; some seconds of work each, after their start. What cannot
be started here is named with its reason, and its time is not told.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from pipeline import models
from pipeline.apart import apart, be_quiet
from pipeline.config import Config
from pipeline.plan.fit import mean_lengths_of
from pipeline.plan.hardware import Hardware
from pipeline.plan.memory import Lengths
from pipeline.plan.model_facts import ModelFacts
from pipeline.plan.rates import Rate, Rates, device_name
from pipeline.plan.survey import Survey
from stages.errors import ConfigError
from stages.sample.config import SampleConfig
from stages.score.config import ModelReward
from stages.update.config import UpdateConfig

_LONGEST = Lengths(256, 64)  # of the rows that are worked on, in tokens
_PROMPTS = 16
_MOST_TOKENS = 2048  # a forward
_STILL = 1e-9  # a learning rate


def calibrate(config: Config, survey: Survey, hardware: Hardware) -> Rates:
    """The rates of every stage that can be started here.

    Raises:
        ConfigError: if the policy is not on this machine.
    """
    facts, folder = survey.policy.facts, models.find_here(config.policy.path, key="policy.path")
    if facts is None or folder is None:
        wanted, fix = "a policy on this machine, to be tried", "download it, or plan without --calibrate"
        raise ConfigError("--calibrate", wanted=wanted, got=f"no {config.policy.path} here", fix=fix)
    mean, cores = mean_lengths_of(config, survey), hardware.devices.cpus
    lengths = Lengths(min(mean.prompt, _LONGEST.prompt), min(mean.answer, _LONGEST.answer))
    update, on_gpu = config.update, hardware.gpu_bytes is not None
    parts: dict[str, Callable[[], dict[str, float]]] = {}
    if config.num_engines:
        threads = config.sample.num_threads or max(1, cores // config.num_engines)
        asked = (folder, config.sample, config.policy.dtype, on_gpu, threads, lengths, facts.vocab_size)
        parts["sample"] = lambda: apart(engine_rates, *asked)
        if rewards := _model_rewards(config):
            parts["score"] = lambda: apart(reward_rates, rewards, on_gpu, cores, lengths)
    threads = update.num_threads or max(1, cores // update.workers)
    trained = (folder, update, config.policy.dtype, config.policy.pad_token, threads, lengths, facts)
    parts["update"] = lambda: apart(trainer_rates, *trained)
    found, missing = _tried(parts)
    step_s = found.pop("step_s", 0.0)
    source = f"a calibration on {device_name(hardware)}, {date.today().isoformat()}"
    return Rates(source, {stage: Rate("tokens", per_s) for stage, per_s in found.items()}, step_s, tuple(missing))


def _tried(parts: dict[str, Callable[[], dict[str, float]]]) -> tuple[dict[str, float], list[str]]:
    """What was found, and in words what could not be."""
    found: dict[str, float] = {}
    missing = []
    for stage, work in parts.items():
        try:
            found |= work()
        except Exception as error:  # whatever a library raises where it cannot work
            reason = (str(error).splitlines() or ["no message"])[0]
            missing.append(f"the time of {stage}: {type(error).__name__}: {reason}")
    return found, missing


def _model_rewards(config: Config) -> list[tuple[ModelReward, Path]]:
    found = []
    for place, reward in enumerate(config.rewards):
        if isinstance(reward, ModelReward):
            folder = models.find_here(reward.path, key=f"score.rewards.{place}.path")
            if folder is not None:
                found.append((reward, folder))
    return found


# ---- each in a process of its own -----------------------------------------------------------------------------------


def engine_rates(
    folder: Path, config: SampleConfig, dtype: str, on_gpu: bool, threads: int, lengths: Lengths, vocab_size: int
) -> dict[str, float]:
    """Prompt tokens and sampled tokens a second of one engine."""
    be_quiet()
    from stages.protocols import SampleRequest, Weights
    from stages.sample.vllm_sampler import VLLMSampler

    sampler = VLLMSampler(config.engine(), dtype=dtype, num_threads=threads, use_gpu=on_gpu, seed=0)
    sampler.load(Weights.found(folder, round=0))
    tokens = _tokens(vocab_size)
    prompts = [tokens(lengths.prompt) for _ in range(_PROMPTS)]

    def asked(count: int, num_generations: int, length: int) -> tuple[int, float]:
        few = config.model_copy(update={"num_generations": num_generations, "max_new_tokens": length, "stop": ()})
        began = time.perf_counter()
        answers = sampler.generate([SampleRequest(prompts[place], place << 20) for place in range(count)], few)
        found = sum(len(answer.token_ids) for each in answers for answer in each if answer is not None)
        return found, time.perf_counter() - began

    asked(2, 1, 2)
    _, prompt_s = asked(_PROMPTS, 1, 1)
    num_tokens, all_s = asked(_PROMPTS, config.num_generations, lengths.answer)
    return {
        "prompt": _PROMPTS * lengths.prompt / prompt_s,
        "sample": num_tokens / max(all_s - prompt_s, 1e-6),
    }


def reward_rates(
    rewards: Sequence[tuple[ModelReward, Path]], on_gpu: bool, threads: int, lengths: Lengths
) -> dict[str, float]:
    """Tokens a second of the reward models, one after another."""
    be_quiet()
    from stages.score.reward_model import RewardModel
    from stages.tokenizers import load_tokenizer

    num_tokens, seconds = 0, 0.0
    for place, (config, folder) in enumerate(rewards):
        key = f"score.rewards.{place}.path"
        model = RewardModel(config, name=str(place), folder=folder, key=key, num_threads=threads, use_gpu=on_gpu)
        tokenizer = load_tokenizer(folder, pad_token=config.pad_token, key=key, answers=False)
        tokens = _tokens(len(tokenizer))
        texts = [[tokenizer.decode(tokens(n)) for n in (lengths.prompt, lengths.answer)] for _ in range(_PROMPTS)]
        prompts, answers = [text[0] for text in texts], [text[1] for text in texts]
        model(prompts[:2], answers[:2], {})
        began = time.perf_counter()
        model(prompts, answers, {})
        seconds += time.perf_counter() - began
        num_tokens += sum(len(tokenizer(text)["input_ids"]) for text in (*prompts, *answers))
    return {"score": num_tokens / seconds}


def trainer_rates(
    folder: Path,
    config: UpdateConfig,
    dtype: str,
    pad_token: str | None,
    threads: int,
    lengths: Lengths,
    facts: ModelFacts,
) -> dict[str, float]:
    """Tokens a second of one rank's log-probs and of its forwards with backward, and the seconds a step adds.

    A step of two forwards takes one forward with backward longer than a step of one: the rest is the step's own.
    """
    be_quiet()
    import torch.distributed as dist

    from stages.protocols import Weights
    from stages.update.rows import PairRow, answers_of
    from stages.update.worker import Trainer

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed asks for them
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    pair = lengths.prompt + 2 * lengths.answer
    size = max(1, min(config.micro_batch_size, _MOST_TOKENS // pair))

    def steps_of(forwards: int) -> UpdateConfig:
        pairs: dict[str, Any] = {"loss_type": "minor_dpo", "loss_params": {}, "loss_weights": None, "beta": None}
        rates = {"learning_rate": _STILL, "lr_scheduler_type": "constant", "warmup_ratio": 0.0, "num_train_epochs": 1}
        cut = {"micro_batch_size": size, "global_batch_size": forwards * size, "workers": 1, "skip_inactive": False}
        return config.model_copy(update={**pairs, **rates, **cut, "max_tokens_per_batch": size * pair})

    tokens = _tokens(facts.vocab_size)
    rows = [
        PairRow(str(n), f"c{n}", f"r{n}", tokens(lengths.prompt), tokens(lengths.answer), tokens(lengths.answer))
        for n in range(6 * size)
    ]
    trainer = Trainer(steps_of(1), dtype=dtype, pad_token=pad_token, num_threads=threads)
    trainer.load(Weights.found(folder, round=0))
    trainer.logps(answers_of(rows[:size]))
    began = time.perf_counter()
    own = trainer.logps(answers_of(rows))
    logps_s = time.perf_counter() - began
    step_s = {}
    for forwards in (1, 2):
        seconds: list[float] = []
        trainer.configure(steps_of(forwards))
        trainer.update(
            rows[: 3 * forwards * size],
            [own],
            own_reference=None,
            seed=0,
            on_step=lambda step, seconds=seconds: seconds.append(step["step_s"]),  # type: ignore[misc]
        )
        step_s[forwards] = statistics.median(seconds[1:])  # the first warms up
    forward_s = max(step_s[2] - step_s[1], step_s[2] / 4)  # noise must not make it nothing
    return {
        "reference": len(rows) * pair / logps_s,
        "update": size * pair / forward_s,
        "step_s": max(0.0, step_s[1] - forward_s),
    }


def _tokens(vocab_size: int) -> Callable[[int], list[int]]:
    """Random token ids, as many as asked for, the same in every process."""
    rng = random.Random(0)
    return lambda count: [rng.randrange(vocab_size) for _ in range(count)]
