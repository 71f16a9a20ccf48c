"""Checks of what a config names, on its own rows: tokenizer and template, rewards, engine against trainer."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import models
from pipeline.apart import apart
from pipeline.config import Config
from pipeline.doctor.finding import Bad, LeftOut
from pipeline.doctor.logps import engine_logps, trainer_logps
from pipeline.jobs.engine_logps import GAP_LIMIT, Gap
from pipeline.prompt_files import Part, read_rows
from pipeline.prompts import Form, count_changed, distinct, prompt_rows
from pipeline.sources import rubric_of
from stages.contracts import CANDIDATES
from stages.errors import PrefloopError
from stages.protocols import Reward
from stages.score.config import FunctionReward, HttpReward, JudgeReward, ModelReward, RewardConfig
from stages.score.functions import FunctionScorer, find_function
from stages.score.stage import judge
from stages.score.wire.judge import Judge
from stages.score.wire.server import RewardServer

_ROWS = 64  # that a check looks at
_ANSWERS = 8  # that a reward is asked about; a judge about one, since it may cost money
_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}  # of a score in a batch against the same one alone, beside 1% of it
_SERVED = 0.1  # likewise, of a server whose precision is not known


@dataclass(frozen=True)
class Named:
    """What a config names, as far as it is on this machine."""

    config: Config

    def folder(self, name: str, key: str) -> Path:
        """A model's folder or a file.

        Raises:
            LeftOut: if it is made or fetched on first use.
        """
        found = models.find_here(name, key=key)
        if found is None:
            if "/" in name or name.startswith("embedded:"):
                raise LeftOut(f"{key} {name} is not on this machine; the run makes or fetches it")
            models.resolve(name, key=key, maker=lambda _: Path(name), hub=False)  # refuses it
        assert found is not None
        return found

    @cached_property
    def policy(self) -> Path:
        folder = self.folder(self.config.policy.path, "policy.path")
        models.check_policy(folder, key="policy.path", ignore_auto_map=self.config.run.ignore_auto_map)
        return folder

    @cached_property
    def tokenizer(self) -> Any:
        from stages.pretrained import num_embeddings
        from stages.tokenizers import load_tokenizer, refuse_foreign_tokenizer

        tokenizer = load_tokenizer(self.policy, pad_token=self.config.policy.pad_token, key="policy.path")
        refuse_foreign_tokenizer(tokenizer, num_embeddings(self.policy), where=f"policy.path {self.policy}")
        return tokenizer

    @cached_property
    def prompts(self) -> pa.Table:
        """The first rows of the config's prompts as a table of `PROMPTS`, read through the policy's tokenizer."""
        section = self.config.for_round(1).prompts
        if section is None:
            raise LeftOut("ready pairs: no prompts to read")
        rows = read_rows(
            self.folder(section.path, "prompts.path"), key="prompts.path", part=Part(section.config, section.split)
        )
        form = Form(section.columns, section.system, section.to_chat, section.chat_template_kwargs)
        table, _ = distinct(prompt_rows(islice(rows, _ROWS), self.tokenizer, form=form))
        if not table.num_rows:
            raise Bad(f"no row in {section.path}", "check the file's content")
        return table


def tokenizer(named: Named) -> str:
    """Template and tokenizer on real rows."""
    prompts = named.prompts
    chats = prompts["conversation"].null_count < prompts.num_rows
    lengths = sorted(map(len, prompts["prompt_token_ids"].to_pylist()))
    if changed := count_changed(prompts, named.tokenizer):
        raise Bad(
            f"the tokenizer does not keep the text of {changed} of {prompts.num_rows} prompts",
            "look for letters it does not know, or a tokenizer of another model in the policy's folder",
        )
    told = "chats through the template" if chats else "texts"
    return f"{prompts.num_rows} {told}, {lengths[0]} to {lengths[-1]} tokens, all read back as they were"


# ---- rewards --------------------------------------------------------------------------------------------------------


def reward(named: Named, config: RewardConfig, name: str, key: str) -> str:
    """A reward on real rows: that it gives finite numbers, and the same in a batch as alone."""
    count = 1 if isinstance(config, JudgeReward) else _ANSWERS
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        prompts = named.prompts.slice(0, count)
        answers = _answers(prompts)
        together = _rewards(_loaded(named, config, name, key, Path(one)), prompts, answers, key)
        if count == 1:
            return f"{config.type}: {together[0]:.4g} for one answer"
        alone_by = _loaded(named, config, name, key, Path(other))
        alone = [_rewards(alone_by, prompts.slice(at, 1), [answer], key)[0] for at, answer in enumerate(answers)]
    widest = max(abs(a - b) - 0.01 * abs(b) for a, b in zip(together, alone, strict=True))
    gap = max(abs(a - b) for a, b in zip(together, alone, strict=True))
    told = f"{config.type}: {len(alone)} answers at once and one by one differ by at most {gap:.2g}"
    allowed = _TOLERANCE[config.dtype] if isinstance(config, ModelReward) else _SERVED
    if widest > allowed:
        raise Bad(told, "a score must not depend on its batch: look at padding, its side, and the pad token")
    return told


def _loaded(named: Named, config: RewardConfig, name: str, key: str, cache: Path) -> Reward:
    if isinstance(config, FunctionReward):
        find_function(config.target)
        return FunctionScorer(name, config.role, config.weight, config.target)
    if isinstance(config, HttpReward):
        return RewardServer(config, name=name, cache=cache)
    if isinstance(config, JudgeReward):
        return Judge(config, name=name, cache=cache, rubric=rubric_of(config, key))
    from stages.score.reward_model import RewardModel

    folder = named.folder(config.path, f"{key}.path")
    models.check_reward(folder, key=f"{key}.path", ignore_auto_map=named.config.run.ignore_auto_map)
    return RewardModel(config, name=name, folder=folder, key=f"{key}.path", num_threads=2, use_gpu=_has_gpu())


def _answers(prompts: pa.Table) -> list[str]:
    """Made-up answers of several lengths: the true ones, or the prompts, up to three times."""
    texts = [row["answer"] or row["prompt"] for row in prompts.to_pylist()]
    return [text * (1 + at % 3) for at, text in enumerate(texts)]


def _rewards(loaded: Reward, prompts: pa.Table, answers: Sequence[str], key: str) -> list[float]:
    """What a reward says of some answers."""
    found = judge(prompts, _candidates(prompts, answers), [loaded], round=1)
    values = [row[0]["value"] for row in found.table["rewards"].to_pylist()]
    if missing := sum(value is None for value in values):
        reason = next(iter(found.reasons.values()), "NaN, infinity or None")
        raise Bad(f"no number for {missing} of {len(values)} answers: {reason}", f"look at {key} on its own")
    return values


def _candidates(prompts: pa.Table, answers: Sequence[str]) -> pa.Table:
    asked = zip(prompts["prompt_id"].to_pylist(), answers, strict=True)
    return CANDIDATES.table(
        {
            "response_id": f"{at:032x}",
            "prompt_id": prompt_id,
            "round": 1,
            "stream": "policy",
            "sample_index": 0,
            "response": answer,
            "response_token_ids": [0],
            "response_logps": [0.0],
            "finish_reason": "stop",
            "policy_version": "",
            "policy_round": 0,
            "seed": 0,
        }
        for at, (prompt_id, answer) in enumerate(asked)
    )


# ---- engine against trainer -----------------------------------------------------------------------------------------


def engine_against_trainer(named: Named) -> str:
    """Answers that vLLM samples, and what engine and trainer think of each of their tokens; each in its own process."""
    config, prompts = named.config.for_round(1), named.prompts.slice(0, _ANSWERS)["prompt_token_ids"].to_pylist()
    gpu, folder = _has_gpu(), named.policy
    sampled = apart(engine_logps, folder, config.sample, config.policy.dtype, prompts, gpu)
    if not sampled:
        raise Bad(
            f"the engine gave no answer to {len(prompts)} prompts", "prefloop sample CONFIG --out FOLDER says more"
        )
    rows = [(prompt, tokens) for prompt, tokens, _ in sampled]
    trained = apart(trainer_logps, folder, config.update, config.policy.dtype, config.policy.pad_token, rows)
    gap = Gap.between((mine, its, len(tokens)) for (_, tokens, mine), its in zip(sampled, trained, strict=True))
    told = f"{len(rows)} answers, {sum(len(tokens) for _, tokens in rows)} tokens: {gap.mean:.2g} nats a token apart"
    try:
        gap.refuse_wide("engine against trainer")
    except PrefloopError:
        fix = "vLLM and transformers disagree on this model: another policy.dtype, or another model"
        raise Bad(f"{told}, wanted {GAP_LIMIT:g} at most", fix) from None
    return told


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
