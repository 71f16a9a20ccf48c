"""Whether answers may share their prompt's forward under a model: what is known to forbid it, and a proof that it may.

Sharing is exact where a token depends on those before it through plain attention and given positions alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from stages.update import deepspeed_engine
from stages.update.attention import NotExact
from stages.update.rows import AnswerRow, longest_sequence
from stages.update.scoring import Scoring

_TIMES_NOISE = 10  # how much farther than two plain layouts of the same answers a shared one may be
_GAPS = {"float32": (1e-4, 1e-4), "bfloat16": (0.05, 0.5)}  # the least and the most that is let pass, nats an answer
_ATTENTION_LAYERS = {"full_attention", "attention", "sliding_attention", "chunked_attention"}
_HEAD_TERMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_PROBE = [
    ([3, 5, 4, 6, 3, 7], [[5, 3, 6, 4], [6, 7, 3], [3]]),
    ([4], [[7, 4, 4], [4, 5, 6, 3, 3]]),
]


class Sharing:
    """Whether prompts are shared under the model of an engine; the small batch is run once, when it is first asked."""

    def __init__(self, engine: Any, device: torch.device, *, dtype: str) -> None:
        self._engine, self._device, self._dtype = engine, device, dtype
        self._is_tried, self._disproof = False, ""

    def why_apart(self, answers: Sequence[AnswerRow]) -> str | None:
        """Why some answers cannot share prompts; None: they can. All ranks call it together, for equal answers."""
        model = deepspeed_engine.model_of(self._engine)
        reason = why_apart(model, longest_sequence(answers))
        if reason is not None:
            return f"{type(model).__name__}: {reason}"
        if not self._is_tried:
            self._disproof = _of_any_rank(disproof(self._engine, self._device, dtype=self._dtype) or "")
            self._is_tried = True
        return f"{type(model).__name__}: {self._disproof}" if self._disproof else None


def _of_any_rank(finding: str) -> str:
    """One rank's finding counts for all, each of which runs as many forwards as any other."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, finding)
    return next(filter(None, found), "")


def why_apart(model: Any, longest: int) -> str | None:
    """What forbids sharing under a model, as far as its class and config tell; None: nothing.

    Args:
        longest: tokens of the longest prompt with an answer.
    """
    return next(_reasons(model, longest), None)


def _reasons(model: Any, longest: int) -> Iterator[str]:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        yield "it has an encoder"
    if getattr(config, "alibi", False) or type(model).__name__.startswith("Bloom"):
        yield "its attention counts positions by itself (ALiBi)"
    if getattr(model, "_is_stateful", False):
        yield "it carries a state from token to token"
    kinds = set(getattr(config, "layer_types", None) or [])
    if others := kinds - _ATTENTION_LAYERS:
        yield f"it has layers that are not attention ({', '.join(sorted(others))})"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and (not kinds or "sliding_attention" in kinds):
        yield f"its attention sees {window} tokens back, and there are {longest}"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < longest:
        yield f"its attention sees chunks of {chunk} tokens, and there are {longest}"
    if bent := _rope_kinds(config) & {"dynamic", "longrope"}:
        yield f"its rotation of positions depends on the length ({', '.join(sorted(bent))})"
    if not getattr(model, "_supports_attention_backend", False):
        yield "its attention takes no other function"
    for name in _HEAD_TERMS:
        if getattr(config, name, None) not in (None, 1, 1.0):
            yield f"its logits are changed after the output embedding ({name})"
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        yield f"its output embedding is no linear map ({type(head).__name__})"


def _rope_kinds(config: Any) -> set[str]:
    """The kinds of rotary embedding, over all kinds of layers."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    parts = [given, *(part for part in given.values() if isinstance(part, dict))]
    return {part[name] for part in parts for name in ("rope_type", "type") if isinstance(part.get(name), str)}


def disproof(engine: Any, device: torch.device, *, dtype: str) -> str | None:
    """What a small batch shows against sharing; None where both ways agree. All ranks call it together."""
    answers = [AnswerRow("", prompt, ids) for prompt, found in _PROBE for ids in found]
    with torch.no_grad():
        plain = Scoring(engine, device, shares=False)
        apart, alone = plain(answers).logps_N, torch.cat([plain([answer]).logps_N for answer in answers])
        try:
            scoring = Scoring(engine, device, shares=True)
            together = scoring(answers).logps_N, scoring(answers, likely_skipped=[1, 3]).logps_N
        except NotExact as error:
            return str(error)
        except (TypeError, AttributeError, ValueError) as error:  # a model of another shape than all others
            return f"it takes no packed row ({type(error).__name__}: {error})"
    gap = max((apart - logps_N).abs().max().item() for logps_N in together)
    low, high = _GAPS[dtype]
    most = min(max(low, _TIMES_NOISE * (apart - alone).abs().max().item()), high)
    return None if gap <= most else f"a small batch came out otherwise, by {gap:.2g} nats an answer"
