"""The reward functions that come with the configs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pipeline.config_file import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def module(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_every_config_loads_and_names_functions_that_are_there():
    for file in CONFIGS.glob("*.yaml"):
        for reward in load_config(file).score.rewards:
            if reward.type == "function" and not reward.target.startswith("stages."):
                name, _, function = reward.target.partition(":")
                assert callable(getattr(module(name), function))


def test_happy_words_are_counted_per_hundred_words_whatever_their_case():
    happy_words = module("stories_rewards").happy_words
    rewards = happy_words(["p"] * 4, ["Lily smiled. She was HAPPY!", "", "...", "the end"])
    assert rewards == [40.0, 0.0, 0.0, 0.0]
