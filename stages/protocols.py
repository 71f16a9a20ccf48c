"""What a stage asks of the engine, reward or trainer it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from stages.sample.config import SampleConfig
from stages.vocab import FinishReason, RewardRole
from stages.weights import refuse_changed_weights, weights_sha256


@dataclass(frozen=True, slots=True)
class Weights:
    """One policy's weights.

    Attributes:
        path: a Hugging Face folder in safetensors, in the policy's dtype.
        sha256: see `stages.weights.weights_sha256`.
        round: the round that made them; 0 for the first policy.
        master: the same weights in float32, where the policy's dtype is another.
        master_sha256: of the master; two masters may round to the same policy.
    """

    path: Path
    sha256: str
    round: int
    master: Path | None = None
    master_sha256: str | None = None

    @classmethod
    def found(cls, path: Path, *, round: int, master: Path | None = None) -> Weights:
        """The weights in a folder, hashed."""
        return cls(path, weights_sha256(path), round, master, weights_sha256(master) if master else None)

    @property
    def identity(self) -> str:
        """What training from these weights, or referring to them, depends on."""
        return self.master_sha256 or self.sha256

    def refuse_changed(self) -> None:
        """Check that the folders still hold these weights.

        Raises:
            StageError: if one of them does not.
        """
        refuse_changed_weights(self.path, self.sha256)
        if self.master is not None and self.master_sha256 is not None:
            refuse_changed_weights(self.master, self.master_sha256)


@dataclass(frozen=True, slots=True)
class Moments:
    """AdamW's moments after an update, in a folder of safetensors with this hash (`stages.weights.weights_sha256`)."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One sampled answer; `logps` has one entry a token, in nats, at temperature 1."""

    text: str
    token_ids: list[int]
    logps: list[float]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One prompt to answer; sample i of it uses ``seed + i``."""

    prompt_token_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Loading:
    """How an engine came to hold its weights.

    Attributes:
        way: ``held``: it did already; ``in place``: taken by the running engine; ``started``: with a new engine.
        seconds: that it took, the check of the files' sha256 included.
        reason: why an engine was started; empty where none was.
    """

    way: Literal["held", "in place", "started"]
    seconds: float
    reason: str = ""


class Sampler(Protocol):
    """An engine that holds one policy at a time."""

    def load(self, weights: Weights, *, afresh: bool = False) -> Loading:
        """Hold these weights from now on; `afresh`: in a new engine, whatever the running one holds."""
        ...

    def generate(self, requests: Sequence[SampleRequest], config: SampleConfig) -> list[list[Answer | None]]:
        """``num_generations`` answers a request, in order; None where the engine gave none."""
        ...

    def logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """Log-prob of every answer, given by token ids, to its prompt: sums over its tokens, in nats, temperature 1.

        Not a number where the engine gave none.
        """
        ...

    @property
    def max_model_len(self) -> int:
        """The most tokens a prompt and its answer may have together."""
        ...

    def rest(self) -> None:
        """Let go of the device's memory for others; `load` comes before the next use."""
        ...


Turn = str | list[dict[str, str]]
"""A prompt or completion as a reward sees it: text, or the messages of a chat."""


@dataclass(frozen=True, slots=True)
class NoReward:
    """Why there is no number for an answer."""

    reason: str


class Reward(Protocol):
    """Something that gives every answer a number, or None, or says why it cannot."""

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> RewardRole: ...

    @property
    def weight(self) -> float: ...

    @property
    def sees(self) -> Literal["turns", "texts"]:
        """What it is given of a chat: the messages, or the very text that was tokenised and that was sampled."""
        ...

    def __call__(
        self, prompts: Sequence[Turn], completions: Sequence[Turn], columns: Mapping[str, Sequence[object]]
    ) -> Sequence[float | NoReward | None]:
        """One reward an answer; `columns` holds ``answer`` and the prompts' extra columns."""
        ...

    def rest(self) -> None:
        """Let go of the device's memory for others; the next call takes it again."""
        ...
