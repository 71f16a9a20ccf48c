"""A vLLM engine in the caller's own process, one policy at a time.

The engine core runs in this process (``VLLM_ENABLE_V1_MULTIPROCESSING=0``): repeated calls then agree to the last bit
in float32, no child can outlive its actor, and a start with other weights takes 2 s on two cores instead of 16. Other
weights come in by closing the engine and starting another one; an in-place reload is not used, since on the CPU
backend it silently keeps the old head of a model with tied embeddings.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.protocols import Answer, SampleRequest, Weights
from stages.sample.config import SampleConfig

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.outputs import CompletionOutput

_MAX_BATCHED_TOKENS = 4096


class VLLMSampler:
    """`stages.protocols.Sampler` on vLLM.

    Args:
        config: the engine's settings; how to sample is said with each batch of requests.
        dtype: of the policy's weights in the engine.
        num_threads: CPU cores to use where there is no GPU.
        use_gpu: whether this process has a GPU.
        seed: of the engine; every request carries its own besides.
    """

    def __init__(self, config: SampleConfig, *, dtype: str, num_threads: int, use_gpu: bool, seed: int) -> None:
        self._config, self._dtype, self._use_gpu, self._seed = config, dtype, use_gpu, seed
        self._llm: LLM | None = None
        self._loaded: str | None = None
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        if not use_gpu:
            cores = sorted(os.sched_getaffinity(0))[:num_threads]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(config.kv_cache_gib)

    def load(self, weights: Weights) -> None:
        """Start an engine on these weights, or do nothing if it already holds them.

        Raises:
            InputError: if vLLM cannot run the model.
            StageError: if the folder no longer holds the weights that were asked for.
        """
        if self._loaded == weights.sha256:
            return
        self.close()
        weights.refuse_changed()
        self._llm = self._start(weights)
        self._loaded = weights.sha256

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

    @property
    def max_model_len(self) -> int:
        assert self._llm is not None, "load() comes first"
        return int(self._llm.model_config.max_model_len)

    def close(self) -> None:
        """Stop the engine and give its memory back; the sampler can load again."""
        if self._llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        self._llm, self._loaded = None, None
        gc.collect()
        cleanup_dist_env_and_memory()

    def _special_tokens(self) -> dict[str, int]:
        """Special tokens by their text."""
        assert self._llm is not None
        added = self._llm.get_tokenizer().added_tokens_decoder
        return {str(token): number for number, token in added.items() if token.special}

    def _start(self, weights: Weights) -> LLM:
        from vllm import LLM

        options: dict[str, Any] = {}
        if self._use_gpu:
            options["gpu_memory_utilization"] = self._config.gpu_memory_utilization
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
