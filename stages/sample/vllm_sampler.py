"""A vLLM engine in the caller's own process, one policy at a time.

The engine core runs in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): repeated calls then agree to the last bit
in float32, and no child can outlive its actor. Other weights are read by the running engine, in place. That this worked
is not known here: `stages.sample.swap` has it proved.
"""

from __future__ import annotations

import gc
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.protocols import Answer, Loading, SampleRequest, Weights
from stages.sample.config import SampleConfig
from stages.sample.fixed_parts import differing_parts, fixed_parts

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput

_log = logging.getLogger(__name__)

_MAX_BATCHED_TOKENS = 4096


class VLLMSampler:
    """`stages.protocols.Sampler` on vLLM.

    Args:
        config: the engine's settings; how to sample is said with each batch of requests.
        dtype: of the policy's weights in the engine.
        num_threads: CPU cores to use where there is no GPU.
        use_gpu: whether this process has a GPU.
        seed: of the engine; every request carries its own besides.
        sleeps: start engines such that they can sleep on a GPU; else, and on a CPU, they stop to rest.
    """

    def __init__(
        self,
        config: SampleConfig,
        *,
        dtype: str,
        num_threads: int,
        use_gpu: bool,
        seed: int,
        sleeps: bool = False,
    ) -> None:
        self._config, self._dtype, self._use_gpu, self._seed = config, dtype, use_gpu, seed
        self._sleeps, self._is_asleep = sleeps and use_gpu, False
        self._llm: LLM | None = None
        self._loaded: str | None = None
        self._parts: dict[str, str] = {}
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        if not use_gpu:
            import torch

            # vLLM takes as many threads as torch and OpenMP are set to when it is imported; Ray sets one.
            os.environ["OMP_NUM_THREADS"] = str(num_threads)
            torch.set_num_threads(num_threads)
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several engines would all be bound to the first cores
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)

    def load(self, weights: Weights, *, afresh: bool = False) -> Loading:
        """See `stages.protocols.Sampler`: the weights are taken in place where an engine runs that can.

        Raises:
            InputError: if vLLM cannot run the model.
            StageError: if the folder no longer holds the weights that were asked for.
        """
        began = perf_counter()
        if self._is_asleep and not afresh:
            self._wake()
        if self._loaded == weights.sha256 and not afresh:
            return Loading("held", perf_counter() - began)
        replace(weights, master=None, master_sha256=None).refuse_changed()  # an engine reads no master
        parts = fixed_parts(weights.path)
        reason = "a new engine was asked for" if afresh else self._take_in_place(weights, parts)
        if reason:
            self.close()
            self._llm = self._start(weights)
            _log.info("an engine was started on %s: %s", weights.path, reason)
        self._loaded, self._parts = weights.sha256, parts
        return Loading("started" if reason else "in place", perf_counter() - began, reason)

    def generate(self, requests: Sequence[SampleRequest], config: SampleConfig) -> list[list[Answer | None]]:
        """See `stages.protocols.Sampler`. The prefix cache is emptied first: a warm one changes last bits."""
        assert self._llm is not None, "load() comes first"
        if not requests:
            return []
        self._llm.reset_prefix_cache()
        special_tokens = self._special_tokens()
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt_token_ids} for request in requests],
            [_sampling_params(config, request.seed, special_tokens) for request in requests],
            use_tqdm=False,
        )
        return [[_answer(completion) for completion in output.outputs] for output in outputs]

    def logps(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        """See `stages.protocols.Sampler`. No answer is empty.

        An answer's last token is the one that the engine may sample, so that an answer that fills the context fits;
        a log-prob is the model's own, whatever may be sampled.
        """
        assert self._llm is not None, "load() comes first"
        if not answers:
            return []
        self._llm.reset_prefix_cache()
        outputs = self._llm.generate(
            [{"prompt_token_ids": [*p, *a[:-1]]} for p, a in zip(prompts, answers, strict=True)],
            [_scoring_params(answer[-1]) for answer in answers],
            use_tqdm=False,
        )
        return [_logp(output, answer) for output, answer in zip(outputs, answers, strict=True)]

    @property
    def max_model_len(self) -> int:
        assert self._llm is not None, "load() comes first"
        return int(self._llm.model_config.max_model_len)

    def rest(self) -> None:
        """See `stages.protocols.Sampler`: the engine sleeps where it can, else it stops. Sleep was not run: no GPU.

        It sleeps at vLLM's level 1, which keeps the weights in the machine's memory. What wakes is what went to sleep,
        and other weights then come in place, with the proof that any such change takes. Level 2 keeps no weights, so
        that every waking would be a change of weights, also where they stay the same and no probe can tell.
        """
        if self._llm is None or self._is_asleep:
            return
        if not self._sleeps:
            self.close()
            return
        self._llm.reset_prefix_cache()
        self._llm.sleep(level=1)
        self._is_asleep = True

    def _wake(self) -> None:
        assert self._llm is not None
        self._llm.wake_up()
        self._is_asleep = False

    def close(self) -> None:
        """Stop the engine and give its memory back; the sampler can load again."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._loaded, self._is_asleep = None, None, False
        gc.collect()
        cleanup_dist_env_and_memory()

    def _special_tokens(self) -> dict[str, int]:
        """Special tokens by their text."""
        assert self._llm is not None
        added = self._llm.get_tokenizer().added_tokens_decoder
        return {str(token): number for number, token in added.items() if token.special}

    def _take_in_place(self, weights: Weights, parts: Mapping[str, str]) -> str:
        """Have every rank of the running engine read the folder; why it could not, or an empty string."""
        if self._llm is None:
            return "none was running"
        if differing := differing_parts(self._parts, parts):
            return f"the running one was started with another {', '.join(differing)}"
        if not self._use_gpu and any(self._llm.apply_model(_has_packed_experts)):
            return "on a CPU vLLM does not pack a mixture's experts again"
        self._loaded = None
        try:
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.path)})
            if not self._use_gpu:
                self._llm.apply_model(_pack_tied_head)
            self._llm.reset_prefix_cache()
        except Exception as error:  # vLLM and its loaders raise nearly anything
            return f"the reload ended with {type(error).__name__}: {error}"
        return ""

    def _start(self, weights: Weights) -> LLM:
        from vllm import LLM

        options: dict[str, Any] = {}
        if self._use_gpu:
            options["gpu_memory_utilization"] = self._config.gpu_memory_utilization
            options["enable_sleep_mode"] = self._sleeps
        else:
            # A seeded request whose prefill is split kills the CPU engine, so that no prefill may be split.
            options |= {"enforce_eager": True, "enable_chunked_prefill": False}
            options["max_num_batched_tokens"] = max(_MAX_BATCHED_TOKENS, self._context(weights))
        try:
            return LLM(
                model=str(weights.path),
                dtype=self._dtype,
                max_model_len=self._config.max_model_len,
                tensor_parallel_size=self._config.tensor_parallel_size,
                generation_config="vllm",
                disable_log_stats=True,
                seed=self._seed % 2**32,
                **options,
            )
        except Exception as error:  # vLLM and its loaders raise nearly anything
            raise InputError(
                f"sample: {weights.path}",
                wanted="a model that vLLM can run here",
                got=f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
                fix="see the engine's log beside the run for the whole message",
            ) from error

    def _context(self, weights: Weights) -> int:
        if self._config.max_model_len is not None:
            return self._config.max_model_len
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(weights.path, local_files_only=True).get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or _MAX_BATCHED_TOKENS)


def _sampling_params(config: SampleConfig, seed: int, special_tokens: Mapping[str, int]) -> SamplingParams:
    """Of the model's own settings only its EOS tokens count (all of ``generation_config.json``): vLLM adds them.

    A special token is left out of an answer's text, so that its text would never be met there: as a stop it is an id.
    """
    from vllm import SamplingParams

    return SamplingParams(
        n=config.num_generations,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        stop=[text for text in config.stop if text not in special_tokens] or None,
        stop_token_ids=[special_tokens[text] for text in config.stop if text in special_tokens] or None,
        max_tokens=config.max_new_tokens,
        logprobs=0,
        seed=seed,
    )


def _answer(completion: CompletionOutput) -> Answer | None:
    """None for ``abort`` and ``error``: they mean "no sample", never an empty answer."""
    if completion.finish_reason not in ("stop", "length"):
        return None
    assert completion.logprobs is not None
    token_ids = list(completion.token_ids)
    logps = [step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True)]
    return Answer(completion.text, token_ids, logps, completion.finish_reason)


def _scoring_params(last_token: int) -> SamplingParams:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, prompt_logprobs=0, logprobs=0, allowed_token_ids=[last_token], detokenize=False)


def _logp(output: RequestOutput, answer: Sequence[int]) -> float:
    """The sum over an answer whose last token was sampled and whose other ones ended the prompt."""
    completion = output.outputs[0]
    if list(completion.token_ids) != [answer[-1]] or not completion.logprobs or not output.prompt_logprobs:
        return math.nan
    places = output.prompt_logprobs[len(output.prompt_logprobs) - len(answer) + 1 :]
    steps = [*zip(places, answer, strict=False), (completion.logprobs[0], answer[-1])]
    return math.fsum(place[token].logprob if place else math.nan for place, token in steps)


def _has_packed_experts(model: Any) -> bool:
    return any(getattr(getattr(m, "quant_method", None), "moe_kernel", None) is not None for m in model.modules())


def _pack_tied_head(model: Any) -> None:
    """Pack a head that shares the embeddings' tensor anew, for the CPU's matrix product.

    vLLM's reload packs only layers that have a tensor of their own in the files. A tied head has none: its tensor holds
    the new values, but it would go on computing with the old packing.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    layers = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    for head in layers:
        if isinstance(head, ParallelLMHead) and any(other.weight is head.weight for other in layers if other != head):
            head.quant_method.process_weights_after_loading(head)
