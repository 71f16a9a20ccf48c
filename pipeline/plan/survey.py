"""What a config names, as far as it lies here: sizes of models, lengths of prompts, modules of reward functions.

Nothing is made, fetched, hashed or imported. What is not here is no error: a plan may be made far from the machines and
files that it is for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline import embedded, models
from pipeline.config import Config
from pipeline.config_checks import is_policy_name
from pipeline.plan.model_facts import ModelFacts, facts_of_shapes, read_facts
from pipeline.prompt_files import read_rows
from pipeline.prompts import find_columns
from pipeline.sections import EvaluateConfig, PairsConfig, PromptsConfig
from stages.errors import ConfigError
from stages.score.config import FunctionReward, ModelReward

_MOST_ROWS = 20_000  # read of a file of prompts
_JSON_SUFFIXES = (".jsonl", ".json")  # the forms that are read without another library


@dataclass(frozen=True, slots=True)
class Model:
    """A model as named and found; `facts` is None where its files are not here, and `missing` then says so."""

    key: str
    name: str
    facts: ModelFacts | None
    missing: str | None


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of prompts, or of ready pairs, looked into.

    Attributes:
        num_rows: how many rows it has; None where there are more than were read.
        longest_bytes: of the longest prompt read, or the longest whole pair, in UTF-8.
        mean_bytes: of those read.
        chats: whether it holds chats.
    """

    num_rows: int | None
    longest_bytes: int
    mean_bytes: int
    chats: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found, models and data by their names in the config, and in words what was not."""

    policy: Model
    rewards: Mapping[str, Model]
    data: Mapping[str, DataFile]
    missing: Sequence[str]

    def data_of(self, config: Config) -> DataFile | None:
        """What a round's config trains on, prompts or ready pairs; None where it is not known."""
        section = config.prompts or config.pairs
        return self.data.get(section.path) if section is not None else None


def look(configs: Sequence[Config]) -> Survey:
    """Look at what the configs of a run's rounds name.

    Raises:
        PrefloopError: for a file that is here and cannot be used.
    """
    check_policy, check_reward = (
        partial(check, ignore_auto_map=configs[0].run.ignore_auto_map)
        for check in (models.check_policy, models.check_reward)
    )
    policy = _model(configs[0].policy.path, "policy.path", check_policy, shapes=configs[0].policy.shapes)
    rewards: dict[str, Model] = {}
    data: dict[str, DataFile] = {}
    missing = [policy.missing, *_missing_evaluation(configs[0].evaluate)]
    for config in configs:
        missing += [_missing_reference(name, check_policy) for name in config.references if is_policy_name(name)]
        for index, reward in enumerate(config.rewards):
            if isinstance(reward, FunctionReward):
                missing.append(_missing_module(reward.target, f"score.rewards.{index}.target", config.run.modules))
            elif isinstance(reward, ModelReward) and reward.path not in rewards:
                found = _model(reward.path, f"score.rewards.{index}.path", check_reward)
                rewards[reward.path] = found
                missing.append(found.missing)
        section, key = (config.prompts, "prompts") if config.prompts is not None else (config.pairs, "pairs")
        file = _data(section, key) if section is not None else None
        if isinstance(file, str):
            missing.append(file)
        elif section is not None and file is not None:
            data[section.path] = file
    return Survey(policy, rewards, data, list(dict.fromkeys(words for words in missing if words)))


def _missing_reference(name: str, check: Callable[..., None]) -> str | None:
    folder = models.find_here(name, key="reference")
    if folder is None:
        return f"reference {name} is not on this machine"
    if any(folder.glob("*.safetensors")):
        check(folder, key="reference")
    return None


def _model(name: str, key: str, check: Callable[..., None], *, shapes: Mapping[str, Any] | None = None) -> Model:
    folder = models.find_here(name, key=key)
    if folder is None and shapes is not None:
        return Model(key, name, _shaped(shapes), None)
    if folder is None:
        made = name.startswith(embedded.PREFIX)
        missing = "is made on first use, half a million parameters, and not yet" if made else "is not on this machine"
        return Model(key, name, None, f"{key} {name} {missing}")
    if any(folder.glob("*.safetensors")):
        check(folder, key=key)
    facts = read_facts(folder)
    return Model(
        key, name, facts, None if facts else f"{key} {name}: neither its config.json nor its safetensors tell sizes"
    )


def _shaped(shapes: Mapping[str, Any]) -> ModelFacts:
    """The facts about the shapes that stand in a config.

    Raises:
        ConfigError: if transformers has no such model.
    """
    facts = facts_of_shapes(shapes)
    if facts is None:
        wanted = "what the config.json of a model that transformers knows says, model_type among it"
        fix = "for example {model_type: llama, hidden_size: 2048, num_hidden_layers: 16, …}"
        raise ConfigError("policy.shapes", wanted=wanted, got=str(dict(shapes)), fix=fix)
    return facts


def _data(section: PromptsConfig | PairsConfig, section_key: str) -> DataFile | str:
    """The training prompts or pairs, or in words what is not known about them."""
    key, name = f"{section_key}.path", section.path
    path = models.find_here(name, key=key)
    if path is None:
        return f"{key} {name} is not on this machine: how many {section_key} there are, how long, texts or chats"
    if path.suffix not in _JSON_SUFFIXES:
        return f"{key} {name}: how many {section_key} there are, how long, texts or chats (only JSON is looked into)"
    longest, total, count, chats = 0, 0, 0, False
    for where, row in islice(read_rows(path, key=key), _MOST_ROWS + 1):
        if isinstance(section, PairsConfig):
            num_bytes = len(json.dumps(row, ensure_ascii=False).encode())
        else:
            columns = find_columns(row, section.columns, where=where)
            value = row.get(columns.prompt or columns.messages or "")
            chats = chats or isinstance(value, list) or section.to_chat
            num_bytes = len(_text(value).encode())
        longest, total, count = max(longest, num_bytes), total + num_bytes, count + 1
    return DataFile(count if count <= _MOST_ROWS else None, longest, -(-total // max(1, count)), chats)


def _missing_evaluation(evaluate: EvaluateConfig | None) -> list[str]:
    """In words, the files of prompts and texts that an evaluation names and that are not here."""
    named = {}
    if evaluate is not None and evaluate.path is not None:
        named["evaluate.path"] = evaluate.path
    if evaluate is not None and evaluate.texts is not None:
        named["evaluate.texts.path"] = evaluate.texts.path
    return [
        f"{key} {name} is not on this machine" for key, name in named.items() if models.find_here(name, key=key) is None
    ]


def _missing_module(target: str, key: str, folder: Path | None) -> str | None:
    """In words, that there is no module for a reward function; it is looked for, and not imported."""
    module = target.partition(":")[0]
    top, *inner = module.split(".")
    spec = PathFinder.find_spec(top, [str(folder), *sys.path] if folder else None)
    if spec is None:
        with suppress(ValueError):  # a name such as __main__, or none before the first dot
            spec = find_spec(top)  # built in, or found by a hook, as editable installs are
    name = top
    for part in inner:
        name = f"{name}.{part}"
        inside = spec.submodule_search_locations if spec is not None else None
        spec = PathFinder.find_spec(name, inside) if inside is not None else None
    return (
        None
        if spec is not None
        else f"{key} {target}: no module {module} beside the config, in run.modules or on Python's path"
    )


def _text(value: object) -> str:
    if not isinstance(value, list):
        return str(value)
    turns = [turn.get("content", turn.get("value", "")) for turn in value if isinstance(turn, dict)]
    return "\n".join(map(str, turns))
