"""The config of a run: a checked, frozen record.

Every section's class stands beside what it configures; this file puts them together, and says what holds in which
round. `pipeline.config_file` reads it, `pipeline.config_checks` refuses settings that do not go together.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import ClusterConfig
from pipeline import config_checks
from pipeline.addresses import is_address, place_of_run, working_folder
from pipeline.schedules import numbers_by_round
from pipeline.sections import (
    EvaluateConfig,
    GateConfig,
    PairsConfig,
    PolicyConfig,
    PromptsConfig,
    RunSection,
    StopConfig,
)
from stages.errors import ConfigError
from stages.sample.config import SampleConfig
from stages.score.config import PairConfig, RewardConfig, ScoreConfig
from stages.settings import Settings
from stages.update.config import UpdateConfig

MAX_ROUNDS = 100_000

ROUND_SECTIONS = (
    "reference",
    "ema_decay",
    "start",
    "momentum",
    "prompts",
    "pairs",
    "sample",
    "score",
    "pair",
    "update",
)
"""What an entry of a list of rounds may override."""


class Config(Settings):
    """A whole run."""

    run: RunSection = Field(json_schema_extra={"filled_in": "its defaults"})
    policy: PolicyConfig
    reference: str | tuple[str, ...] = Field(
        "round_start",
        min_length=1,
        description="what the objective refers to: round_start, initial, previous (the start of the round before), ema "
        "(of the policies so far), none, a policy's folder or hub name; or several, for mrpo",
    )
    ema_decay: float = Field(0.9, gt=0, lt=1, description="of reference ema: weight of the average so far, a round")
    start: Literal["previous", "initial"] = Field(
        "previous", description="what a round trains from: the policy before it, or the first; the former samples"
    )
    momentum: float = Field(
        0.0, ge=0, description="APO's alpha: a round starts from the policy before it plus this times its last change"
    )
    rounds: int | tuple[dict[str, Any], ...] = Field(
        3, description="how many, or a list whose entries override sections for their round"
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=1,
        description="0: a round samples with the policy that it goes on from; 1: with the one before that, while the "
        "round before is still trained",
    )
    schedules: dict[str, tuple[int | float, ...]] = Field(
        {}, description="numbers by round, by the field's dotted name; a list in a field's place is moved here"
    )
    prompts: PromptsConfig | None = None
    pairs: PairsConfig | None = None
    sample: SampleConfig = SampleConfig()
    score: ScoreConfig | None = None
    pair: PairConfig = PairConfig()
    update: UpdateConfig = UpdateConfig()
    evaluate: EvaluateConfig | None = None
    gate: GateConfig | None = Field(
        GateConfig(),
        description="what a round's result must keep to take the place of the policy before; null: nothing",
    )
    stop_when: StopConfig = Field(default=StopConfig(), json_schema_extra={"where": True})
    cluster: ClusterConfig = Field(default=ClusterConfig(), json_schema_extra={"where": True})

    @model_validator(mode="before")
    @classmethod
    def _numbers_by_round(cls, values: Any) -> Any:
        return numbers_by_round(cls, values, ROUND_SECTIONS) if isinstance(values, dict) else values

    @field_validator("rounds", mode="before")
    @classmethod
    def _number_or_list(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ROUNDS:
            return value
        if isinstance(value, (list, tuple)) and all(entry is None or isinstance(entry, dict) for entry in value):
            return tuple(entry or {} for entry in value)
        raise ConfigError(
            "rounds",
            wanted="a number of rounds, or a list of overrides, one entry a round",
            got=repr(value),
            fix="for example rounds: 3, or rounds: [{}, {update: {learning_rate: 1.0e-7}}]",
        )

    @model_validator(mode="after")
    def _across(self) -> Config:
        config_checks.check_across(self)
        return self

    def folder(self) -> Path:
        """The run's folder, as an absolute path; of one at an address, the folder on this node that follows it."""
        address = self.address()
        return (Path(self.run.dir) / self.run.name).absolute() if address is None else working_folder(address)

    def address(self) -> str | None:
        """Where the run lies, if that is an address."""
        return place_of_run(self.run.dir, self.run.name) if is_address(self.run.dir) else None

    @property
    def num_rounds(self) -> int:
        """How many rounds the config asks for."""
        return self.rounds if isinstance(self.rounds, int) else len(self.rounds)

    @property
    def num_entries(self) -> int:
        """How many rounds have settings of their own; those beyond go on with the last one's."""
        listed = 0 if isinstance(self.rounds, int) else len(self.rounds)
        return max([listed, *(len(numbers) for numbers in self.schedules.values())])

    def every_round(self) -> list[Config]:
        """The configs that hold in some round: one for each round with settings of its own, else this one."""
        return [self.for_round(number) for number in range(1, self.num_entries + 1)] or [self]

    @property
    def references(self) -> tuple[str, ...]:
        """The references by name; empty for none."""
        named = (self.reference,) if isinstance(self.reference, str) else self.reference
        return () if named == ("none",) else named

    @property
    def rewards(self) -> tuple[RewardConfig, ...]:
        """The rewards, if there are any."""
        return self.score.rewards if self.score is not None else ()

    @property
    def num_engines(self) -> int:
        """The engines that are needed: none where pairs are ready and nothing is evaluated."""
        return self.sample.engines if self.pairs is None or self.evaluate is not None else 0

    @property
    def num_scorers(self) -> int:
        """The scorers that are needed: some wherever anything is sampled."""
        return self.score.workers if self.score is not None and self.num_engines else int(self.num_engines > 0)

    def for_round(self, number: int) -> Config:
        """The config of one round: its overrides applied.

        Rounds beyond the last entry go on with it; round 0, the evaluation before the first, has none.

        Raises:
            ConfigError: if an entry of `rounds` itself holds a list of numbers.
        """
        if self.num_entries == 0 or number < 1:
            return self
        values = self.model_dump(exclude_unset=True)
        found = Config.model_validate(merged(values, overrides_of(values, number)) | {"rounds": 1, "schedules": {}})
        if found.schedules:
            raise ConfigError(
                next(iter(found.schedules)),
                wanted="one number, for the one round of this entry",
                got="a list",
                fix="write the list in the section itself, outside rounds",
            )
        return found


def overrides_of(settings: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What a round overrides: the numbers of schedules, and over them its entry where `rounds` is a list.

    The last ones hold beyond them too.
    """
    found: dict[str, Any] = {}
    for key, numbers in (settings.get("schedules") or {}).items():
        value: Any = numbers[min(max(number, 1), len(numbers)) - 1]
        for part in reversed(key.split(".")):
            value = {part: value}
        found = merged(found, value)
    return merged(found, entry_of(settings.get("rounds"), number))  # type: ignore[no-any-return]


def entry_of(rounds: Any, number: int) -> dict[str, Any]:
    """A round's entry where `rounds` is a list, whose last one holds beyond it too."""
    if not isinstance(rounds, (list, tuple)) or not rounds or number < 1:
        return {}
    return rounds[min(number, len(rounds)) - 1] or {}


def merged(under: Any, over: Any) -> Any:
    """`over` laid upon `under`, sections field by field."""
    if isinstance(under, dict) and isinstance(over, dict):
        return under | {key: merged(under.get(key), value) for key, value in over.items()}
    return over
