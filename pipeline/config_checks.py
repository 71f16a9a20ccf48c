"""Settings that do not go together: what single sections cannot see, refused with both sides and a fix."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from stages.errors import ConfigError
from stages.score.config import ScoreConfig, reward_names

if TYPE_CHECKING:
    from pipeline.config import Config

REFERENCES = ("round_start", "initial", "previous", "ema", "none")
"""The words for references; anything else is a policy's folder or hub name."""


def check_across(config: Config) -> None:
    """Refuse what single sections cannot see.

    Raises:
        ConfigError: with the first two settings that do not go together.
    """
    if config.pairs is None:
        _check_on_policy(config)
    else:
        _check_offline(config)
    _check_references(config)
    _check_rows(config)
    _check_needs(config)
    if config.sample.max_model_len is not None and config.sample.max_new_tokens >= config.sample.max_model_len:
        raise ConfigError(
            "sample.max_new_tokens",
            wanted=f"less than sample.max_model_len {config.sample.max_model_len}, so that a prompt fits beside it",
            got=str(config.sample.max_new_tokens),
            fix=f"at most {config.sample.max_model_len - 1}",
        )
    if config.score is not None:
        _check_rewards(config.score)
    if config.cluster.placement == "colocate":
        _check_turns(config)
    _check_looks(config)


def _check_looks(config: Config) -> None:
    """Refuse limits on what no evaluation tells; the gate's defaults hold only where it tells them."""
    stop, gate, evaluate = config.stop_when, config.gate, config.evaluate
    default = type(gate)().limits if gate is not None else {}
    asked = [f"stop_when.{name}" for name in ("patience", "max_kl") if getattr(stop, name)]
    if gate is not None:
        asked += [f"gate.{name}" for name, limit in gate.limits.items() if limit != default[name]]
    for key in asked:
        wants_kl, wants_texts = key.endswith(".max_kl"), key.endswith(".max_texts_nll")
        if evaluate is None:
            wanted, got, fix = "", "none", "add evaluate: {holdout: 0.1}"
        elif wants_kl and not evaluate.kl:
            wanted, got, fix = " with kl: true", "evaluate.kl false", "--set evaluate.kl=true"
        elif wants_texts and evaluate.texts is None:
            wanted, got, fix = " with texts", "no evaluate.texts", "--set evaluate.texts.path=real_texts.jsonl"
        else:
            continue
        raise ConfigError(key, wanted=f"an evaluation to look at{wanted}", got=got, fix=fix)
    if "gate.max_holdout_drop" in asked and not any(reward.role == "holdout" for reward in config.rewards):
        raise ConfigError(
            "gate.max_holdout_drop",
            wanted="a reward of role holdout, which training never sees",
            got="none",
            fix="add one to score.rewards with role: holdout, or leave the limit out",
        )


def _check_turns(config: Config) -> None:
    """Refuse what has stages overlap, where they take turns."""
    if config.cluster.streaming == "on":
        raise ConfigError(
            "cluster.streaming",
            wanted="auto or off with cluster.placement colocate, under which stages take turns",
            got="on",
            fix="--set cluster.streaming=auto",
        )
    if config.max_staleness:
        raise ConfigError(
            "max_staleness",
            wanted="0 with cluster.placement colocate: no engine samples while the trainers have their turn",
            got=str(config.max_staleness),
            fix="--set max_staleness=0, or --set cluster.placement=split",
        )


def _check_on_policy(config: Config) -> None:
    for key in ("prompts", "score"):
        if getattr(config, key) is None:
            raise ConfigError(
                key,
                wanted="prompts and score, or pairs to train on as they are",
                got=f"no {key}",
                fix="prompts: {path: prompts.jsonl}" if key == "prompts" else "score: {rewards: [...]}",
            )
    if config.sample.num_generations < 2:
        raise ConfigError(
            "sample.num_generations", wanted="2 or more answers a prompt, to choose from", got="1", fix="8 is usual"
        )
    config.pair.refuse_idle(config.sample.num_generations)


def _check_offline(config: Config) -> None:
    if config.prompts is not None:
        raise ConfigError(
            "pairs", wanted="pairs, or prompts to sample pairs from", got="both", fix="--set prompts=null"
        )
    if isinstance(config.rounds, int) and config.rounds > 1:
        raise ConfigError(
            "rounds",
            wanted="1 with ready pairs: nothing new is sampled between rounds",
            got=str(config.rounds),
            fix="--set rounds=1, and update.num_train_epochs for more passes",
        )
    if config.evaluate is not None and (config.evaluate.path is None or config.score is None):
        raise ConfigError(
            "evaluate",
            wanted="evaluate.path and score.rewards, to sample and judge answers to held-out prompts",
            got="evaluate.holdout, but no prompts" if config.evaluate.path is None else "no score",
            fix="--set evaluate=null, or name both",
        )


def _check_rewards(score: ScoreConfig) -> None:
    names = reward_names(score)
    if not any(reward.role == "main" for reward in score.rewards):
        raise ConfigError(
            "score.rewards",
            wanted="at least one reward of role main, which makes the pairs",
            got="none",
            fix="leave the role of one of them out",
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            "score.rewards", wanted="a name of its own for each reward", got=f"{twice} twice", fix="add name: to one"
        )


# ---- what the objectives ask for ------------------------------------------------------------------------------------


def is_policy_name(reference: str) -> bool:
    """Whether a reference is a policy's folder or hub name instead of a word."""
    return reference not in REFERENCES


def _check_references(config: Config) -> None:
    names = (config.reference,) if isinstance(config.reference, str) else config.reference
    for name in names:
        if is_policy_name(name) and "/" not in name and not name.startswith("embedded:"):
            near = difflib.get_close_matches(name, REFERENCES, n=1)
            raise ConfigError(
                "reference",
                wanted=f"{', '.join(REFERENCES)}, or a policy's folder or hub name, with a slash in it",
                got=repr(name),
                fix=f"did you mean {near[0]}?" if near else f"./{name} for a folder of that name",
            )
    if len(set(names)) < len(names) or (len(names) > 1 and "none" in names):
        raise ConfigError(
            "reference",
            wanted="one reference, or several different ones",
            got=", ".join(names),
            fix="for example [initial, round_start]",
        )
    least, most = config.update.num_references
    count, objective = len(config.references), config.update.told
    if count < least or (most not in (None, 0) and count > most):  # type: ignore[operator]
        several = least > 1
        raise ConfigError(
            "reference",
            wanted=f"{'at least ' * (most is None)}{least} reference{'s' * several} for {objective}",
            got=", ".join(config.references) or "none",
            fix="for example reference: [initial, path/to/another]" if several else "for example round_start",
        )
    if config.update.reference_logps == "engine":
        _check_engine_logps(config)
    if config.update.keep_optimizer and config.start == "initial":
        raise ConfigError(
            "update.keep_optimizer",
            wanted="false with start: initial, since the moments belong to another policy",
            got="true",
            fix="--set update.keep_optimizer=false, or --set start=previous",
        )
    if config.momentum and config.start == "initial":
        raise ConfigError(
            "momentum",
            wanted="0 with start: initial, since no round goes on from the one before",
            got=f"{config.momentum:g}",
            fix="--set momentum=0, or --set start=previous",
        )


def _check_engine_logps(config: Config) -> None:
    """Refuse the engine's log-probs where it samples with no reference, or where a gate has no floor."""
    back = "--set update.reference_logps=trainer"
    sampler: tuple[str, str] | None = None
    if config.pairs is not None:
        sampler = "prompts to sample from", "ready pairs"
    elif "round_start" not in config.references:
        sampler = "reference round_start", ", ".join(config.references) or "none"
    elif config.start == "initial":
        sampler = "start previous", "initial"
    elif config.max_staleness:
        sampler = "max_staleness 0", str(config.max_staleness)
    if sampler is not None:
        wanted, got = sampler
        raise ConfigError(
            "update.reference_logps",
            wanted=f"{wanted} with engine, since the answers must be a reference's own",
            got=got,
            fix=back,
        )
    gated = [loss.objective.name for loss in config.update.losses() if loss.gated]
    if gated and config.update.gate_floor is None:
        raise ConfigError(
            "update.gate_floor",
            wanted=f"a number of nats with reference_logps engine, since {gated[0]} pushes whatever lies above it",
            got="null",
            fix=f"--set update.gate_floor=0.5 (in float32 0.001), or {back}",
        )


def _check_rows(config: Config) -> None:
    rows, strategy, objective = config.update.rows, config.pair.strategy, config.update.told
    if config.pairs is not None:
        if rows == "groups":
            raise ConfigError(
                "update.loss_type",
                wanted="an objective of pairs, since pairs are ready",
                got=f"{objective}, an objective of groups",
                fix="--set update.loss_type=exo_pair",
            )
    elif rows == "groups" and strategy != "groups":
        raise ConfigError(
            "pair.strategy",
            wanted=f"groups, which {objective} trains on",
            got=str(strategy),
            fix="--set pair.strategy=groups, or --set update.loss_type=exo_pair for pairs",
        )
    elif rows == "pairs" and strategy == "groups":
        raise ConfigError(
            "pair.strategy",
            wanted=f"a rule that makes pairs, which {objective} trains on",
            got="groups",
            fix="--set pair.strategy=best_worst, or --set update.loss_type=exo for groups",
        )


def _check_needs(config: Config) -> None:
    needs, objective = config.update.needs, config.update.told
    if "auxiliary" in needs and config.pairs is not None:
        raise ConfigError(
            "update.loss_type",
            wanted="an objective without auxiliary rewards, since ready pairs have none",
            got=objective,
            fix="sample pairs from prompts instead, with a reward of role auxiliary",
        )
    if "auxiliary" in needs and not any(reward.role == "auxiliary" for reward in config.rewards):
        raise ConfigError(
            "score.rewards",
            wanted=f"at least one reward of role auxiliary, which {objective} trains on",
            got="none",
            fix="add one with role: auxiliary, or take an objective without",
        )
    if "stream" in needs and config.pairs is not None:
        raise ConfigError(
            "update.loss_type",
            wanted="an objective of the ready pairs alone",
            got=f"{objective}, which also takes answers drawn from the reference",
            fix="sample pairs from prompts instead",
        )
    if "stream" in needs and len(config.references) != 1:
        raise ConfigError(
            "reference",
            wanted=f"one reference, whose answers {objective} takes",
            got=", ".join(config.references) or "none",
            fix="--set reference=initial",
        )
