"""One prompt followed by its id: its row in every table of every round, from its text to the weights made of it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipeline.artifacts import MANIFEST
from pipeline.console import Console
from pipeline.find import find_prompt
from pipeline.lineage import shown_records
from pipeline.model_folders import model_manifest
from pipeline.reading import prompt_pools, published_files, round_folders, rounds_in, rows
from pipeline.texts import cut, visible
from stages.errors import InputError
from stages.vocab import FATE_MEANINGS

_CUT_CHARS = 600  # of a text, unless it is asked for in full
_SHA_CHARS = 12
_INDENT = "      "


def show_trace(folder: Path, row_id: str, *, full: bool) -> None:
    """Print one prompt's way through a run.

    Raises:
        InputError: if the folder holds no run, or no one prompt goes by that id.
    """
    console = Console()
    for line in trace(folder, row_id, full=full, width=console.width):
        console.text(line)


def trace(folder: Path, row_id: str, *, full: bool, width: int) -> Iterator[str]:
    """The lines of `show_trace`, their texts wrapped at `width` characters."""
    rounds = round_folders(folder)
    prompt_id, named = find_prompt(folder, rounds, row_id)
    teller = _Teller(folder, prompt_id, full, width)
    yield from teller.prompt(named)
    records = {record["round"]: record for record in shown_records(folder / "run.json")}
    told = False
    for round, path in rounds.items():
        lines = [*teller.evaluation(round, path), *teller.round(round, path, records.get(round))]
        told = told or bool(lines)
        yield from lines
    if not told:
        yield from ("", "No round has drawn this prompt yet.")


@dataclass(frozen=True, slots=True)
class _Teller:
    """Reads one prompt's rows and puts them in words."""

    folder: Path
    prompt_id: str
    full: bool
    width: int

    # ---- the prompt -------------------------------------------------------------------------------------------------

    def prompt(self, named: str) -> Iterator[str]:
        held_out = self._rows(self.folder / "evaluation" / "prompts")
        pools = (row for pool in prompt_pools(self.folder) for row in self._rows(pool))
        ready = (_as_prompt(row) for path in rounds_in(self.folder).values() for row in self._rows(path / "pairs"))
        row = next(chain(held_out, pools, ready), None)
        if row is None:
            raise InputError(
                str(self.folder / "prompts"), wanted=f"prompt {self.prompt_id}", got="no row", fix="restore the folder"
            )
        yield f"prompt {self.prompt_id}   {len(row['prompt_token_ids']):,} tokens" + (
            "   held out for evaluation" if held_out else ""
        )
        if not named.startswith("prompt"):
            yield f"  found by {named}"
        for message in row["conversation"] or []:
            yield f"  {visible(message['role'])}"
            yield from self._text(message["content"])
        if self.full or not row["conversation"]:
            yield "  text"
            yield from self._text(row["prompt"])
        if self.full:
            yield from self._token_ids(row["prompt_token_ids"])
        if row["answer"] is not None:
            yield "  ground truth"
            yield from self._text(row["answer"])
        if row["extra"] not in ("", "{}"):
            yield "  other columns"
            yield from self._text(row["extra"])

    # ---- an evaluation ----------------------------------------------------------------------------------------------

    def evaluation(self, round: int, path: Path) -> Iterator[str]:
        """The answer to a held-out prompt of the policy after a round, against the first policy's."""
        scored = self._rewards(path / "evaluation")
        first = self._rewards(self.folder / "round-0000" / "evaluation")
        for answer in self._rows(path / "evaluation" / "candidates"):
            yield ""
            when = f"after round {round}" if round else "before the first round"
            yield f"evaluation {when}   {_policy(answer['policy_version'], answer['policy_round'])}"
            mine, theirs = scored.get(answer["response_id"], {}).get("reward"), _only_reward(first)
            outcome = ""
            if round and mine is not None and theirs is not None:
                outcome = "wins" if mine > theirs else "loses" if mine < theirs else "ties"
                outcome = f"{outcome} against the first policy's {theirs:.6g}"
            yield from self._answer(answer, scored.get(answer["response_id"], {}), outcome)

    # ---- a round ----------------------------------------------------------------------------------------------------

    def round(self, round: int, path: Path, record: Mapping[str, Any] | None) -> Iterator[str]:
        """What became of the prompt in a round; nothing where it was not drawn."""
        if not self._rows(path / "prompts", "prompt_id") and not self._rows(path / "pairs", "prompt_id"):
            return
        answers = sorted(self._rows(path / "candidates"), key=lambda row: row["sample_index"])
        scored, pairs = self._rewards(path), self._rows(path / "pairs")
        groups, marks = self._rows(path / "groups"), _marks(pairs)
        yield ""
        by = f"   answered by {_policy(answers[0]['policy_version'], answers[0]['policy_round'])}" if answers else ""
        yield f"round {round}{by}"
        for answer in answers:
            key = answer["response_id"]
            yield from self._answer(answer, scored.get(key, {}), marks.get(key, ""))
        if (path / "fates").exists() or not (pairs or groups):
            yield from self._fate(path)
        numbers = {answer["response_id"]: answer["sample_index"] for answer in answers}
        for pair in pairs:
            yield from self._pair(pair, numbers, path)
        for group in groups:
            yield from self._group(group, numbers)
        yield from self._update(path, record, _part(pairs, groups, of_groups=(path / "groups").exists()))

    def _fate(self, path: Path) -> Iterator[str]:
        found = self._rows(path / "fates")
        for row in found:
            detail = f": {visible(row['detail'])}" if row["detail"] else ""
            meaning = FATE_MEANINGS.get(row["fate"], "")
            usable = f"{row['num_valid']} of {row['num_candidates']} candidates usable"
            yield f"  fate       {row['fate']}{detail}   ({meaning}; {usable})"
        if not found:
            yield "  fate       not known yet: the round has not come to pairing"

    def _pair(self, pair: Mapping[str, Any], numbers: Mapping[str, int], path: Path) -> Iterator[str]:
        chosen, rejected = (numbers.get(pair[key], "?") for key in ("chosen_id", "rejected_id"))
        if pair["margin"] is None:
            yield f"  pair       {pair['pair_id']}   came as it is, without rewards"
            for mark in ("chosen", "rejected"):
                yield f"  {mark}"
                yield from self._text(pair[mark])
        else:
            yield (
                f"  pair       {pair['pair_id']}   #{chosen} over #{rejected}   "
                f"{pair['score_chosen']:.6g} - {pair['score_rejected']:.6g} = margin {pair['margin']:.6g}"
            )
        answers = pc.field("response_id").isin([pair["chosen_id"], pair["rejected_id"]])
        for stage in sorted(path.glob("reference_logps*")):
            found = {row["response_id"]: row for row in rows(published_files(stage), where=answers)}
            told = [
                f"{name} {found[key]['logp']:.4f} nats over {found[key]['num_tokens']} tokens"
                for name, key in (("chosen", pair["chosen_id"]), ("rejected", pair["rejected_id"]))
                if key in found
            ]
            for row in list(found.values())[:1]:
                name = f"{row['reference']} {_sha(row['weights'])} in {row['dtype']}"
                yield f"  reference  {name}   {'   '.join(told)}"

    def _group(self, group: Mapping[str, Any], numbers: Mapping[str, int]) -> Iterator[str]:
        answers = zip(group["response_ids"], group["rewards"], strict=True)
        told = "   ".join(f"#{numbers.get(response_id, '?')} {reward:.6g}" for response_id, reward in answers)
        yield f"  group      {group['group_id']}   {len(group['response_ids'])} answers, best first   {told}"

    def _update(self, path: Path, record: Mapping[str, Any] | None, part: str) -> Iterator[str]:
        """What became of the weights; `part` says what they were trained on, and whether this prompt was part of it."""
        if not (path / "policy" / MANIFEST).exists():
            yield "  update     not yet"
            return
        made = model_manifest(path / "policy")
        update = made.get("update", {})
        start = f"{_sha(record['start']['sha256'])} -> " if record else ""
        yield (
            f"  update     {start}{_sha(made['sha256'])}   {update.get('num_steps')} steps on "
            f"{update.get('num_pairs', 0):,} {part}"
        )
        yield f"  decision   {record['decision']}: {record['reason']}" if record else "  decision   not yet"

    # ---- rows and texts ---------------------------------------------------------------------------------------------

    def _answer(self, answer: Mapping[str, Any], scored: Mapping[str, Any], remark: str) -> Iterator[str]:
        yield "   ".join(
            [
                f"  #{answer['sample_index']}  {answer['response_id']}",
                f"{len(answer['response_token_ids'])} tokens, {answer['finish_reason']}",
                f"logp {sum(answer['response_logps']):.4f}",
                *([remark] if remark else []),
            ]
        )
        parts = [
            f"{visible(part['name'])} {_figure(part['value'])} ({part['role']})" for part in scored.get("rewards") or []
        ]
        yield f"{_INDENT}reward {_figure(scored.get('reward'))}   {'   '.join(parts)}".rstrip()
        yield from self._text(answer["response"])
        if self.full:
            yield from self._token_ids(answer["response_token_ids"])

    def _text(self, text: str) -> Iterator[str]:
        shown = visible(text if self.full else cut(text, _CUT_CHARS))
        for line in shown.splitlines() or ["(empty)"]:
            wrapped = textwrap.wrap(
                line, max(20, self.width - len(_INDENT) - 2), replace_whitespace=False, drop_whitespace=False
            )
            yield from (f"{_INDENT}| {piece}" for piece in wrapped or [""])

    def _token_ids(self, token_ids: Sequence[int]) -> Iterator[str]:
        listed = textwrap.wrap(" ".join(map(str, token_ids)), max(20, self.width - len(_INDENT) - 4))
        yield from (f"{_INDENT}{'ids' if not number else '   '} {line}" for number, line in enumerate(listed))

    def _rows(self, stage: Path, *columns: str) -> list[dict[str, Any]]:
        return rows(published_files(stage), where=pc.field("prompt_id") == self.prompt_id, columns=columns)

    def _rewards(self, path: Path) -> dict[str, dict[str, Any]]:
        return {row["response_id"]: row for row in self._rows(path / "scored")}


def _part(pairs: Sequence[Any], groups: Sequence[Any], *, of_groups: bool) -> str:
    if of_groups:
        return "groups, this one among them" if groups else "groups, this prompt not among them"
    if len(pairs) > 1:
        return f"pairs, these {len(pairs)} among them"
    return "pairs, this pair among them" if pairs else "pairs, this prompt not among them"


def _marks(pairs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What each paired answer is; with several pairs an answer may be both."""
    sides = [(pair[f"{side}_id"], side.upper()) for side in ("chosen", "rejected") for pair in pairs]
    return {key: " and ".join(dict.fromkeys(mark for other, mark in sides if other == key)) for key, _ in sides}


def _policy(sha256: str, round: int) -> str:
    made = f"made by round {round}" if round else "the first policy"
    return f"policy {_sha(sha256)}, {made}"


def _sha(sha256: str) -> str:
    return sha256[:_SHA_CHARS]


def _figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.6g}"


def _only_reward(scored: Mapping[str, Mapping[str, Any]]) -> float | None:
    return next((row["reward"] for row in scored.values()), None)


def _as_prompt(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The prompt of a pair that came as it is."""
    known = {name: pair[name] for name in ("prompt_id", "prompt", "prompt_token_ids")}
    return known | {"conversation": None, "answer": None, "extra": ""}
