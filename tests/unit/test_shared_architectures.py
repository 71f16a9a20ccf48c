"""Which architectures share prompts, with the gradients of separate sequences, and why the others do not."""

from __future__ import annotations

import pytest
import tiny_models
import torch
import torch.distributed as dist
from ranks import on_ranks
from shared_cases import CPU, WAYS, TorchEngine, gradient_by, moved_references, pairs_of, small_llama

from stages.update.config import UpdateConfig
from stages.update.exactness import disproof, why_apart
from stages.update.model import load_policy

APART = {"gemma2": "32 tokens back", "bloom": "ALiBi"}
"""Kinds of `tiny_models` that do not share prompts, and a word of the reason."""


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check_sharing(name, folder):
    model = load_policy(tiny_models.policy(name, folder), dtype="float32")
    engine, reason = TorchEngine(model), why_apart(model, 120)
    assert (reason is None) == (name not in APART)
    if reason is not None:
        assert APART[name] in reason
        assert disproof(engine, CPU, dtype="float32") is not None, "what is refused by name is disproved too"
        return
    assert disproof(engine, CPU, dtype="float32") is None
    rows = pairs_of([(0, 5, 3), (1, 1, 20), (1, 17, 1), (2, 30, 24)], prompts=[1, 60, 9], equal=1)
    references = moved_references(engine, rows, count=1)
    found = [gradient_by(way, engine, rows, UpdateConfig(), references) for way in WAYS]
    for gradient, scored in found[1:]:
        assert (gradient - found[0][0]).norm() < 1e-5 * found[0][0].norm()
        assert (scored.logps_N - found[0][1].logps_N).abs().max() < 1e-4


def check_proof_in_bfloat16(name, folder):
    model = load_policy(tiny_models.policy(name, folder), dtype="bfloat16")
    if name != "mixtral":  # whose random router may choose otherwise
        assert disproof(TorchEngine(model), CPU, dtype="bfloat16") is None


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.KINDS)
def test_an_architecture_shares_prompts_with_the_gradients_of_separate_sequences_or_says_why_not(name, tmp_path):
    """In a process without vLLM, which changes classes of transformers that it takes models of."""
    on_ranks(1, check_sharing, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in tiny_models.KINDS if name not in APART])
def test_in_bfloat16_the_proof_holds_too(name, tmp_path):
    on_ranks(1, check_proof_in_bfloat16, name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", APART)
def test_the_proof_sees_in_bfloat16_too_what_is_refused_by_name(name, tmp_path):
    model = load_policy(tiny_models.policy(name, tmp_path), dtype="bfloat16")
    assert disproof(TorchEngine(model), CPU, dtype="bfloat16") is not None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"sliding_window": 50}, "50 tokens back"),
        ({"attention_chunk_size": 50}, "chunks of 50"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longrope"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"is_encoder_decoder": True}, "encoder"),
    ],
)
def test_what_makes_sharing_inexact_is_told_by_the_config(change, word):
    model = small_llama()
    assert why_apart(model, 120) is None
    for name, value in change.items():
        setattr(model.config, name, value)
    assert word in (why_apart(model, 120) or "")


def test_a_window_no_sequence_reaches_and_unused_ones_forbid_nothing():
    model = small_llama()
    model.config.sliding_window = 120
    assert why_apart(model, 120) is None and why_apart(model, 121) is not None
    model.config.layer_types = ["full_attention", "full_attention"]
    assert why_apart(model, 121) is None


def test_a_head_that_is_more_than_a_linear_map_is_told():
    model = small_llama()
    model.set_output_embeddings(torch.nn.Sequential(model.get_output_embeddings()))
    assert "Sequential" in (why_apart(model, 10) or "")


def test_a_layer_gone_through_twice_is_found_out():
    model = small_llama()
    model.model.layers[1] = model.model.layers[0]
    assert "more than once" in (disproof(TorchEngine(model), CPU, dtype="float32") or "")


def test_a_term_of_attention_that_is_not_known_is_found_out():
    model = small_llama()
    attend = model.model.layers[0].self_attn.forward
    model.model.layers[0].self_attn.forward = lambda *args, **more: attend(*args, **more, indices=torch.ones(1))
    assert "indices" in (disproof(TorchEngine(model), CPU, dtype="float32") or "")
