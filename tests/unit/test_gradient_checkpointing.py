"""Computing activations again changes what is kept, and no bit of the result; under ZeRO 3 with weights shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import on_ranks
from trainer_cases import BASE, SEED, some_rows

from stages.errors import ConfigError
from stages.protocols import Weights
from stages.update import deepspeed_engine
from stages.update.batching import token_batch
from stages.update.config import UpdateConfig
from stages.update.logps import answer_logps
from stages.update.model import recompute_activations
from stages.update.rows import answers_of

KINDS = [("float32", 2), ("float32", 3), ("bfloat16", 0)]


@pytest.fixture(scope="module")
def wide_policy(tmp_path_factory) -> Path:
    """A Llama with matrices above DeepSpeed's 100,000 parameters, below which ZeRO 3 shares nothing out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 320, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 5}
    folder = tmp_path_factory.mktemp("wide")
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **shape)).save_pretrained(folder)
    return folder


def updated_with(folder: Path, kinds: list[tuple[str, int]]):
    """For each kind, without and with checkpointing: the weights after an update, the bytes that a forward keeps, and
    whether a rank holds only its share of some weight."""
    from stages.update.worker import Trainer

    found = []
    for dtype, stage in kinds:
        for checkpointing in (False, True):
            options = {"zero_stage": stage, "gradient_checkpointing": checkpointing, "skip_inactive": False}
            config = UpdateConfig(**BASE | options)
            trainer = Trainer(config, dtype=dtype, pad_token=None, num_threads=1)
            trainer.load(Weights.found(folder, round=0))
            rows = some_rows(5)
            kept = kept_bytes(trainer._engine)
            trainer.update(rows, [trainer.logps(answers_of(rows))], own_reference=0, seed=SEED)
            weights = trainer._engine.module.parameters()
            shared_out = any(getattr(p, "ds_tensor", p).numel() < getattr(p, "ds_numel", 0) for p in weights)
            found.append((dict(deepspeed_engine.float32_state(trainer._engine)), kept, shared_out))
    return found


def kept_bytes(engine) -> int:
    """Bytes of all tensors that one forward keeps for its backward, each once, and weights left out."""
    kept: dict[int, int] = {}
    weights = list(deepspeed_engine.model_of(engine).parameters())

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {weight.untyped_storage().data_ptr() for weight in weights}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = answers_of(some_rows(5))
    batch = token_batch([row.prompt_token_ids for row in rows], [row.token_ids for row in rows])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps_N = answer_logps(engine, batch, torch.device("cpu"))
    del logps_N
    return sum(kept.values())


@pytest.mark.slow
def test_the_result_is_the_same_to_the_last_bit_and_activations_are_let_go(wide_policy):
    for rank in on_ranks(2, updated_with, wide_policy, KINDS):
        for kind, without, with_it in zip(KINDS, rank[::2], rank[1::2], strict=True):
            assert all(torch.equal(without[0][name], with_it[0][name]) for name in without[0]), kind
            assert with_it[1] < without[1] / 3, kind
            assert with_it[2] == (kind[1] == 3)


def test_a_model_that_cannot_is_refused_with_the_key():
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError) as refused:
        recompute_activations(model)
    assert refused.value.where == "update.gradient_checkpointing"
    assert "OpenAIGPTLMHeadModel does not support" in refused.value.got
