"""A run's pairs for other trainers: TRL's columns, with the reference's log-probs joined on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts import MANIFEST, StageFolder, read_json
from pipeline.console import Console
from stages.contracts import MESSAGE, PAIRS, PROMPTS, REFERENCE_LOGPS
from stages.errors import InputError
from stages.tokenizers import end_token_ids

_ENDINGS = (".parquet", ".jsonl")


def export_pairs(run: Path, *, kind: str, rounds: Sequence[int], out: Path | None) -> None:
    """Write the pairs of a run's rounds as one file, and say where.

    Columns are TRL's ``prompt``, ``chosen``, ``rejected`` (messages where the prompts are chats, else text),
    ``ref_chosen_logps`` and ``ref_rejected_logps`` (summed, in nats; of the first reference), with the scores, the
    margin, the ids and the round beside them. TRL ends every answer with an EOS: a pair one of whose answers was cut,
    or ended by a stop text, has no log-probs, since they would be of other tokens.

    Raises:
        InputError: if there is no such run, a round without pairs, or an ending that is not known.
    """
    assert kind == "trl"
    target = out or run / "export" / "trl.parquet"
    if target.suffix not in _ENDINGS:
        raise InputError(
            str(target), wanted=f"a file ending in {' or '.join(_ENDINGS)}", got=target.name, fix="--out pairs.parquet"
        )
    folders = _round_folders(run, rounds)
    tables = [table for folder in folders for table in _round_tables(folder)]
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
    cut = table["ref_chosen_logps"].null_count
    told = f"   {cut:,} without log-probs, since an answer does not end with an EOS" if cut else ""
    Console().text(f"{table.num_rows:,} pairs of {len(folders)} rounds   {target}{told}")


def _round_folders(run: Path, rounds: Sequence[int]) -> list[Path]:
    found = {int(f.name.rpartition("-")[2]): f for f in sorted(run.glob("round-[0-9]*")) if (f / "pairs").is_dir()}
    missing = next((number for number in rounds if number not in found), None)
    if not found or missing is not None:
        raise InputError(
            str(run),
            wanted="a run with pairs" if not found else f"pairs of round {missing}",
            got="no round with pairs in it" if not found else f"pairs of the rounds {', '.join(map(str, found))}",
            fix="runs lie in runs/NAME by default",
        )
    return [found[number] for number in (rounds or sorted(found))]


def _round_tables(folder: Path) -> Iterator[pa.Table]:
    pairs = StageFolder(folder / "pairs", PAIRS)
    logps = StageFolder(folder / "reference_logps", REFERENCE_LOGPS)
    for table in (pairs, logps):
        if not table.is_closed():
            raise InputError(
                str(table.path),
                wanted="a finished table",
                got=f"one without {MANIFEST}",
                fix="let the round finish, or name finished ones with --round",
            )
    chats, ends = _conversations(folder), _end_token_ids(folder / "policy")
    for entry in pairs.entries():
        known = dict(zip(*(logps.read(entry.shard)[name].to_pylist() for name in ("response_id", "logp")), strict=True))
        yield _trl_table(pairs.read(entry.shard).to_pylist(), known, chats, ends)


def _conversations(folder: Path) -> dict[str, Any]:
    """Each prompt's chat, where all of the round's prompts are chats; else none."""
    chats: dict[str, Any] = {}
    if (folder / "prompts").is_dir():
        for table in StageFolder(folder / "prompts", PROMPTS).read_all():
            rows = table.select(["prompt_id", "conversation"])
            chats |= dict(zip(rows["prompt_id"].to_pylist(), rows["conversation"].to_pylist(), strict=True))
    return chats if chats and all(chats.values()) else {}


def _end_token_ids(policy: Path) -> set[int]:
    """The tokens that end the policy's answers, by its config; empty where that does not say."""
    config = read_json(policy / "config.json") if (policy / "config.json").exists() else {}
    found = config.get("eos_token_id")
    return {*end_token_ids(policy), *([found] if isinstance(found, int) else found or [])}


def _trl_table(pairs: list[dict[str, Any]], logps: dict[str, float], chats: dict[str, Any], ends: set[int]) -> pa.Table:
    turn = pa.list_(MESSAGE) if chats else pa.string()
    rows = []
    for pair in pairs:
        answers = {role: pair[role] for role in ("chosen", "rejected")}
        if chats:
            answers = {role: [{"role": "assistant", "content": text}] for role, text in answers.items()}
        whole = not ends or {pair["chosen_token_ids"][-1], pair["rejected_token_ids"][-1]} <= ends
        rows.append(
            {
                "prompt": chats[pair["prompt_id"]] if chats else pair["prompt"],
                **answers,
                "ref_chosen_logps": logps[pair["chosen_id"]] if whole else None,
                "ref_rejected_logps": logps[pair["rejected_id"]] if whole else None,
                **{name: pair[name] for name in ("score_chosen", "score_rejected", "margin")},
                **{name: pair[name] for name in ("pair_id", "prompt_id", "chosen_id", "rejected_id", "round")},
            }
        )
    numbers = ("ref_chosen_logps", "ref_rejected_logps", "score_chosen", "score_rejected", "margin")
    ids = ("pair_id", "prompt_id", "chosen_id", "rejected_id")
    fields = [(name, turn) for name in ("prompt", "chosen", "rejected")]
    fields += [(name, pa.float64()) for name in numbers] + [(name, pa.string()) for name in ids]
    return pa.Table.from_pylist(rows, schema=pa.schema([*fields, ("round", pa.int32())]))
