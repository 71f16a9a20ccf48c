"""A run's pairs in other trainers' files, with the reference's log-probs; `pipeline.export_formats` has the rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import models
from pipeline.artifacts import MANIFEST, StageFolder
from pipeline.console import Console
from pipeline.export_formats import FORMATS, ExportedPair, Format, Row
from pipeline.files import read_json, replacing
from pipeline.reading import rounds_in, run_settings
from stages.contracts import MESSAGE, PAIRS, PROMPTS, REFERENCE_LOGPS
from stages.errors import InputError

_ROWS = 256  # of pairs, with their token ids, held at a time
_ROWS_A_GROUP = 4096  # of an exported table


def export_pairs(run: Path, *, kind: str, rounds: Sequence[int], out: Path | None) -> None:
    """Write the pairs of a run's rounds as one file of another trainer's, and say where.

    TRL's rows also hold ``ref_chosen_logps`` and ``ref_rejected_logps``: summed, in nats, of the first reference. Other
    trainers close every answer: TRL appends the EOS to a text. An answer that was cut at max_new_tokens, or that a text
    of sample.stop ended, has none, and its log-prob is not that of the closed answer. Both ``ref_…`` columns are null
    for a pair with such an answer: leave these rows out, or let the trainer compute the columns. So are they for a
    round whose objective takes no reference.

    Raises:
        InputError: if there is no such run, a round without finished pairs, or an ending that is not known.
    """
    form = FORMATS[kind]
    target = out or run / "export" / f"{kind}{form.endings[0]}"
    if target.suffix not in form.endings:
        raise InputError(
            str(target),
            wanted=f"a file ending in {' or '.join(form.endings)}",
            got=target.name,
            fix=f"--out pairs{form.endings[0]}",
        )
    console = Console()
    folders, ends = _round_folders(run, rounds, console), _find_ends(run)
    kinds = {folder: _are_chats(folder) for folder in folders if any(entry.rows for entry in _pairs(folder).entries())}
    if len(set(kinds.values())) > 1:
        raise InputError(
            str(run),
            wanted="pairs of chats, or pairs of plain text",
            got="rounds of both",
            fix="export them apart: --round K --out FILE",
        )
    chats, counted = any(kinds.values()), _Counts()
    pairs = (pair for folder in kinds for pair in _round_pairs(folder, ends, chats=chats))
    _write(target, counted.rows(pairs, form), chats)
    if form.beside is not None:
        form.beside(target, chats)
    console.text(f"{counted.num_rows:,} pairs of {len(folders)} rounds   {target}\nuse   {form.use(target, chats)}")
    if num_left := counted.num_pairs - counted.num_rows:
        console.text(f"{num_left:,} pairs are left out: {kind} holds only chats in which user and assistant take turns")
    if kind == "trl" and counted.num_open:
        why = (
            "their objective takes no reference, or one of their answers does not end in an EOS, which other trainers "
            "append"
            if ends is not None
            else "no tokenizer of the policy is here, to see which answers end in an EOS"
        )
        console.text(f"{counted.num_open:,} of them without reference log-probs: {why}")


@dataclass(slots=True)
class _Counts:
    """What passed: pairs, those of them without reference log-probs, and rows that the format could hold."""

    num_pairs: int = 0
    num_open: int = 0
    num_rows: int = 0

    def rows(self, pairs: Iterable[ExportedPair], form: Format) -> Iterator[Row]:
        for pair in pairs:
            self.num_pairs += 1
            self.num_open += pair.chosen_logp is None
            if (row := form.row(pair)) is not None:
                self.num_rows += 1
                yield row


def _write(target: Path, rows: Iterator[Row], chats: bool) -> None:
    with replacing(target) as scratch:
        if target.suffix == ".parquet":
            schema = _trl_schema(chats)
            with pq.ParquetWriter(scratch, schema, compression="zstd") as table:
                while some := list(islice(rows, _ROWS_A_GROUP)):
                    table.write_table(pa.Table.from_pylist(some, schema=schema))
            return
        with scratch.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _trl_schema(chats: bool) -> pa.Schema:
    turn = pa.list_(MESSAGE) if chats else pa.string()
    numbers = ("ref_chosen_logps", "ref_rejected_logps", "score_chosen", "score_rejected", "margin")
    ids = ("pair_id", "prompt_id", "chosen_id", "rejected_id")
    fields = [(name, turn) for name in ("prompt", "chosen", "rejected")]
    fields += [(name, pa.float64()) for name in numbers] + [(name, pa.string()) for name in ids]
    return pa.schema([*fields, ("round", pa.int32())])


def _round_folders(run: Path, rounds: Sequence[int], console: Console) -> list[Path]:
    """The folders of the rounds named, else of all but the last ones that are not finished."""
    everything = rounds_in(run)
    found = {number: folder for number, folder in everything.items() if (folder / "pairs").is_dir()}
    made_groups = {number: folder for number, folder in everything.items() if (folder / "groups").is_dir()}
    missing = next((number for number in rounds if number not in found), None)
    if not found or missing is not None:
        _refuse_groups([made_groups[number] for number in rounds or made_groups if number in made_groups])
        raise InputError(
            str(run),
            wanted="a run with pairs" if not found else f"pairs of round {missing}",
            got="no round with pairs in it" if not found else f"pairs of the rounds {', '.join(map(str, found))}",
            fix="runs lie in runs/NAME by default",
        )
    for number in () if rounds else made_groups:
        console.text(f"round {number} is left out: it made groups, not pairs")
    wanted = list(rounds or sorted(found))
    unfinished = {number: why for number in wanted if (why := _unfinished(found[number])) is not None}
    while not rounds and len(wanted) > 1 and wanted[-1] in unfinished:
        number = wanted.pop()
        console.text(f"round {number} is left out: {unfinished[number]}")
    for number in wanted:
        if number in unfinished:
            raise InputError(
                str(found[number]),
                wanted="finished pairs, and finished reference_logps beside the pairs",
                got=unfinished[number],
                fix="let the round finish, or name finished ones with --round",
            )
    return [found[number] for number in wanted]


def _refuse_groups(folders: Sequence[Path]) -> None:
    """Refuse the first of some rounds that were trained on groups, if there is one.

    Raises:
        InputError: then.
    """
    for folder in folders:
        raise InputError(
            str(folder),
            wanted="pairs, which is what other trainers' files hold",
            got="groups: with pair.strategy groups, a row has all answers to a prompt",
            fix=f'load_dataset("parquet", data_files="{folder}/groups/part-*.parquet") reads them as they are; for '
            "pairs, fork the run with another pair.strategy and an objective on pairs",
        )


def _unfinished(folder: Path) -> str | None:
    """In words, what of a round is not finished; None where it can be exported."""
    pairs, logps = _pairs(folder), _reference(folder)
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


def _pairs(folder: Path) -> StageFolder:
    return StageFolder(folder / "pairs", PAIRS)


def _round_pairs(folder: Path, ends: Ends | None, *, chats: bool) -> Iterator[ExportedPair]:
    """A round's pairs in order; memory holds some rows, a part's log-probs and a part's chats."""
    pairs, prompts, logps = _pairs(folder), StageFolder(folder / "prompts", PROMPTS), _reference(folder)
    closing = frozenset() if ends is None else ends.of_chats if chats else frozenset([ends.eos_id])
    for entry in pairs.entries():
        known = {} if _takes_no_reference(folder) else _column(logps, entry.shard, "response_id", "logp")
        asked = _column(prompts, entry.shard, "prompt_id", "conversation") if chats else {}
        for row in (row for table in pairs.slices(entry.shard, _ROWS) for row in table.to_pylist()):
            fit = all(row[f"{role}_token_ids"][-1] in closing for role in ("chosen", "rejected"))
            yield ExportedPair(
                row,
                asked.get(row["prompt_id"]),
                known.get(row["chosen_id"]) if fit else None,
                known.get(row["rejected_id"]) if fit else None,
                *(ends.around(row) if ends is not None else ()),
            )


def _column(stage: StageFolder, shard: int, key: str, name: str) -> dict[str, Any]:
    """A column of a part by the rows' ids."""
    table = stage.read(shard)
    return dict(zip(table[key].to_pylist(), table[name].to_pylist(), strict=True))


@dataclass(frozen=True, slots=True)
class Ends:
    """The special tokens by which a policy's tokenizer opens prompts and closes answers.

    Attributes:
        eos, eos_id: which trainers append to a text.
        of_chats: every EOS of the policy: the chat template writes one of them.
        bos, bos_id: none where the tokenizer has none.
    """

    eos: str
    eos_id: int
    of_chats: frozenset[int]
    bos: str
    bos_id: int | None

    def around(self, pair: Row) -> tuple[str, str, str]:
        """What stands before the prompt, after the chosen and after the rejected answer, by a pair's tokens."""
        opened = self.bos_id is not None and pair["prompt_token_ids"][:1] == [self.bos_id]
        closed = [pair[f"{role}_token_ids"][-1] == self.eos_id for role in ("chosen", "rejected")]
        written = pair["prompt"].startswith(self.bos)
        return (self.bos if opened and not written else "", *(self.eos if end else "" for end in closed))  # type: ignore[return-value]


def _find_ends(run: Path) -> Ends | None:
    """The special tokens of a run's policies, which share one tokenizer; None where none of them is here."""
    policy = run_settings(run).get("policy", {})
    folders = [path / "policy" for path in reversed(rounds_in(run).values())]
    first = models.find_here(policy["path"], key="policy.path") if "path" in policy else None
    folder = next((f for f in (*folders, first) if f is not None and any(f.glob("tokenizer*"))), None)
    if folder is None:
        return None
    from stages.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(folder, pad_token=policy.get("pad_token"), key="policy.path")
    generation = folder / "generation_config.json"
    more = read_json(generation).get("eos_token_id") if generation.exists() else None
    eos_id = tokenizer.eos_token_id
    of_chats = frozenset([eos_id, *(more if isinstance(more, list) else [more])]) - {None}
    return Ends(tokenizer.eos_token, eos_id, of_chats, tokenizer.bos_token or "", tokenizer.bos_token_id)


def _are_chats(folder: Path) -> bool:
    """Whether all of a round's prompts are chats."""
    if not (folder / "prompts").is_dir():
        return False
    lengths = [
        pc.list_value_length(table["conversation"]) for table in StageFolder(folder / "prompts", PROMPTS).read_all()
    ]
    return any(map(len, lengths)) and all(pc.min(found.fill_null(0)).as_py() for found in lengths if len(found))
