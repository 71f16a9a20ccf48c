"""What every reward's settings have in common, whatever gives the reward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator

from stages.errors import ConfigError
from stages.settings import Settings


class RewardSettings(Settings, ABC):
    """Name, role and place in the sum of a reward."""

    name: str | None = Field(None, description="in tables and reports; null: from the path or the function")
    weight: float = Field(
        1.0, description="of this reward in the sum of the main ones, which makes pairs, or of the auxiliary ones"
    )
    role: Literal["main", "auxiliary", "holdout"] = Field(
        "main",
        description="main: makes the pairs; auxiliary: beside the pairs, for objectives that use it; "
        "holdout: reported, never trained on",
    )
    scale: Literal["none", "zscore"] = Field(
        "none", description="zscore: less its mean over the round's answers, by its standard deviation, then weighted"
    )

    @model_validator(mode="after")
    def _only_summed_ones_are_weighted(self) -> Self:
        if self.role != "main" and self.scale != "none":
            self._refuse("scale", "none", "only the main rewards are standardised")
        if self.role == "holdout" and self.weight != 1.0:
            self._refuse("weight", "1.0", "a holdout reward enters no sum")
        return self

    def _refuse(self, key: str, neutral: str, why: str) -> None:
        raise ConfigError(
            key,
            wanted=f"{neutral} for a reward of role {self.role}: {why}",
            got=str(getattr(self, key)),
            fix=f"leave {key} out, or make the role main",
        )

    @property
    @abstractmethod
    def default_name(self) -> str:
        """What it is called where it has no name."""
