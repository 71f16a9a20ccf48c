"""What a config names, found and hashed before anything starts: models, prompts, rewards."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline import embedded, models
from pipeline.config import Config, EvaluateConfig, PromptsConfig, reward_names
from pipeline.prompt_files import WHOLE, Part, fetch_dataset, on_hub, source_sha256
from stages.protocols import Weights
from stages.score.config import FunctionReward, ModelReward
from stages.score.functions import find_function
from stages.weights import file_sha256, files_sha256, weights_sha256


@dataclass(frozen=True, slots=True)
class RewardSource:
    """A reward as found: its config, name, and, for a model, folder; `sha256` names the weights or the module."""

    config: ModelReward | FunctionReward
    name: str
    key: str
    folder: Path | None
    sha256: str

    def identity(self) -> dict[str, object]:
        """What decides the rewards it gives."""
        given = self.config.identity()
        given.pop("path", None)
        return given | {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class PromptSource:
    """A source of prompts as found; `part` says which of what is in it."""

    path: Path
    key: str
    sha256: str
    part: Part


@dataclass(frozen=True, slots=True)
class Sources:
    """Everything a run starts from, found and hashed; `policy_files` is of config and tokenizer."""

    policy: Weights
    policy_files: str
    prompts: PromptSource
    evaluation: PromptSource | None
    rewards: tuple[RewardSource, ...]


def find_sources(config: Config, *, maker: models.Maker = embedded.make) -> Sources:
    """Resolve every name in the config; embedded models are made now if the cache lacks them.

    Raises:
        InputError: for the first thing that cannot be used.
    """
    policy = models.resolve(config.policy.path, key="policy.path", maker=maker)
    models.check_policy(policy, key="policy.path")
    prompts, evaluation = _prompt_source(config.prompts, "prompts.path", maker), None
    if config.evaluate is not None:
        own = config.evaluate.path is not None
        evaluation = _prompt_source(config.evaluate, "evaluate.path", maker) if own else prompts
    return Sources(
        policy=Weights.found(policy, round=0),
        policy_files=files_sha256(policy),
        prompts=prompts,
        evaluation=evaluation,
        rewards=tuple(
            _reward_source(reward, name, f"score.rewards.{index}", maker)
            for index, (reward, name) in enumerate(zip(config.score.rewards, reward_names(config.score), strict=True))
        ),
    )


def _prompt_source(section: PromptsConfig | EvaluateConfig, key: str, maker: models.Maker) -> PromptSource:
    name, part = section.path or "", Part(section.config, section.split)
    if on_hub(name):
        path, part = fetch_dataset(name, embedded.cache_root() / "datasets", key=key, part=part), WHOLE
    else:
        path = models.resolve(name, key=key, maker=maker, hub=False)
    return PromptSource(path, key, source_sha256(path), part)


def _reward_source(reward: ModelReward | FunctionReward, name: str, key: str, maker: models.Maker) -> RewardSource:
    if isinstance(reward, FunctionReward):
        module = sys.modules[find_function(reward.target).__module__].__file__
        return RewardSource(reward, name, key, None, file_sha256(Path(module)) if module else "built in")
    folder = models.resolve(reward.path, key=f"{key}.path", maker=maker)
    models.check_reward(folder, key=f"{key}.path")
    return RewardSource(reward, name, f"{key}.path", folder, f"{weights_sha256(folder)} {files_sha256(folder)}")
