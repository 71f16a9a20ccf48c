"""What a config names, found and hashed before anything starts: models, prompts, rewards."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import embedded, models
from pipeline.config import Config
from pipeline.config_checks import is_policy_name
from pipeline.own_modules import OURS, own_objectives
from pipeline.prompt_files import WHOLE, Part, fetch_dataset, on_hub, source_sha256
from pipeline.sections import EvaluateConfig, PairsConfig, PromptsConfig, TextsConfig
from stages.errors import InputError
from stages.protocols import Weights
from stages.score.config import FunctionReward, HttpReward, JudgeReward, ModelReward, RewardConfig, reward_names
from stages.score.functions import find_function
from stages.score.wire.config import WireSettings, check_rubric, token_of
from stages.weights import file_sha256, files_sha256, weights_sha256

_INSTALLED = frozenset(("site-packages", "dist-packages"))


@dataclass(frozen=True, slots=True)
class RewardSource:
    """A reward as found.

    Attributes:
        folder: of a model.
        sha256: of the weights, the module, or the rubric; empty for a reward server, which may run anything.
        rubric: of a judge.
    """

    config: RewardConfig
    name: str
    key: str
    folder: Path | None
    sha256: str
    rubric: str = ""

    def identity(self) -> dict[str, object]:
        """What decides the rewards it gives."""
        given = self.config.identity()
        for place in ("path", "rubric", "rubric_file"):
            given.pop(place, None)
        return given | {"name": self.name, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class DataSource:
    """Prompts, texts or pairs as found; `part` says which of what is in it."""

    path: Path
    key: str
    sha256: str
    part: Part

    @classmethod
    def found(cls, path: Path, *, key: str, part: Part = WHOLE) -> DataSource:
        """The source at a path.

        Raises:
            InputError: if it cannot be read.
        """
        wanted, fix = "a file or folder that can be read", "check the path, and that you may read it"
        if not (path.is_file() or path.is_dir()):
            raise InputError(f"{key}: {path}", wanted=wanted, got="neither a file nor a folder", fix=fix)
        try:
            return cls(path, key, source_sha256(path), part)
        except OSError as error:
            raise InputError(f"{key}: {path}", wanted=wanted, got=error.strerror or str(error), fix=fix) from None


@dataclass(frozen=True, slots=True)
class RoundSources:
    """What one round starts from besides the policies of the run.

    Attributes:
        references: policies named by folder or hub name.
        objectives: hashes of a user's own objectives, by their import paths.
    """

    prompts: DataSource | None
    pairs: DataSource | None
    rewards: tuple[RewardSource, ...]
    references: Mapping[str, Weights] = field(default_factory=dict)
    objectives: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sources:
    """What a run starts from, found and hashed, as far as it was asked for.

    Attributes:
        policy_files: hash of the policy's config and tokenizer.
        rounds: of the config as it stands, then of each round with settings of its own.
    """

    found_policy: Weights | None
    policy_files: str
    evaluation: DataSource | None
    texts: DataSource | None
    rounds: tuple[RoundSources, ...]

    @property
    def policy(self) -> Weights:
        """The policy that the run starts from."""
        assert self.found_policy is not None, "the policy was not asked for"
        return self.found_policy

    def of(self, number: int) -> RoundSources:
        """What a round starts from; 0 is the evaluation before the first."""
        return self.rounds[min(number, len(self.rounds) - 1)]


ALL = ("policy", "references", "prompts", "pairs", "rewards", "evaluation")
"""What `find_sources` can look for."""


def find_sources(config: Config, *, maker: models.Maker = embedded.make, needs: Sequence[str] = ALL) -> Sources:
    """Resolve the names in the config; embedded models are made now if the cache lacks them.

    Args:
        needs: which of them, out of `ALL`.

    Raises:
        InputError: for the first thing that cannot be used.
    """
    find = _Finder(maker, needs, ignore_auto_map=config.run.ignore_auto_map)
    if "rewards" in needs:
        _import_functions(config)
    evaluate = config.evaluate if "evaluation" in needs else None
    evaluation = texts = None
    if evaluate is not None:
        own = evaluate.path is not None
        section, key = (evaluate, "evaluate.path") if own else (config.prompts, "prompts.path")
        evaluation = find.data(section, key) if section is not None else None
        texts = find.data(evaluate.texts, "evaluate.texts.path") if evaluate.texts is not None else None
    find.refuse_missing(config)
    policy = None
    if "policy" in needs:
        policy = models.resolve(config.policy.path, key="policy.path", maker=maker)
        models.check_policy(policy, key="policy.path", ignore_auto_map=config.run.ignore_auto_map)
    return Sources(
        found_policy=Weights.found(policy, round=0) if policy else None,
        policy_files=files_sha256(policy) if policy else "",
        evaluation=evaluation,
        texts=texts,
        rounds=tuple(find.of_round(config.for_round(number), number) for number in range(config.num_entries + 1)),
    )


def _under(number: int) -> str:
    """What comes before the keys of a round's own settings; 0 is the config's."""
    return f"rounds.{number - 1}." if number else ""


class _Finder:
    """Resolves names, each once."""

    def __init__(self, maker: models.Maker, needs: Sequence[str], *, ignore_auto_map: bool) -> None:
        self._maker, self._needs, self._ignore_auto_map = maker, needs, ignore_auto_map
        self._data: dict[tuple[str, Part], DataSource] = {}
        self._rewards: dict[str, RewardSource] = {}
        self._policies: dict[str, Weights] = {}

    def refuse_missing(self, config: Config) -> None:
        """Look for what is no embedded model first, so that none is taught for a config that is refused."""
        named = [("policy.path", config.policy.path)] if "policy" in self._needs else []
        for number in range(config.num_entries + 1):
            found, under = config.for_round(number), _under(number)
            if found.prompts is not None and "prompts" in self._needs:
                self.data(found.prompts, f"{under}prompts.path")
            if found.pairs is not None and "pairs" in self._needs:
                self.data(found.pairs, f"{under}pairs.path")
            for index, reward in enumerate(found.rewards if "rewards" in self._needs else ()):
                if isinstance(reward, ModelReward):
                    named.append((f"{under}score.rewards.{index}.path", reward.path))
            if "references" in self._needs:
                named += [(f"{under}reference", name) for name in found.references if is_policy_name(name)]
        for key, name in named:
            if not name.startswith(embedded.PREFIX):
                models.resolve(name, key=key, maker=self._maker)

    def of_round(self, config: Config, number: int) -> RoundSources:
        under = _under(number)
        rewards = config.score.rewards if config.score is not None and "rewards" in self._needs else ()
        names = reward_names(config.score) if rewards else []
        prompts = config.prompts if "prompts" in self._needs else None
        pairs = config.pairs if "pairs" in self._needs else None
        for reward, name in zip(rewards, names, strict=True):
            if isinstance(reward, WireSettings) and config.cluster.address == "local":
                token_of(reward, where=f"score: reward {name}")  # elsewhere, workers have variables of their own
        named = [name for name in config.references if is_policy_name(name)] if "references" in self._needs else []
        return RoundSources(
            prompts=self.data(prompts, f"{under}prompts.path") if prompts else None,
            pairs=self.data(pairs, f"{under}pairs.path") if pairs else None,
            rewards=tuple(
                self._reward(reward, name, f"{under}score.rewards.{index}")
                for index, (reward, name) in enumerate(zip(rewards, names, strict=True))
            ),
            references={name: self._policy(name, f"{under}reference") for name in named},
            objectives={name: _function_sha256(name) for name in own_objectives(config)},
        )

    def _policy(self, name: str, key: str) -> Weights:
        if name not in self._policies:
            folder = models.resolve(name, key=key, maker=self._maker)
            models.check_policy(folder, key=key, ignore_auto_map=self._ignore_auto_map)
            self._policies[name] = Weights.found(folder, round=0)
        return self._policies[name]

    def data(self, section: PromptsConfig | PairsConfig | TextsConfig | EvaluateConfig, key: str) -> DataSource:
        name, part = section.path or "", Part(section.config, section.split)
        if (name, part) not in self._data:
            if on_hub(name):
                path = fetch_dataset(name, embedded.cache_root() / "datasets", key=key, part=part)
                self._data[name, part] = DataSource.found(path, key=key)
            else:
                path = models.resolve(name, key=key, maker=self._maker, hub=False)
                self._data[name, part] = DataSource.found(path, key=key, part=part)
        return self._data[name, part]

    def _reward(self, reward: RewardConfig, name: str, key: str) -> RewardSource:
        same = f"{name} {reward.model_dump_json()}"
        if same not in self._rewards:
            self._rewards[same] = self._reward_source(reward, name, key)
        return self._rewards[same]

    def _reward_source(self, reward: RewardConfig, name: str, key: str) -> RewardSource:
        if isinstance(reward, FunctionReward):
            return RewardSource(reward, name, key, None, _function_sha256(reward.target))
        if isinstance(reward, HttpReward):
            return RewardSource(reward, name, key, None, "")
        if isinstance(reward, JudgeReward):
            rubric = rubric_of(reward, key)
            return RewardSource(reward, name, key, None, hashlib.sha256(rubric.encode()).hexdigest(), rubric)
        folder = models.resolve(reward.path, key=f"{key}.path", maker=self._maker)
        models.check_reward(folder, key=f"{key}.path", ignore_auto_map=self._ignore_auto_map)
        return RewardSource(reward, name, f"{key}.path", folder, f"{weights_sha256(folder)} {files_sha256(folder)}")


def rubric_of(judge: JudgeReward, key: str) -> str:
    """A judge's rubric, from the config or from a file, which is looked for as modules are.

    Raises:
        InputError: if there is no such file, or it is no rubric.
    """
    if judge.rubric_file is None:
        assert judge.rubric is not None
        return judge.rubric
    named, where = judge.rubric_file, f"{key}.rubric_file"
    file = next((found for folder in (*sys.path, ".") if (found := Path(folder, named)).is_file()), None)
    fix = "check the spelling, and that it lies beside the config, or in run.modules"
    if file is None:
        raise InputError(where, wanted="a text file", got=f"no file {named}", fix=fix)
    try:
        text = file.read_text(encoding="utf-8")
        check_rubric(text, where=f"{where} {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{where} {file}", wanted="a text file in UTF-8", got=str(error), fix=fix) from None
    return text


def _import_functions(config: Config) -> None:
    """Import every reward function first, so that a hash of what they use does not depend on their order.

    Raises:
        InputError: for one that cannot be imported, or if they should lie in a folder that is not there.
    """
    if (folder := config.run.modules) is not None and not folder.is_dir():
        wanted, fix = (
            "the folder in which this config's own modules lie",
            "name where they lie: --set run.modules=FOLDER",
        )
        raise InputError("run.modules", wanted=wanted, got=f"no folder {folder}", fix=fix)
    for found in (config, *config.every_round()):
        for reward in found.rewards:
            if isinstance(reward, FunctionReward):
                find_function(reward.target)


def _function_sha256(target: str) -> str:
    """A hash of the module that a reward function or objective comes from, and of the modules beside it that were
    imported with it."""
    named, _, attribute = target.partition(":")
    found = getattr(importlib.import_module(named), attribute)
    defined = found.__module__ if inspect.isfunction(found) else named
    file = getattr(sys.modules.get(defined, sys.modules[named]), "__file__", None)
    if file is None:
        return "built in"
    path = Path(file)
    alone = defined.partition(".")[0] in OURS or _INSTALLED.intersection(path.parts)
    files = [path] if alone else [path, *imported_from(path.parent)]
    return " ".join(file_sha256(found) for found in dict.fromkeys(files))


def imported_from(folder: Path) -> list[Path]:
    """The files of the modules below a folder that this process has imported, in order."""
    files = [Path(file) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))]
    return sorted({file for file in files if file.is_relative_to(folder) and not _INSTALLED.intersection(file.parts)})
