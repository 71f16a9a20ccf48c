"""Tiny random models of many architectures, each with a real tokenizer trained on the spot.

`policy(name, folder)` writes a causal language model, `judge(name, folder)` a sequence classifier with one score. Heads
have 32 dimensions, which vLLM's attention on the CPU accepts. Every parameter is random, norms and biases too, so that
none can be left out unnoticed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

SENTENCES = (
    "The old mill stands by the river, and every morning the miller opens the gate.",
    "Children come to see the water fall; the ducks swim below and the wheel turns.",
    "In winter the river freezes and the wheel stands still.",
    "Then the miller mends his sacks and tells stories by the fire.",
    "What is the sum of two and three? Name a colour of the sky.",
    "Write a short line about bread. How many legs has a spider, and why does rain fall?",
    "Please answer in one sentence: yes, no, perhaps.",
    "All answers are welcome here, even 12, 345 or 6789!",
)

PROMPTS = ("The old mill", "Name a colour", "Why does rain fall?", "Tell stories 12", "Bread is", "A spider has")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

TURNS = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


# ---- tokenizers -----------------------------------------------------------------------------------------------------


def sentencepiece_model(*, symbols: Iterable[str] = (), pad: bool = False, dummy_prefix: bool = True) -> bytes:
    """A trained ``tokenizer.model``: BPE over pieces, bytes for what it has no piece for."""
    import sentencepiece

    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3} if pad else {"unk_id": 0, "bos_id": 1, "eos_id": 2}
    names = {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"} if pad else {"pad_id": -1}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=out,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols),
        minloglevel=2,
        **ids,
        **names,
    )
    return out.getvalue()


def write_sentencepiece(folder: Path, kind: str, *, template: str | None = None, **options: Any) -> None:
    """Only ``tokenizer.model`` and its config, as models were published for years; transformers converts it."""
    gemma = kind == "GemmaTokenizer"
    symbols = ("<start_of_turn>", "<end_of_turn>") if gemma else ()
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(symbols=symbols, pad=gemma, dummy_prefix=not gemma))
    bos, eos = ("<bos>", "<eos>") if gemma else ("<s>", "</s>")
    config = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos, "unk_token": "<unk>"} | options
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "legacy": False}))


def write_byte_bpe(folder: Path, specials: list[str], *, template: str | None = None, **names: Any) -> None:
    """Byte-level BPE, as GPT-2 has it; `bos_first` puts the BOS before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bos_first = names.pop("bos_first", False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if bos_first:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def write_word_pieces(folder: Path, *, cls: str, sep: str) -> None:
    """WordPiece between a first and a last token, as encoders have it: no EOS, and other types for a second text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pad = "<pad>" if cls == "<s>" else "[PAD]"
    specials = [cls, pad, sep, "[UNK]"]  # RoBERTa's padding is token 1
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    names = {"cls_token": cls, "sep_token": sep, "pad_token": pad, "unk_token": "[UNK]"}
    types = ["input_ids", "attention_mask"] if cls == "<s>" else ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=types, **names).save_pretrained(folder)


# ---- models ---------------------------------------------------------------------------------------------------------

_LLAMA_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
}
_GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 160, "initializer_range": 0.2}
_BLOOM_SIZES = {"hidden_size": 64, "n_layer": 2, "n_head": 2, "initializer_range": 0.2, "hidden_dropout": 0.1}
_ENCODER_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_NEOX_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.2,
}
_OPT_SIZES = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 160,
    "init_std": 0.2,
    "layerdrop": 0.1,
}


@dataclass(frozen=True, slots=True)
class Kind:
    """One architecture as it is found in the wild.

    Attributes:
        write_tokenizer: writes it into a folder.
        model_type: of transformers' config.
        sizes: the config's fields.
        tied: whether input and output embeddings are one.
        spare: rows of the embedding beyond the tokenizer's tokens.
        chat: whether there is a chat template.
        stops: further tokens that end an answer by ``generation_config.json``, besides the tokenizer's EOS.
        pad_token: what the config of a run must say.
    """

    write_tokenizer: Callable[[Path], None]
    model_type: str
    sizes: dict[str, Any]
    tied: bool
    spare: int = 0
    chat: bool = False
    stops: tuple[str, ...] = field(default=())
    pad_token: str | None = None


KINDS = {
    "llama": Kind(
        lambda folder: write_sentencepiece(folder, "LlamaTokenizer"),
        "llama",
        _LLAMA_SIZES,
        tied=False,
        pad_token="</s>",
    ),
    "qwen3": Kind(
        lambda folder: write_byte_bpe(
            folder,
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            template=CHATML,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        ),
        "qwen3",
        _LLAMA_SIZES,
        tied=True,
        spare=24,
        chat=True,
        stops=("<|endoftext|>",),
    ),
    "mistral": Kind(
        lambda folder: write_sentencepiece(folder, "LlamaTokenizer", template=INST, pad_token="<unk>"),
        "mistral",
        _LLAMA_SIZES | {"sliding_window": None},
        tied=False,
        chat=True,
    ),
    "gemma2": Kind(
        lambda folder: write_sentencepiece(folder, "GemmaTokenizer", template=TURNS, pad_token="<pad>"),
        "gemma2",
        _LLAMA_SIZES | {"sliding_window": 32, "query_pre_attn_scalar": 32},
        tied=True,
        chat=True,
        stops=("<end_of_turn>",),
    ),
    "gpt2": Kind(
        lambda folder: write_byte_bpe(
            folder, ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
        ),
        "gpt2",
        _GPT2_SIZES,
        tied=True,
        pad_token="<|endoftext|>",
    ),
    "opt": Kind(
        lambda folder: write_byte_bpe(
            folder,
            ["<s>", "<pad>", "</s>", "<unk>"],
            bos_token="</s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="</s>",
            bos_first=True,
        ),
        "opt",
        _OPT_SIZES,
        tied=True,
    ),
    "bloom": Kind(
        lambda folder: write_byte_bpe(
            folder,
            ["<unk>", "<s>", "</s>", "<pad>"],
            bos_token="<s>",
            eos_token="</s>",
            pad_token="<pad>",
            unk_token="<unk>",
        ),
        "bloom",
        _BLOOM_SIZES,
        tied=True,
    ),
    "mixtral": Kind(
        lambda folder: write_sentencepiece(folder, "LlamaTokenizer", template=INST, pad_token="<unk>"),
        "mixtral",
        _LLAMA_SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
        tied=False,
        chat=True,
    ),
    "gpt_neox": Kind(
        lambda folder: write_byte_bpe(
            folder, ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
        ),
        "gpt_neox",
        _NEOX_SIZES,
        tied=False,
        pad_token="<|endoftext|>",
    ),
}


ENCODERS = {
    "bert": Kind(
        lambda folder: write_word_pieces(folder, cls="[CLS]", sep="[SEP]"),
        "bert",
        _ENCODER_SIZES | {"type_vocab_size": 2},
        tied=True,
    ),
    "roberta": Kind(
        lambda folder: write_word_pieces(folder, cls="<s>", sep="</s>"),
        "roberta",
        _ENCODER_SIZES | {"type_vocab_size": 1, "max_position_embeddings": 64 + 2},
        tied=True,
    ),
    "deberta": Kind(
        lambda folder: write_word_pieces(folder, cls="[CLS]", sep="[SEP]"),
        "deberta-v2",
        _ENCODER_SIZES | {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
        tied=True,
    ),
}
"""For sequence classifiers only."""


def policy(name: str, folder: Path, *, tied: bool | None = None) -> Path:
    """Write a causal language model of one of `KINDS` with its tokenizer; tied as in the wild, or as asked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = KINDS[name] if tied is None else replace(KINDS[name], tied=tied)
    folder.mkdir(parents=True, exist_ok=True)
    kind.write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(_config(kind, tokenizer))
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(kind.stops))]
    _randomise(model)
    model.get_output_embeddings().weight.data[stops] *= 2  # so that some answers stop by themselves
    model.generation_config.update(eos_token_id=stops if kind.stops else stops[0], bos_token_id=tokenizer.bos_token_id)
    if kind.stops:  # what models bring along for chatting must not change how candidates are sampled
        model.generation_config.update(do_sample=True, temperature=0.1, top_p=0.5, top_k=3, repetition_penalty=1.5)
    model.save_pretrained(folder)
    return folder


def judge(name: str, folder: Path) -> Path:
    """Write a sequence classifier with one score, of one of `KINDS` or `ENCODERS`, with its tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind = (KINDS | ENCODERS)[name]
    folder.mkdir(parents=True, exist_ok=True)
    kind.write_tokenizer(folder)
    config = _config(kind, AutoTokenizer.from_pretrained(folder))
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    _randomise(model)
    model.save_pretrained(folder)
    return folder


def _config(kind: Kind, tokenizer: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind.model_type,
        vocab_size=len(tokenizer) + kind.spare,
        tie_word_embeddings=kind.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **kind.sizes,
    )


def _randomise(model: Any) -> None:
    import torch

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
