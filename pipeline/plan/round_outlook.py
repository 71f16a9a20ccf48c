"""One round of a config, before it runs: in a sentence, with upper bounds of its rows, steps and tables."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config
from pipeline.config_checks import is_policy_name
from pipeline.plan.fit import lengths_of
from pipeline.plan.survey import Survey
from stages.update.batching import num_steps

_ID_BYTES = 4  # a token's id
_LOGP_BYTES = 4
_TEXT_BYTES = 4  # a token's text, roughly
_ROW_BYTES = 300  # ids, counts and rewards of a row


@dataclass(frozen=True, slots=True)
class RoundOutlook:
    """One round, before it runs.

    Attributes:
        sampling, start: the policies that sample and are trained, in words.
        reference: what the objective refers to, in words.
        ready_pairs: where they come from, if none are sampled.
        finished: it is settled already.
        made: what it makes of the candidates: pairs or groups.
        most_pairs, most_steps: upper bounds; of groups, where it makes these.
        tables_bytes: of its tables, at most and roughly.
    """

    number: int
    sampling: str
    start: str
    reference: str
    finished: bool
    num_prompts: int
    num_generations: int
    ready_pairs: str | None
    made: str
    most_pairs: int
    most_steps: int
    tables_bytes: int

    @property
    def sentence(self) -> str:
        if self.finished:
            return f"is finished: it started from {self.start}"
        if self.ready_pairs is not None:
            return (
                f"trains {self.start} on the ready pairs of {self.ready_pairs}, at most {self.most_pairs:,}, "
                f"in at most {self.most_steps:,} steps, against {self.reference}"
            )
        return (
            f"samples {self.num_prompts:,} prompts x {self.num_generations} answers from {self.sampling}, "
            f"makes at most {self.most_pairs:,} {self.made}, and trains "
            f"{'it' if self.start == self.sampling else self.start} on them in at most {self.most_steps:,} steps, "
            f"against {self.reference}"
        )


def round_outlook(number: int, config: Config, survey: Survey, *, finished: bool) -> RoundOutlook:
    """A round's outlook; `finished`: it is settled already."""
    update, file = config.update, survey.data_of(config)
    num_prompts = config.prompts.per_round if config.prompts is not None else (file.num_rows or 0) if file else 0
    lengths = lengths_of(config, survey)
    answer = lengths.answer * (_ID_BYTES + _TEXT_BYTES)
    num_generations = config.sample.num_generations if config.pairs is None else 0
    candidates = num_prompts * num_generations
    sampling = _onward(number, config)
    most_pairs = num_prompts * (config.pair.most_pairs(num_generations) if config.pairs is None else 1)
    made = "groups" if config.pairs is None and config.pair.strategy == "groups" else "pairs"
    pair = lengths.prompt * (_ID_BYTES + _TEXT_BYTES) + (num_generations if made == "groups" else 2) * answer
    return RoundOutlook(
        number=number,
        sampling=sampling,
        start="the first policy" if config.start == "initial" else sampling,
        reference=_references(number, config),
        finished=finished,
        num_prompts=num_prompts,
        num_generations=num_generations,
        ready_pairs=config.pairs.path if config.pairs is not None else None,
        made=made,
        most_pairs=most_pairs,
        most_steps=num_steps(most_pairs, size=update.global_batch_size, num_epochs=update.num_train_epochs),
        tables_bytes=candidates * (answer + lengths.answer * _LOGP_BYTES + 2 * _ROW_BYTES)
        + most_pairs * (pair + _ROW_BYTES),
    )


def _result_of(number: int) -> str:
    return f"round {number}'s result" if number else "the first policy"


def _onward(number: int, config: Config) -> str:
    """What a round goes on from."""
    beyond = f" and {config.momentum:g} times its last change beyond it" if config.momentum and number > 1 else ""
    return _result_of(number - 1) + beyond


def _references(number: int, config: Config) -> str:
    if config.update.num_references[1] == 0 and "stream" not in config.update.needs:
        return "no reference"
    return " and ".join(_reference(number, name, config) for name in config.references)


def _reference(number: int, name: str, config: Config) -> str:
    if name == "initial" or (name == "ema" and number == 1):
        return "the first policy"
    if name == "ema":
        return f"the average of the policies so far (decay {config.ema_decay:g})"
    if name == "previous" and number > 1:
        plain = config.start == "previous" and not config.momentum
        return _result_of(number - 2) if plain else "what the round before started from"
    return name if is_policy_name(name) else "itself as the round starts"


def evaluation_bytes(config: Config, survey: Survey) -> int:
    """Of an evaluation's tables, roughly."""
    if config.evaluate is None:
        return 0
    each = lengths_of(config, survey).answer * (_ID_BYTES + _TEXT_BYTES + _LOGP_BYTES) + 2 * _ROW_BYTES
    return config.evaluate.num_prompts * each
