"""What people bring along, read once into published tables: pools of prompts that rounds draw from, ready pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.jobs import inputs
from pipeline.prompts import Form, HeldOut
from pipeline.sections import PairsConfig, PromptsConfig
from pipeline.sources import DataSource
from pipeline.stage import Done
from pipeline.workshop import Workshop
from stages.contracts import PAIRS


def read_prompts(
    shop: Workshop,
    out: StageFolder,
    source: DataSource,
    config: PromptsConfig | PairsConfig | None,
    *,
    columns: Mapping[str, str] | None = None,
    held_out: HeldOut | None = None,
    exclude: StageFolder | None = None,
    limit: int | None = None,
) -> Done:
    """A source of prompts as one published table.

    Args:
        config: how chats are rendered, and which columns hold what.
        columns: in the place of the config's.
        held_out: keep one side of a held-out share; None keeps all.
        exclude: prompts whose question is left out, because it is evaluated on.
        limit: keep this many, drawn by the run's seed.

    Raises:
        InputError: for anything in the source that cannot be used.
    """
    seed, form = shop.config.run.seed, Form(columns or {})
    if config is not None:
        named = config.columns if isinstance(config, PromptsConfig) else {}
        form = Form(columns or named, config.system, config.to_chat, config.chat_template_kwargs)
    job = inputs.PreparePrompts(
        source=source.path,
        key=source.key,
        tokenizer=shop.sources.policy.path,
        pad_token=shop.config.policy.pad_token,
        part=source.part,
        form=form,
        out=out,
        seed=seed,
        held_out=held_out,
        exclude=exclude,
        limit=limit,
    )
    fingerprint = {
        "source": source.sha256,
        "tokenizer": shop.sources.policy_files,
        "part": asdict(source.part),
        "form": asdict(form),
        "held_out": None if held_out is None else [held_out.share, held_out.wanted],
        "exclude": exclude.digest() if exclude else None,
        "limit": limit,
        "seed": seed if limit is not None else None,
    }
    return shop.run_stage("prompts", [out], fingerprint, 1, lambda _: [job])


def read_pool(
    shop: Workshop, out: StageFolder, source: DataSource, config: PromptsConfig | None, *, evaluated: StageFolder | None
) -> Done:
    """A source of training prompts as one published table, without what is evaluated on.

    A share is held out of the evaluation's own source alone; other sources lose the very prompts that are evaluated.

    Args:
        evaluated: the prompts that are evaluated on, if any.
    """
    evaluate, of_evaluation = shop.config.evaluate, shop.sources.evaluation
    held = None
    if evaluate is not None and evaluate.holdout is not None and of_evaluation is not None:
        held = HeldOut(evaluate.holdout, wanted=False) if source.sha256 == of_evaluation.sha256 else None
    return read_prompts(shop, out, source, config, held_out=held, exclude=evaluated)


def read_pairs(shop: Workshop, out: StageFolder, source: DataSource, config: Config, *, round: int) -> Done:
    """A source of ready pairs as a published table of `PAIRS`.

    Raises:
        InputError: for anything in the source that cannot be used.
    """
    assert out.contract is PAIRS and config.pairs is not None
    job = inputs.PreparePairs(
        source=source.path,
        key=source.key,
        tokenizer=shop.sources.policy.path,
        pad_token=config.policy.pad_token,
        part=source.part,
        config=config.pairs,
        out=out,
        round=round,
    )
    fingerprint = {
        "source": source.sha256,
        "tokenizer": shop.sources.policy_files,
        "pairs": config.pairs.identity() | {"path": None},
    }
    return shop.run_stage("pairs", [out], fingerprint, 1, lambda _: [job])
