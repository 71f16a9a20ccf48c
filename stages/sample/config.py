"""The sampling stage's settings, under ``sample`` in a config."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from stages.settings import Settings, where


class SampleConfig(Settings):
    """How answers are sampled; the names are vLLM's."""

    num_generations: int = Field(8, ge=1, le=4096, description="answers a prompt")
    temperature: float = Field(1.0, gt=0, description="above 0: greedy answers to a prompt would all be equal")
    top_p: float = Field(1.0, gt=0, le=1, description="draw among the likeliest tokens with this probability in all")
    top_k: int = Field(0, ge=0, description="0: all tokens")
    min_p: float = Field(
        0.0, ge=0, le=1, description="draw among tokens at least so likely, as a share of the likeliest one's; 0: all"
    )
    stop: tuple[str, ...] = Field(
        (),
        description="texts that end an answer, besides the model's EOS tokens; rewards see the answer without such a "
        "text, training keeps every token that was sampled, up to the one that completes it",
    )
    max_new_tokens: int = Field(256, ge=1, description="tokens an answer has at most, the EOS included")
    max_model_len: int | None = Field(None, ge=2, description="tokens of prompt and answer; null: the model's context")
    engines: int = where(1, ge=1, description="vLLM engines that share the shards")
    max_engines: int | None = where(
        None,
        ge=1,
        description="engines at most: while shards wait, further ones come up where the cluster has room, or grows, "
        "and end when none waits; null: as many as engines",
    )
    tensor_parallel_size: int = where(1, ge=1, description="GPUs an engine spans")
    gpu_memory_utilization: float = where(0.85, gt=0, le=1, description="share of a GPU that an engine takes")
    num_threads: int | None = where(
        None, ge=1, description="an engine's CPU threads on a machine without a GPU; null: its share of all cores"
    )
    kv_cache_gib: int = where(1, ge=1, description="GiB of KV cache on a machine without a GPU")

    @model_validator(mode="after")
    def _at_least_engines(self) -> Self:
        if self.max_engines is not None and self.max_engines < self.engines:
            raise ValueError(f"max_engines: at least engines ({self.engines}), or null")
        return self

    def engine(self) -> SampleConfig:
        """What an engine is started with: the settings of single requests, which come with each, left at defaults."""
        kept = ("max_model_len", "tensor_parallel_size", "gpu_memory_utilization", "kv_cache_gib")
        return SampleConfig(**{name: getattr(self, name) for name in kept})
