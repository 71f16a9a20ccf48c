"""``prefloop plan``: an outlook in words or JSON, and the refusal of what cannot be held. `run` refuses by it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.plan.fit import Shortage
from pipeline.plan.hardware import Hardware, here, named
from pipeline.plan.nearest import Words, nearest_fit
from pipeline.plan.outlook import Outlook, as_json, look_ahead
from pipeline.plan.rates import Rates, keep_rates, kept_rates
from pipeline.plan.rounds import distinct, rounds_of
from pipeline.plan.survey import Survey, look
from pipeline.plan.telling import lines, set_words
from stages.errors import ConfigError


def show_plan(
    config_file: Path, overrides: Sequence[str], *, devices: str | None, in_json: bool, calibrated: bool = False
) -> None:
    """Print what a config will do on the devices named, else on what is here.

    Args:
        calibrated: measure first how fast the stages work here, and keep that for later plans.

    Raises:
        ConfigError: if they cannot hold it, or by the estimate will not; with the nearest setting that they hold.
        PrefloopError: for a file that is here and cannot be used.
    """
    config = load_config(config_file, overrides)
    hardware, survey = _hardware(config, devices), _survey(config)
    rates = _rates(config, survey, None if devices else hardware, calibrated=calibrated)
    outlook = look_ahead(config, survey, hardware, elsewhere=devices is not None, rates=rates)
    if outlook.shortages and hardware is not None:

        def look_again(words: Words) -> tuple[Config, Sequence[Shortage]]:
            other = load_config(config_file, [*overrides, *words])
            return other, look_ahead(other, survey, hardware, elsewhere=devices is not None).shortages

        outlook = replace(outlook, nearest=nearest_fit(look_again, hardware))
    console = Console()
    if in_json:
        console.text(as_json(outlook))
    else:
        for label, text in lines(outlook):
            console.text(f"{label:<11}{text}".rstrip())
    if outlook.shortages:
        raise _refusal(outlook.shortages, nearest=outlook.nearest)


def outlook_of(config: Config, devices: str | None = None) -> Outlook:
    """The outlook on the devices named, else on this machine; a cluster elsewhere is not known."""
    return look_ahead(config, _survey(config), _hardware(config, devices), elsewhere=devices is not None)


def _hardware(config: Config, devices: str | None) -> Hardware | None:
    if devices is not None:
        return named(devices)
    return here(config.cluster) if config.cluster.address == "local" else None


def _survey(config: Config) -> Survey:
    return look(list(distinct(found for _, found in rounds_of(config))) or [config])


def _rates(config: Config, survey: Survey, hardware: Hardware | None, *, calibrated: bool) -> Rates | None:
    """How fast stages work here, as far as it is known.

    Args:
        hardware: of this machine; None where the plan is for another.

    Raises:
        ConfigError: if they are to be measured and cannot.
    """
    if hardware is None:
        if calibrated:
            wanted, fix = "this machine, on which it measures", "leave --devices or cluster.address out"
            raise ConfigError("--calibrate", wanted=wanted, got="a plan for another", fix=fix)
        return None
    if calibrated:
        from pipeline.plan.calibrate import calibrate

        rates = calibrate(config, survey, hardware)
        if survey.policy.facts is not None and not rates.missing:
            keep_rates(rates, config, survey.policy.facts, hardware)
        return rates
    return kept_rates(config, survey.policy.facts, hardware) if survey.policy.facts is not None else None


def refuse_what_cannot_be_held(config: Config) -> list[Shortage]:
    """Refuse a run, before anything is started, that its machine cannot hold for certain.

    Returns:
        What by the estimate will be too little, for the run to say.

    Raises:
        ConfigError: with everything that is too little for certain.
    """
    shortages = outlook_of(config).shortages
    if certain := [shortage for shortage in shortages if shortage.certain]:
        raise _refusal(certain)
    return list(shortages)


def _refusal(shortages: Sequence[Shortage], *, nearest: Words | None = None) -> ConfigError:
    """The first shortage, those that are certain before those that are estimated, and how many more there are.

    Args:
        nearest: words that make it fit, where some were found.
    """
    first, *others = sorted(shortages, key=lambda shortage: not shortage.certain)
    more = f" ({len(others)} more: {', '.join(other.where for other in others)})" if others else ""
    fix = f"the nearest that fits: {set_words(nearest)}; or: {first.fix}" if nearest else first.fix
    return ConfigError(first.where, wanted=first.wanted, got=first.got, fix=fix + more)
