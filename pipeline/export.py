"""A run's pairs for other trainers: TRL's columns, with the reference's log-probs joined on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import models
from pipeline.artifacts import MANIFEST, StageFolder
from pipeline.console import Console
from pipeline.files import read_json
from pipeline.reading import run_settings
from stages.contracts import MESSAGE, PAIRS, PROMPTS, REFERENCE_LOGPS
from stages.errors import InputError

_ENDINGS = (".parquet", ".jsonl")


def export_pairs(run: Path, *, kind: str, rounds: Sequence[int], out: Path | None) -> None:
    """Write the pairs of a run's rounds as one file, and say where.

    Columns are TRL's ``prompt``, ``chosen``, ``rejected`` (messages where the prompts are chats, else text),
    ``ref_chosen_logps`` and ``ref_rejected_logps`` (summed, in nats; of the first reference), with the scores, the
    margin, the ids and the round beside them.

    Other trainers close every answer: TRL appends the EOS to a text. An answer that was cut at max_new_tokens, or that
    a text of sample.stop ended, has none, and its log-prob is not that of the closed answer. Both ``ref_…`` columns are
    null for a pair with such an answer: leave these rows out, or let the trainer compute the columns. So are they for
    a round whose objective takes no reference.

    Raises:
        InputError: if there is no such run, a round without finished pairs, or an ending that is not known.
    """
    assert kind == "trl"
    target = out or run / "export" / "trl.parquet"
    if target.suffix not in _ENDINGS:
        raise InputError(
            str(target), wanted=f"a file ending in {' or '.join(_ENDINGS)}", got=target.name, fix="--out pairs.parquet"
        )
    console = Console()
    folders, ends = _round_folders(run, rounds, console), _find_ends(run)
    tables = [table for folder in folders for table in _round_tables(folder, ends)]
    if len({table.schema.field("prompt").type for table in tables}) > 1:
        raise InputError(
            str(run),
            wanted="pairs of chats, or pairs of plain text",
            got="rounds of both",
            fix="export them apart: --round K --out FILE",
        )
    table = pa.concat_tables(tables)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".parquet":
        pq.write_table(table, target, compression="zstd")
    else:
        from datasets import Dataset

        Dataset(table).to_json(str(target), force_ascii=False)
    console.text(f"{table.num_rows:,} pairs of {len(folders)} rounds   {target}")
    if num_open := table["ref_chosen_logps"].null_count:
        why = (
            "their objective takes no reference, or one of their answers does not end in an EOS, which other trainers "
            "append"
            if ends is not None
            else "no tokenizer of the policy is here, to see which answers end in an EOS"
        )
        console.text(f"{num_open:,} of them without reference log-probs: {why}")


def _round_folders(run: Path, rounds: Sequence[int], console: Console) -> list[Path]:
    """The folders of the rounds named, else of all but the last ones that are not finished."""
    found = {int(f.name.rpartition("-")[2]): f for f in sorted(run.glob("round-[0-9]*")) if (f / "pairs").is_dir()}
    missing = next((number for number in rounds if number not in found), None)
    if not found or missing is not None:
        raise InputError(
            str(run),
            wanted="a run with pairs" if not found else f"pairs of round {missing}",
            got="no round with pairs in it" if not found else f"pairs of the rounds {', '.join(map(str, found))}",
            fix="runs lie in runs/NAME by default",
        )
    wanted = list(rounds or sorted(found))
    lacking = {number: lack for number in wanted if (lack := _lack(found[number])) is not None}
    while not rounds and len(wanted) > 1 and wanted[-1] in lacking:
        number = wanted.pop()
        console.text(f"round {number} is left out: {lacking[number]}")
    for number in wanted:
        if number in lacking:
            raise InputError(
                str(found[number]),
                wanted="finished pairs, and finished reference_logps beside the pairs",
                got=lacking[number],
                fix="let the round finish, or name finished ones with --round",
            )
    return [found[number] for number in wanted]


def _lack(folder: Path) -> str | None:
    """In words, what a round lacks to be exported; None if nothing."""
    pairs, logps = StageFolder(folder / "pairs", PAIRS), _reference(folder)
    num_parts = len(pairs.entries())
    if not pairs.is_closed() or not num_parts or pairs.missing(num_parts):
        return "its pairs are not finished"
    if _takes_no_reference(folder):
        return None
    if not logps.is_closed() or logps.missing(num_parts):
        return "its reference_logps are not finished" if logps.path.is_dir() else "no reference_logps yet"
    return None


def _takes_no_reference(folder: Path) -> bool:
    """Whether a round was trained without log-probs of a reference."""
    return not any(folder.glob("reference_logps*")) and (folder / "policy" / MANIFEST).exists()


def _reference(folder: Path) -> StageFolder:
    """The log-probs of a round's first reference; with several, each has a folder of its own."""
    several = folder / "reference_logps-0"
    return StageFolder(several if several.is_dir() else folder / "reference_logps", REFERENCE_LOGPS)


def _round_tables(folder: Path, ends: Ends | None) -> Iterator[pa.Table]:
    pairs, logps = StageFolder(folder / "pairs", PAIRS), _reference(folder)
    chats = _conversations(folder)
    closing = frozenset() if ends is None else ends.of_chats if chats else ends.of_texts
    for entry in pairs.entries():
        table = logps.read(entry.shard) if not _takes_no_reference(folder) else REFERENCE_LOGPS.table([])
        known = dict(zip(*(table[name].to_pylist() for name in ("response_id", "logp")), strict=True))
        yield _trl_table(pairs.read(entry.shard).to_pylist(), known, chats, closing)


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens that an answer must end in to be what another trainer makes of its text.

    Attributes:
        of_texts: the tokenizer's EOS, which trainers append to a text.
        of_chats: every EOS of the policy: the chat template writes one of them.
    """

    of_texts: frozenset[int]
    of_chats: frozenset[int]


def _find_ends(run: Path) -> Ends | None:
    """The ends of the answers of a run's policies, which share one tokenizer; None where none of them is here."""
    policy = run_settings(run).get("policy", {})
    folders = sorted(run.glob("round-[0-9]*/policy"), reverse=True)
    first = models.find_here(policy["path"], key="policy.path") if "path" in policy else None
    folder = next((f for f in (*folders, first) if f is not None and any(f.glob("tokenizer*"))), None)
    if folder is None:
        return None
    from stages.tokenizers import load_tokenizer

    eos = load_tokenizer(folder, pad_token=policy.get("pad_token"), key="policy.path").eos_token_id
    generation = folder / "generation_config.json"
    more = read_json(generation).get("eos_token_id") if generation.exists() else None
    return Ends(frozenset([eos]), frozenset([eos, *(more if isinstance(more, list) else [more])]) - {None})


def _conversations(folder: Path) -> dict[str, Any]:
    """Each prompt's chat, where all of the round's prompts are chats; else none."""
    chats: dict[str, Any] = {}
    if (folder / "prompts").is_dir():
        for table in StageFolder(folder / "prompts", PROMPTS).read_all():
            rows = table.select(["prompt_id", "conversation"])
            chats |= dict(zip(rows["prompt_id"].to_pylist(), rows["conversation"].to_pylist(), strict=True))
    return chats if chats and all(chats.values()) else {}


def _trl_table(
    pairs: list[dict[str, Any]], logps: dict[str, float], chats: dict[str, Any], closing: frozenset[int]
) -> pa.Table:
    turn = pa.list_(MESSAGE) if chats else pa.string()
    rows = []
    for pair in pairs:
        answers = {role: pair[role] for role in ("chosen", "rejected")}
        if chats:
            answers = {role: [{"role": "assistant", "content": text}] for role, text in answers.items()}
        fit = all(pair[f"{role}_token_ids"][-1] in closing for role in ("chosen", "rejected"))
        rows.append(
            {
                "prompt": chats[pair["prompt_id"]] if chats else pair["prompt"],
                **answers,
                "ref_chosen_logps": logps.get(pair["chosen_id"]) if fit else None,
                "ref_rejected_logps": logps.get(pair["rejected_id"]) if fit else None,
                **{name: pair[name] for name in ("score_chosen", "score_rejected", "margin")},
                **{name: pair[name] for name in ("pair_id", "prompt_id", "chosen_id", "rejected_id", "round")},
            }
        )
    numbers = ("ref_chosen_logps", "ref_rejected_logps", "score_chosen", "score_rejected", "margin")
    ids = ("pair_id", "prompt_id", "chosen_id", "rejected_id")
    fields = [(name, turn) for name in ("prompt", "chosen", "rejected")]
    fields += [(name, pa.float64()) for name in numbers] + [(name, pa.string()) for name in ids]
    return pa.Table.from_pylist(rows, schema=pa.schema([*fields, ("round", pa.int32())]))
