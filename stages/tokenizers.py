"""Tokenizers: loading one, and a prompt's or chat's way to token ids; what could not work is refused early."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "prefloop"  # stands for an answer when a template is tried


def load_tokenizer(folder: Path, *, pad_token: str | None, key: str, answers: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a pad token, and an EOS where the model answers.

    Args:
        folder: a Hugging Face model folder.
        pad_token: the token to pad with, where the tokenizer names none.
        key: the config key of the model, for the error's fix.
        answers: whether the model answers; a reward model, such as BERT, needs no EOS.

    Raises:
        InputError: if it cannot be read, has no EOS but needs one, or has no pad token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly anything for a broken folder
        raise InputError(
            f"{key} {folder}",
            wanted="a folder with a tokenizer that transformers can load",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            fix="save the tokenizer beside the model: tokenizer.save_pretrained(folder)",
        ) from error
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):  # what transformers makes of no file
        raise InputError(
            f"{key} {folder}",
            wanted="a folder with a tokenizer that transformers can load",
            got="no tokenizer.json, tokenizer.model or vocab file in it",
            fix="save the tokenizer beside the model: tokenizer.save_pretrained(folder)",
        )
    if answers and tokenizer.eos_token_id is None:
        raise InputError(
            f"{key} {folder}",
            wanted="a tokenizer with an EOS token, by which an answer stops",
            got="eos_token is not set",
            fix='set "eos_token" in tokenizer_config.json to the token that ended the answers in training',
        )
    if pad_token is not None:
        if pad_token not in tokenizer.get_vocab():
            raise InputError(
                f"{key} {folder}",
                wanted="pad_token: a token of the tokenizer",
                got=repr(pad_token),
                fix=f"for example pad_token: {_example(tokenizer)!r}",
            )
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        base = key.removesuffix(".path")
        raise InputError(
            f"{key} {folder}",
            wanted="a tokenizer with a pad token",
            got="pad_token is not set",
            fix=f"--set {base}.pad_token='{_example(tokenizer)}' (padding is masked; this one will do)",
        )
    return tokenizer


def refuse_foreign_tokenizer(tokenizer: PreTrainedTokenizerBase, num_embeddings: int, *, where: str) -> None:
    """Refuse a tokenizer that is another model's, by its ids: the model has no row for some of them.

    Tokens that were added later may lie beyond the rows, as in some published models; they are refused where a text
    has one.

    Raises:
        InputError: with both numbers.
    """
    used = {"EOS": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id, "BOS": tokenizer.bos_token_id}
    beyond = [f"its {name} token has id {number}" for name, number in used.items() if (number or 0) >= num_embeddings]
    if tokenizer.vocab_size > num_embeddings or beyond:
        raise InputError(
            where,
            wanted=f"the tokenizer of this model, which has {num_embeddings:,} tokens",
            got=beyond[0] if beyond else f"a tokenizer of {tokenizer.vocab_size:,} tokens",
            fix="put the model's own tokenizer into its folder; after add_tokens, model.resize_token_embeddings",
        )


def refuse_other_tokenizer(folder: Path, policy: Path, *, pad_token: str | None, key: str) -> None:
    """Refuse a model that gives ids other meanings than the policy does: its log-probs would be those of other texts.

    Raises:
        InputError: naming the first token on which they differ.
    """
    mine, ours = (load_tokenizer(f, pad_token=pad_token, key=key, answers=False).get_vocab() for f in (folder, policy))
    if mine == ours:
        return
    token = min(mine.keys() ^ ours.keys() or {t for t in mine if mine[t] != ours[t]})
    raise InputError(
        f"{key} {folder}",
        wanted="the policy's tokenizer, since references score the policy's very tokens",
        got=f"another: token {token!r} has id {mine.get(token, 'none')}, and {ours.get(token, 'none')} in the policy's",
        fix="name a reference of the policy's own family",
    )


def refuse_unknown_ids(ids: Sequence[int], num_embeddings: int, *, where: str) -> None:
    """Refuse token ids that the model has no row for.

    Raises:
        InputError: naming the first.
    """
    beyond = next((number for number in ids if number >= num_embeddings), None)
    if beyond is not None:
        raise InputError(
            where,
            wanted=f"token ids below {num_embeddings}, as many as the model has embeddings",
            got=f"{beyond}: the tokenizer knows more tokens than the model",
            fix="model.resize_token_embeddings(len(tokenizer)) and save again, or the model's own tokenizer",
        )


def _example(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.eos_token or tokenizer.sep_token or tokenizer.convert_ids_to_tokens(0))


def end_token_ids(folder: Path) -> list[int]:
    """The tokens that end an answer by a model folder's ``generation_config.json``; none where it has no such file."""
    file = folder / "generation_config.json"
    found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return [found] if isinstance(found, int) else list(found or [])


# ---- prompts --------------------------------------------------------------------------------------------------------


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    *,
    generation_prompt: bool,
    where: str,
) -> str:
    """A chat as the tokenizer's template writes it, special tokens included.

    Args:
        options: further variables of the template, such as ``enable_thinking``.
        generation_prompt: whether to end with what stands before an answer.
        where: names the chat in an error.

    Raises:
        InputError: without a template, for an option that it does not know, or where it refuses the chat.
    """
    template = _template(tokenizer, where)
    unknown = [name for name in options if not re.search(rf"\b{re.escape(name)}\b", template)]
    if unknown:
        raise InputError(
            where,
            wanted="chat_template_kwargs that the chat template uses",
            got=f"{unknown[0]!r}, which does not occur in it",
            fix="check its spelling in the tokenizer's chat_template",
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **options
            )
        )
    except Exception as error:  # a template may raise in words of its own, and does so as any kind of error
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            where,
            wanted="a chat that the tokenizer's template accepts",
            got=f"messages by {roles}; the template says: {(str(error).splitlines() or ['nothing'])[0]}",
            fix="mend the row; a template without a place for system messages needs prompts.system: null too",
        ) from error


def _template(tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise InputError(
            where,
            wanted="plain text, since the tokenizer has no chat template",
            got="a chat",
            fix="use a model with a chat template, or a column of text",
        ) from None


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, rendered: bool, where: str) -> list[int]:
    """A prompt's token ids with one BOS, if the model has one: the tokenizer's, unless the text brings its own.

    Args:
        rendered: whether a chat template wrote the text: then its special tokens are all there.

    Raises:
        InputError: if no token is left.
    """
    has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids: list[int] = tokenizer(text, add_special_tokens=not rendered and not has_bos).input_ids
    if not ids:
        raise InputError(
            where,
            wanted="a prompt that the policy's tokenizer can write",
            got=f"no token for {text[:80]!r}",
            fix="mend the row or remove it",
        )
    return ids


def keeps_text(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> bool:
    """Whether a text can be read from its token ids again; spaces and Unicode's forms of one letter aside.

    Not so where letters became an unknown token, were left out, or lost their case.
    """
    decoded = tokenizer.decode(list(ids), skip_special_tokens=False)
    bos = tokenizer.bos_token
    if bos is not None and not text.startswith(bos):
        decoded = decoded.removeprefix(bos)
    return _squeezed(decoded) == _squeezed(text)


def _squeezed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def refuse_closing_tokens(tokenizer: PreTrainedTokenizerBase, text: str, *, where: str) -> None:
    """Refuse a tokenizer that puts a token, such as an EOS, behind a text: an answer would start after the end.

    Raises:
        InputError: naming the token.
    """
    whole, bare = tokenizer(text).input_ids, tokenizer(text, add_special_tokens=False).input_ids
    if bare and whole[-1] != bare[-1]:
        raise InputError(
            where,
            wanted="a tokenizer that leaves a prompt open for an answer",
            got=f"{tokenizer.convert_ids_to_tokens(whole[-1])!r} behind the text",
            fix='set "add_eos_token": false in tokenizer_config.json, or mend the post_processor in tokenizer.json',
        )


def refuse_missing_generation_prompt(
    tokenizer: PreTrainedTokenizerBase, chat: Sequence[Mapping[str, str]], options: Mapping[str, Any], *, where: str
) -> None:
    """Refuse a template that writes a header before an answer, but not when it is asked to.

    The policy would be asked to write that header itself.

    Raises:
        InputError: with what the template leaves out.
    """

    def render(*messages: Mapping[str, str], generation_prompt: bool) -> str:
        return render_chat(tokenizer, messages, options, generation_prompt=generation_prompt, where=where)

    prompt = render(*chat, generation_prompt=True)
    if prompt != render(*chat, generation_prompt=False):
        return
    try:
        whole = render(*chat, {"role": "assistant", "content": _PROBE}, generation_prompt=False)
    except InputError:  # a template need not accept an answer
        return
    header, found, _ = whole.removeprefix(prompt).partition(_PROBE)
    if whole.startswith(prompt) and found and header.strip():
        raise InputError(
            where,
            wanted="a chat template with a generation prompt",
            got=f"one that writes {header!r} before an answer only once the answer is there",
            fix="add {% if add_generation_prompt %}…{% endif %} at the end of the tokenizer's chat_template",
        )
