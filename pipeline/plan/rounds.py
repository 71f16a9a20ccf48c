"""One round before it runs: which policies it samples, trains and refers to, in words, and how many rows it makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, overrides_of
from pipeline.config_checks import is_policy_name
from pipeline.lineage import Lineage
from pipeline.plan.fit import lengths_of
from pipeline.plan.survey import Survey
from pipeline.schedule import asked_rounds
from stages.update.batching import num_steps

ID_BYTES = 4  # a token's id
LOGP_BYTES = 4
TEXT_BYTES = 4  # a token's text, roughly
ROW_BYTES = 300  # ids, counts and rewards of a row

_TOLD = ("reference", "start", "momentum", "prompts.per_round", "sample.num_generations")  # by a round's sentence


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
        num_references: how many policies the objective refers to.
        num_policies: that it writes: its result, and the mixtures that it starts from or refers to.
        tables_bytes: of its tables, at most and roughly.
        own: what it sets for itself and the sentence does not tell otherwise: dotted names with values.
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
    num_references: int
    num_policies: int
    tables_bytes: int
    own: tuple[str, ...]

    @property
    def sentence(self) -> str:
        if self.finished:
            return f"is finished: it started from {self.start}"
        own = f", with {' and '.join(self.own)}" if self.own else ""
        if self.ready_pairs is not None:
            return (
                f"trains {self.start} on the ready pairs of {self.ready_pairs}, at most {self.most_pairs:,}, "
                f"in at most {self.most_steps:,} steps, against {self.reference}{own}"
            )
        return (
            f"samples {self.num_prompts:,} prompts x {self.num_generations} answers from {self.sampling}, "
            f"makes at most {self.most_pairs:,} {self.made}, and trains "
            f"{'it' if self.start == self.sampling else self.start} on them in at most {self.most_steps:,} steps, "
            f"against {self.reference}{own}"
        )


def rounds_of(config: Config) -> Iterator[tuple[int, Config]]:
    """Each round's number, with the config that holds in it."""
    for number in range(1, asked_rounds(config.folder(), config.num_rounds) + 1):
        yield number, config.for_round(number)


def distinct(configs: Iterable[Config]) -> Iterator[Config]:
    """Each config that differs from the one before it: most runs have one for all rounds."""
    last = None
    for config in configs:
        if config != last:
            yield config
        last = config


def round_outlook(number: int, config: Config, survey: Survey, *, whole: Config, finished: bool) -> RoundOutlook:
    """One round of the run of `whole`, by the config that holds in it."""
    update, file = config.update, survey.data_of(config)
    num_prompts = config.prompts.per_round if config.prompts is not None else (file.num_rows or 0) if file else 0
    lengths = lengths_of(config, survey)
    answer = lengths.answer * (ID_BYTES + TEXT_BYTES)
    num_generations = config.sample.num_generations if config.pairs is None else 0
    candidates = num_prompts * num_generations
    sampling = _onward(number, config)
    most_pairs = num_prompts * (config.pair.most_pairs(num_generations) if config.pairs is None else 1)
    made = "groups" if config.pairs is None and config.pair.strategy == "groups" else "pairs"
    pair = lengths.prompt * (ID_BYTES + TEXT_BYTES) + (num_generations if made == "groups" else 2) * answer
    return RoundOutlook(
        number=number,
        sampling=sampling,
        start="the first policy" if config.start == "initial" else sampling,
        reference=_reference_words(number, config),
        finished=finished,
        num_prompts=num_prompts,
        num_generations=num_generations,
        ready_pairs=config.pairs.path if config.pairs is not None else None,
        made=made,
        most_pairs=most_pairs,
        most_steps=num_steps(most_pairs, size=update.global_batch_size, num_epochs=update.num_train_epochs),
        num_references=len(_references(config)),
        num_policies=1 if number == 1 else 1 + bool(config.momentum) + ("ema" in config.references),
        tables_bytes=candidates * (answer + lengths.answer * LOGP_BYTES + 2 * ROW_BYTES)
        + most_pairs * (pair + ROW_BYTES),
        own=tuple(_own_settings(overrides_of(dict(whole), number))),
    )


def _result_of(number: int) -> str:
    return f"round {number}'s result" if number else "the first policy"


def _onward(number: int, config: Config) -> str:
    """What a round goes on from."""
    beyond = f" and {config.momentum:g} times its last change beyond it" if config.momentum and number > 1 else ""
    return _result_of(number - 1) + beyond


def _references(config: Config) -> Sequence[str]:
    """The references that the objective takes; some take none."""
    taken = config.update.num_references[1] != 0 or "stream" in config.update.needs
    return config.references if taken else ()


def _reference_words(number: int, config: Config) -> str:
    return " and ".join(_reference(number, name, config) for name in _references(config)) or "no reference"


def _reference(number: int, name: str, config: Config) -> str:
    if name == "initial" or (name == "ema" and number == 1):
        return "the first policy"
    if name == "ema":
        return f"the average of the policies so far (decay {config.ema_decay:g})"
    if name == "previous" and number > 1:
        plain = config.start == "previous" and not config.momentum
        return _result_of(number - 2) if plain else "what the round before started from"
    return name if is_policy_name(name) else "itself as the round starts"


def num_settled(config: Config) -> int:
    """How many rounds of the run are settled, from its folder."""
    return len(Lineage.read(config.folder() / "run.json").rounds)


def _own_settings(overrides: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """What a round overrides, each as a dotted name with its value."""
    for name, value in overrides.items():
        if isinstance(value, Mapping):
            yield from _own_settings(value, f"{within}{name}.")
        elif f"{within}{name}" not in _TOLD:
            yield f"{within}{name} {value}"
