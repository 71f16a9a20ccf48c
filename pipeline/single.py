"""Stages by themselves: one stage of a config on tables of the contracts, into a folder of the user's choice.

Tables may be a stage's folder of a run, or any Parquet files that keep the contract. What is published stays, and the
same command carries on, as in a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import MANIFEST, StageFolder
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.console import Console
from pipeline.run_folder import only_run
from pipeline.start import opened
from stages.contracts import CANDIDATES, GROUPS, PAIRS, PROMPTS, SCORED, Contract
from stages.errors import ConfigError, InputError, StageError

if TYPE_CHECKING:
    from pipeline.policies import Policies
    from pipeline.round import Round
    from pipeline.workshop import Workshop


def sample_alone(config_file: Path, overrides: Sequence[str], out: Path, *, prompts: Path | None) -> None:
    """Candidates of the config's policy for every prompt: those of the config, or of a table of `PROMPTS`."""
    with _bench(config_file, overrides, out, needs=("policy",) if prompts else _TO_ASK) as shop:
        asked = _prompts_of_config(shop) if prompts is None else _adopted(shop, {PROMPTS: prompts})[0]
        rnd = _round(shop, [asked])
        candidates = rnd.data.sample(asked, rnd.sampling)
        shop.console.text(f"\ncandidates   {candidates.path}\nprompts      {asked.path}")


def score_alone(config_file: Path, overrides: Sequence[str], out: Path, *, prompts: Path, candidates: Path) -> None:
    """The candidates' rewards."""
    with _bench(config_file, overrides, out, needs=("rewards",)) as shop:
        tables = _adopted(shop, {PROMPTS: prompts, CANDIDATES: candidates})
        scored = _round(shop, tables).data.score(*tables)
        shop.console.text(f"\nscored   {scored.path}")


def pair_alone(
    config_file: Path, overrides: Sequence[str], out: Path, prompts: Path, candidates: Path, scored: Path
) -> None:
    """Chosen and rejected answers, or groups, out of scored candidates, and every prompt's fate."""
    with _bench(config_file, overrides, out, needs=()) as shop:
        tables = _adopted(shop, {PROMPTS: prompts, CANDIDATES: candidates, SCORED: scored})
        made = _round(shop, tables).data.pair(*tables)
        shop.console.text(f"\n{made.contract.name:<8}{made.path}\nfates   {out / 'fates'}")


def update_alone(config_file: Path, overrides: Sequence[str], out: Path, *, pairs: Path | None) -> None:
    """The config's policy, updated on pairs: those of the config, or of a table of `PAIRS`, or of `GROUPS`."""
    needs = ("policy", "references") if pairs else ("policy", "references", "pairs")
    with _bench(config_file, overrides, out, needs=needs) as shop:
        update = shop.config.for_round(1).update
        if "stream" in update.needs:
            raise ConfigError(
                "update.loss_type",
                wanted="an objective of the given rows alone",
                got=f"{update.told}, which also takes answers drawn from the reference",
                fix="give the whole run: prefloop run",
            )
        given = _adopted(shop, {GROUPS if update.rows == "groups" else PAIRS: pairs}) if pairs is not None else []
        rnd = _round(shop, given)
        data = given[0] if given else rnd.data.ready_pairs()
        result = rnd.update(rnd.start, data, rnd.reference_logps(data, rnd.references))
        if result is None:
            raise StageError(
                "update",
                wanted="steps whose numbers can be trusted",
                got=rnd.why_no_result,
                fix=f"lower update.learning_rate; {out / 'skipped.jsonl'} names the pairs of the steps skipped",
            )
        shop.console.text(f"\npolicy   {result.path}   (a Hugging Face folder)\nsteps    {out / 'metrics.jsonl'}")


_TO_ASK = ("policy", "prompts", "evaluation")

_NEEDED = {
    "prompts": ("prompts to answer", "--prompts TABLE, or --set prompts.path=… --set pairs=null"),
    "score": ("rewards to score with", "add score: {rewards: [...]}"),
    "pairs": ("pairs to train on", "--pairs TABLE, or --set pairs.path=… --set prompts=null"),
}


@contextmanager
def _bench(config_file: Path, overrides: Sequence[str], out: Path, *, needs: Sequence[str]) -> Iterator[Workshop]:
    config, out = load_config(config_file, overrides), out.absolute()
    for section in ("score" if name == "rewards" else name for name in needs):
        if section in _NEEDED and getattr(config, section) is None:
            wanted, fix = _NEEDED[section]
            raise ConfigError(section, wanted=wanted, got=f"a config without {section}", fix=fix)
    with only_run(out), opened(config, out, Console(), needs=needs) as shop:
        yield shop


def _round(shop: Workshop, tables: Sequence[StageFolder]) -> Round:
    """The round that tables belong to, or the first: its number enters seeds and ids."""
    from pipeline.jobs.tables import RoundOf
    from pipeline.round import Round

    number = max(1, shop.crew.tasks.run(RoundOf(tables[0]))) if tables else 1
    return Round(shop, number, _policies(shop), folder=shop.folder)


def _policies(shop: Workshop) -> Policies:
    """The config's policy is the one that samples, the start, and what every word for a reference means."""
    from pipeline.policies import Policies

    found, config = shop.sources.found_policy, shop.config.for_round(1)
    if found is None:
        return None  # type: ignore[return-value]
    named = shop.sources.of(1).references
    return Policies(found, found, tuple((name, named.get(name, found)) for name in config.references))


def _prompts_of_config(shop: Workshop) -> StageFolder:
    """All prompts of the config, but those that it evaluates on."""
    from pipeline.evaluation import Evaluation
    from pipeline.pools import read_pool
    from pipeline.round import Round

    source, pool = shop.sources.of(1).prompts, StageFolder(shop.folder / "pool", PROMPTS)
    evaluation = Evaluation(shop, shop.config.evaluate) if shop.config.evaluate is not None else None
    assert source is not None
    if evaluation is not None:
        evaluation.prepare()
    evaluated = evaluation.prompts if evaluation is not None else None
    read_pool(shop, pool, source, shop.config.for_round(1).prompts, evaluated=evaluated)
    return Round(shop, 1, _policies(shop), pool=pool, folder=shop.folder, every_prompt=True).data.draw_prompts()


def _adopted(shop: Workshop, given: Mapping[Contract, Path]) -> list[StageFolder]:
    """Tables as stages read them: a run's own folders as they are, anything else cut into shards by prompt.

    Raises:
        InputError: if there is no table at a path, or rows belong to no prompt.
        ContractError: if a table does not keep its contract.
    """
    from pipeline.jobs.tables import AdoptTables

    published = [StageFolder(path.absolute(), contract) for contract, path in given.items()]
    if made_from_one_another(published):
        return published
    files = {contract.name: parquet_files(path) for contract, path in given.items()}
    out = [StageFolder(shop.folder / "given" / contract.name, contract) for contract in given]
    config: Config = shop.config.for_round(1)
    size = config.prompts.shard_size if config.prompts is not None else 64
    found = shop.sources.found_policy
    job = AdoptTables(files, out, size, model=found.path if found else None)
    fingerprint = {"files": shop.crew.tasks.run(job.hashes), "shard_size": size}
    num_shards = shop.crew.tasks.run(job.count)
    shop.run_stage("tables", out, fingerprint, num_shards, lambda _: [job])
    return out


def made_from_one_another(folders: Sequence[StageFolder]) -> bool:
    """Whether these are published tables, each shard made from the same shard of the one before."""
    entries = [folder.entries() for folder in folders]
    for folder, found in zip(folders, entries, strict=True):
        if found and not folder.is_closed():
            raise InputError(
                str(folder.path),
                wanted="a finished table",
                got=f"one without {MANIFEST}, {len(found)} parts so far",
                fix="let its stage finish, or name Parquet files",
            )
    return (
        len({len(found) for found in entries}) == 1
        and all(
            first.sha256 in then.parents
            for before, after in pairwise(entries)
            for first, then in zip(before, after, strict=True)
        )
        and bool(entries[0])
    )


def parquet_files(path: Path) -> list[Path]:
    """A Parquet file, or all of a folder.

    Raises:
        InputError: if there is none.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise InputError(
            str(path),
            wanted="a Parquet file, or a folder of them",
            got="no such path" if not path.exists() else "none in it",
            fix="the tables of a run lie in RUN/round-0001/{prompts,candidates,scored,pairs}",
        )
    return [file.absolute() for file in files]
