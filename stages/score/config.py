"""The settings of scoring (``score``) and pairing (``pair``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from stages.errors import ConfigError
from stages.score.reward_settings import RewardSettings
from stages.score.wire.config import HttpReward, JudgeReward
from stages.settings import Settings, where

_TAKEN = ("conversation", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message")


def check_template_kwargs(options: Mapping[str, Any]) -> None:
    """Refuse what is not a chat template's to decide.

    Raises:
        ConfigError: naming it.
    """
    taken = [name for name in options if name in _TAKEN or name.startswith("return_")]
    if taken:
        raise ConfigError(
            "chat_template_kwargs",
            wanted="variables of the chat template, such as enable_thinking",
            got=repr(taken[0]),
            fix="leave it out: how a chat is rendered and tokenised is fixed",
        )


class ModelReward(RewardSettings):
    """A Hugging Face sequence classifier with one score."""

    type: Literal["model"] = Field(description="a Hugging Face sequence classifier")
    path: str = Field(description="a folder, a hub name, or embedded:reverse-judge")
    pad_token: str | None = Field(None, description="where the tokenizer names none")
    chat_template_kwargs: dict[str, Any] = Field({}, description="variables of this model's own chat template")
    text_pair: bool = Field(
        False, description="prompt and answer as two segments, as encoders such as DeBERTa learn it"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="in which it scores")
    batch_tokens: int = where(8192, ge=1, description="padded tokens a forward pass, at most")

    @model_validator(mode="after")
    def _known_names(self) -> ModelReward:
        check_template_kwargs(self.chat_template_kwargs)
        return self

    @property
    def default_name(self) -> str:
        return self.path.rstrip("/").split("/")[-1].removeprefix("embedded:")


class FunctionReward(RewardSettings):
    """A Python function of TRL's shape: ``f(prompts, completions, **columns) -> list[float]``."""

    type: Literal["function"] = Field(description="a Python function")
    target: str = Field(pattern=r"^[\w.]+:\w+$", description="module:function")

    @property
    def default_name(self) -> str:
        return self.target.rpartition(":")[2]


RewardConfig = Annotated[ModelReward | FunctionReward | HttpReward | JudgeReward, Field(discriminator="type")]

_REWARDS: dict[str, type[RewardSettings]] = {
    "model": ModelReward,
    "function": FunctionReward,
    "http": HttpReward,
    "judge": JudgeReward,
}

REWARD_TYPES = tuple(_REWARDS)


class ScoreConfig(Settings):
    """Which rewards an answer gets."""

    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    max_error_share: float = Field(0.01, ge=0, le=1, description="more answers without a finite reward stop the run")
    workers: int = where(
        1,
        ge=1,
        description="processes that share the shards, each with every reward model and with the limits of a reward "
        "server; more than one only with placement split",
    )
    cache: Path | None = where(
        None,
        description="folder for what reward servers and judges have answered, for several runs; null: the run's own",
    )


def reward_names(score: ScoreConfig | None) -> list[str]:
    """What each reward is called in tables and reports."""
    return [_name(reward) for reward in (score.rewards if score else ())]


def reward_name(settings: Mapping[str, Any]) -> str:
    """The same for a reward in a run's config, whose plain values were checked when it was loaded."""
    return _name(_REWARDS[settings["type"]].model_construct(**settings))


def _name(reward: RewardSettings) -> str:
    return reward.name or reward.default_name


def costs(score: ScoreConfig | None) -> frozenset[str]:
    """The names of the rewards that count the other way round: their weight is below 0."""
    rewards = score.rewards if score else ()
    return frozenset(name for name, reward in zip(reward_names(score), rewards, strict=True) if reward.weight < 0)


Strategy = Literal[
    "best_worst",
    "all_above",
    "best_random",
    "best_second",
    "top_bottom",
    "gap_band",
    "correct_wrong",
    "mean_minus_2sd",
    "statistical",
    "groups",
]

OWN_SETTINGS: dict[Strategy, dict[str, Any]] = {
    "best_worst": {},
    "all_above": {"tau": 1.0, "eta": 0.85},
    "best_random": {},
    "best_second": {},
    "top_bottom": {"k": 2},
    "gap_band": {"low": None, "high": None, "unit": "reward"},
    "correct_wrong": {"correct_at": 1.0, "num_pairs": 10},
    "mean_minus_2sd": {},
    "statistical": {"beta": 0.5, "num_accepted": 8, "ranking": "first_round"},
    "groups": {},
}
"""What each strategy takes for itself, with the defaults of its paper; None: it has none, and must be given."""

_OF_PAIRS = ("min_margin", "max_length_ratio", "max_pairs", "agreement")  # what `groups` has no use for


class PairConfig(Settings):
    """How scored answers become pairs: a strategy, what it takes, and what holds whatever the strategy.

    Answers with equal texts are always one. `length_penalty` and `truncated` decide which answers there are and what
    they are worth; `min_margin`, `max_length_ratio` and `agreement` which two of them may make a pair; the strategy
    chooses among these; `max_pairs` keeps some of its choice.
    """

    strategy: Strategy = Field(
        "best_worst", description="the rule; stages/score/pairing/rules.py has one function each"
    )
    truncated: Literal["drop", "keep"] = Field("drop", description="answers that ended at max_new_tokens")
    length_penalty: float = Field(
        0.0, ge=0, description="taken off the reward for each token of the answer, before anything is compared"
    )
    min_margin: float = Field(
        0.0, ge=0, description="in units of the reward, after the length penalty; a smaller gap makes no pair"
    )
    max_length_ratio: float | None = Field(
        None, ge=1, description="the longer answer has at most so many times the shorter one's tokens; null: any"
    )
    agreement: bool = Field(
        False, description="only pairs whose chosen answer every single main reward puts first; fate disagreement"
    )
    max_pairs: int | None = Field(None, ge=1, description="of a prompt, drawn among those of the strategy; null: all")

    tau: float | None = Field(None, gt=0, description="all_above: reward units that count as one nat; larger, fewer")
    eta: float | None = Field(
        None, gt=0, lt=1, description="all_above: least probability that the chosen answer is the better one"
    )
    k: int | None = Field(None, ge=1, description="top_bottom: each of the k best against each of the k worst")
    low: float | None = Field(None, ge=0, description="gap_band: least gap, in `unit`")
    high: float | None = Field(None, gt=0, description="gap_band: greatest gap, in `unit`")
    unit: Literal["reward", "quantile"] | None = Field(
        None, description="gap_band: of low and high; quantile: of the gaps between the prompt's own answers, 0 to 1"
    )
    correct_at: float | None = Field(
        None, description="correct_wrong: an answer is right from this reward on, before the length penalty"
    )
    num_pairs: int | None = Field(None, ge=1, description="correct_wrong: pairs a prompt, at most")
    beta: float | None = Field(
        None, gt=0, description="statistical: reward units; small accepts the best only, large accepts at random"
    )
    num_accepted: int | None = Field(None, ge=2, description="statistical: answers accepted of a prompt")
    ranking: Literal["first_round", "tournament"] | None = Field(
        None, description="statistical: num_accepted / 2 pairs, or the winners against each other too, one fewer pair"
    )

    @property
    def own(self) -> dict[str, Any]:
        """The strategy's own settings, those that were not given by default."""
        defaults = OWN_SETTINGS[self.strategy]
        return {name: default if (got := getattr(self, name)) is None else got for name, default in defaults.items()}

    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _taken_by_all(self.strategy)} | self.own

    def of(self, strategy: Strategy) -> PairConfig:
        """What holds whatever the strategy, for another one, which has a default for all its own settings."""
        if strategy == self.strategy:
            return self
        kept = {name: getattr(self, name) for name in _taken_by_all(strategy) if name != "strategy"}
        return PairConfig(strategy=strategy, **kept)

    def most_pairs(self, num_answers: int) -> int:
        """The most pairs, or groups, that a prompt with so many answers can make."""
        if self.strategy in ("all_above", "gap_band"):
            most = num_answers * (num_answers - 1) // 2
        elif self.strategy == "top_bottom":
            most = min(self.own["k"], num_answers // 2) ** 2
        elif self.strategy == "correct_wrong":
            most = min(self.own["num_pairs"], num_answers**2 // 4)
        elif self.strategy == "statistical":
            accepted = min(self.own["num_accepted"], num_answers)
            most = accepted // 2 if self.own["ranking"] == "first_round" else accepted - 1
        else:
            most = 1
        return min(most, self.max_pairs or most)

    def refuse_idle(self, num_answers: int) -> None:
        """Refuse a strategy that so many answers a prompt leave nothing to do.

        Raises:
            ConfigError: with both numbers.
        """
        if self.strategy == "statistical" and self.own["num_accepted"] >= num_answers:
            raise ConfigError(
                "pair.num_accepted",
                wanted=f"fewer than sample.num_generations {num_answers}, so that some answers are rejected",
                got=str(self.own["num_accepted"]),
                fix="RSO accepts 8 of 64: raise sample.num_generations, or lower pair.num_accepted",
            )
        if self.strategy == "top_bottom" and self.own["k"] > num_answers // 2:
            raise ConfigError(
                "pair.k",
                wanted=f"at most half of sample.num_generations {num_answers}",
                got=str(self.own["k"]),
                fix=f"at most {num_answers // 2}",
            )

    @model_validator(mode="after")
    def _taken_by_the_strategy(self) -> Self:
        own = OWN_SETTINGS[self.strategy]
        taken = {*_taken_by_all(self.strategy), *own}
        for name, field in type(self).model_fields.items():
            if name not in taken and getattr(self, name) != field.default:
                raise ConfigError(
                    name,
                    wanted=f"a setting that {self.strategy} takes: {', '.join(sorted(taken - {'strategy'}))}",
                    got=f"{name}: {getattr(self, name)}",
                    fix=f"leave it out; {_who_takes(name)}",
                )
        given = [name for name, default in own.items() if default is None]
        missing = next((name for name in given if getattr(self, name) is None), None)
        if missing is not None:
            raise ConfigError(
                missing,
                wanted=f"{' and '.join(given)}, which {self.strategy} has no defaults for",
                got=f"no {missing}",
                fix=f"for example --set pair.{missing}=1.0",
            )
        return self

    @model_validator(mode="after")
    def _a_band(self) -> Self:
        if self.low is None or self.high is None:
            return self
        if self.low >= self.high:
            raise ConfigError(
                "low", wanted=f"less than pair.high {self.high:g}", got=f"{self.low:g}", fix="exchange the two"
            )
        if self.unit == "quantile" and self.high > 1:
            raise ConfigError(
                "high", wanted="at most 1, since unit is quantile", got=f"{self.high:g}", fix="write 0.9 for 90%"
            )
        return self


def _taken_by_all(strategy: Strategy) -> tuple[str, ...]:
    """The settings that are no strategy's own, and that this one has a use for."""
    return ("strategy", "truncated", "length_penalty", *(_OF_PAIRS if strategy != "groups" else ()))


def _who_takes(name: str) -> str:
    if name in _OF_PAIRS:
        return "every strategy but groups takes it"
    return f"strategy: {next(strategy for strategy, own in OWN_SETTINGS.items() if name in own)} takes it"
