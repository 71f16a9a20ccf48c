"""The files of other trainers, each as that project documents it: one pair in, one row of its file out.

Answers carry no special token but where a format says so: the trainers' own templates write them. A chat stays a list
of messages; what a format cannot hold is None, and the exporter counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.files import read_json, write_json

Row = dict[str, Any]
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ExportedPair:
    """A pair, and what formats need beside it.

    Attributes:
        row: of `PAIRS`.
        chat: the prompt's messages; None where it is plain text.
        chosen_logp, rejected_logp: of the first reference, summed, in nats; None where another trainer would close
            the answer with other tokens.
        opening: the BOS, where the prompt's tokens begin with one that its text does not have.
        chosen_end, rejected_end: the EOS, where the answer's tokens end in it.
    """

    row: Mapping[str, Any]
    chat: list[Message] | None
    chosen_logp: float | None = None
    rejected_logp: float | None = None
    opening: str = ""
    chosen_end: str = ""
    rejected_end: str = ""

    @property
    def messages(self) -> list[Message]:
        """The prompt as messages: a plain text is one user's."""
        return self.chat or [{"role": "user", "content": self.row["prompt"]}]


@dataclass(frozen=True, slots=True)
class Format:
    """One project's file.

    Attributes:
        row: a pair as a row; None where the format cannot hold it.
        use: how the file is named to the trainer, for chats and for plain text.
        endings: of the file, the usual one first.
        beside: writes what the project wants beside the file.
    """

    row: Callable[[ExportedPair], Row | None]
    use: Callable[[Path, bool], str]
    endings: tuple[str, ...] = (".jsonl",)
    beside: Callable[[Path, bool], None] | None = None


# ---- TRL ------------------------------------------------------------------------------------------------------------


def trl_row(pair: ExportedPair) -> Row:
    """TRL's preference row with an explicit prompt (huggingface.co/docs/trl/dataset_formats, "Preference").

    Scores, ids and the round stand beside TRL's columns, and the reference log-probs under the names by which
    ``DPOTrainer`` takes them for precomputed.
    """
    answers: Row = {role: pair.row[role] for role in ("chosen", "rejected")}
    if pair.chat:
        answers = {role: [_assistant(text)] for role, text in answers.items()}
    return {
        "prompt": list(pair.chat) if pair.chat else pair.row["prompt"],
        **answers,
        "ref_chosen_logps": pair.chosen_logp,
        "ref_rejected_logps": pair.rejected_logp,
        **{name: pair.row[name] for name in ("score_chosen", "score_rejected", "margin")},
        **{name: pair.row[name] for name in ("pair_id", "prompt_id", "chosen_id", "rejected_id", "round")},
    }


# ---- LLaMA-Factory --------------------------------------------------------------------------------------------------

_FROM = {"user": "human", "assistant": "gpt"}


def llama_factory_row(pair: ExportedPair) -> Row | None:
    """A preference row in the sharegpt format, plain text in the alpaca format (hiyouga/LLaMA-Factory, data/README.md).

    The sharegpt format has the system message in a column of its own, and people and model in turns; other chats
    would be skipped by its loader.
    """
    if pair.chat is None:
        answers = {role: pair.row[role] for role in ("chosen", "rejected")}
        return {"instruction": pair.row["prompt"], "input": "", **answers}
    system, turns = _system_apart(pair.chat)
    if not _in_turns(turns):
        return None
    return {
        "conversations": [{"from": _FROM[turn["role"]], "value": turn["content"]} for turn in turns],
        "chosen": {"from": "gpt", "value": pair.row["chosen"]},
        "rejected": {"from": "gpt", "value": pair.row["rejected"]},
        "system": system,
    }


def write_dataset_info(file: Path, chats: bool) -> None:
    """The file's description in ``dataset_info.json`` beside it, without which LLaMA-Factory does not find it."""
    columns = {"prompt": "instruction", "query": "input"}
    if chats:
        columns = {"messages": "conversations", "system": "system"}
    described: Row = {"file_name": file.name, "ranking": True}
    if chats:
        described["formatting"] = "sharegpt"
    info = file.with_name("dataset_info.json")
    known = read_json(info) if info.exists() else {}
    write_json(
        info, known | {file.stem: described | {"columns": columns | {"chosen": "chosen", "rejected": "rejected"}}}
    )


def _system_apart(chat: list[Message]) -> tuple[str, list[Message]]:
    if chat[0]["role"] == "system":
        return chat[0]["content"], chat[1:]
    return "", chat


def _in_turns(turns: list[Message]) -> bool:
    return len(turns) % 2 == 1 and all(
        turn["role"] == ("assistant" if place % 2 else "user") for place, turn in enumerate(turns)
    )


# ---- the others -----------------------------------------------------------------------------------------------------


def ms_swift_row(pair: ExportedPair) -> Row:
    """ms-swift's standard row for DPO (modelscope/ms-swift, docs/source_en/Customization/Custom-dataset.md, "RLHF").

    The chosen answer is the last message, the rejected one a text.
    """
    return {"messages": [*pair.messages, _assistant(pair.row["chosen"])], "rejected_response": pair.row["rejected"]}


def nemo_row(pair: ExportedPair) -> Row:
    """NeMo RL's row of ranked completions, rank 0 preferred (NVIDIA-NeMo/RL, docs/guides/dpo.md, "Datasets")."""
    ranked = enumerate((pair.row["chosen"], pair.row["rejected"]))
    return {
        "context": pair.messages,
        "completions": [{"rank": rank, "completion": [_assistant(text)]} for rank, text in ranked],
    }


def openrlhf_row(pair: ExportedPair) -> Row:
    """OpenRLHF's row with an explicit prompt (OpenRLHF/OpenRLHF, README.md, "Prepare Datasets").

    Its tokenizer call adds no special token (openrlhf/datasets/reward_dataset.py), and closes an answer that does not
    end in the EOS by a space and one: plain text has BOS and EOS written out where the run's tokens had them.
    """
    if pair.chat:
        return {"prompt": pair.messages} | {role: [_assistant(pair.row[role])] for role in ("chosen", "rejected")}
    return {
        "prompt": pair.opening + pair.row["prompt"],
        "chosen": pair.row["chosen"] + pair.chosen_end,
        "rejected": pair.row["rejected"] + pair.rejected_end,
    }


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


FORMATS: Mapping[str, Format] = {
    "trl": Format(
        trl_row,
        lambda file, _: f'load_dataset("{file.suffix[1:].replace("jsonl", "json")}", data_files="{file.name}")',
        endings=(".parquet", ".jsonl"),
    ),
    "llama-factory": Format(
        llama_factory_row,
        lambda file, chats: f"dataset_dir: its folder, dataset: {file.stem}" + ("" if chats else ", template: empty"),
        beside=write_dataset_info,
    ),
    "ms-swift": Format(
        ms_swift_row,
        lambda file, chats: f"--rlhf_type dpo --dataset {file.name}" + ("" if chats else " --use_chat_template false"),
    ),
    "nemo": Format(
        nemo_row,
        lambda file, chats: (
            f"data.train: {{dataset_name: PreferenceDataset, data_path: {file.name}}}"
            + ("" if chats else ", policy.tokenizer.chat_template: null")
        ),
    ),
    "openrlhf": Format(
        openrlhf_row,
        lambda file, chats: (
            f"--dataset {file.name} --prompt_key prompt --chosen_key chosen --rejected_key rejected"
            + (" --apply_chat_template" if chats else "")
        ),
    ),
}
"""What ``prefloop export --to`` knows."""
