"""A prompt computed once for all its answers changes nothing: log-probs and gradients are those of each one alone."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from shared_cases import (
    CPU,
    WAYS,
    TorchEngine,
    attending,
    gradient_by,
    groups_of,
    moved_references,
    pairs_of,
    small_llama,
)

from stages.update.config import LoraConfig, UpdateConfig
from stages.update.lora import add_adapters
from stages.update.objectives.registry import OBJECTIVES
from stages.update.packing import Family, pack, pack_more
from stages.update.rows import answers_of
from stages.update.scoring import Scoring

# Prompts of one token, of a few, and longer than a block of any kernel; two pairs of one prompt; one-token answers. The
# answers are short, since an objective such as chi_po multiplies the rounding of their log-probs.
AWKWARD = {"prompts": [1, 300, 9], "lengths": [(0, 5, 3), (1, 1, 20), (1, 17, 1), (2, 1, 1), (2, 16, 14), (0, 4, 4)]}


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def engine():
    return TorchEngine(small_llama())


def apart_by(gradient: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance over the length; the gradient of equal answers against each other is rounding alone."""
    return float((gradient - expected).norm() / max(expected.norm(), 1.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objectives_gradient_is_that_of_separate_sequences(engine, name):
    config = UpdateConfig(loss_type=name)
    rows = pairs_of(**AWKWARD, equal=1)
    rows = rows if config.rows == "pairs" else groups_of(rows)
    references = moved_references(
        engine, rows, count=max(config.num_references[0], 1) if config.num_references[1] != 0 else 0
    )
    with attending("by segments"):
        found = [gradient_by(way, engine, rows, config, references) for way in WAYS]
    for gradient, scored in found[1:]:
        assert apart_by(gradient, found[0][0]) < 1e-5
        assert (scored.logps_N - found[0][1].logps_N).abs().max() < 2e-4


@st.composite
def micro_batches(draw):
    prompts = draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    length = st.integers(1, 40)
    lengths = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), length, length), min_size=1, max_size=6))
    return pairs_of(lengths, prompts=prompts, seed=draw(st.integers(0, 99)), equal=draw(st.integers(0, 2)))


@settings(max_examples=8)
@given(micro_batches(), st.integers(0, 99), st.booleans(), st.sampled_from(["by segments", "under a mask"]))
def test_so_it_is_for_pairs_of_any_length(engine, rows, seed, tied, how):
    engine = TorchEngine(small_llama(tied=True)) if tied else engine
    references = moved_references(engine, rows, count=1, seed=seed)
    expected, plain = gradient_by("apart", engine, rows, UpdateConfig(), references)
    for way in WAYS[1:]:
        with attending(how):
            gradient, scored = gradient_by(way, engine, rows, UpdateConfig(), references)
        assert apart_by(gradient, expected) < 1e-5
        assert (scored.logps_N - plain.logps_N).abs().max() < 1e-4


def test_so_it_is_for_adapters():
    model = small_llama()
    add_adapters(model, LoraConfig(r=3, alpha=5.0), round=1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # which begins as 0, and would keep A's gradient at 0
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    engine = TorchEngine(model)
    rows = pairs_of([(0, 5, 3), (1, 1, 20), (1, 17, 1), (2, 30, 24)], prompts=[1, 60, 9])
    references = moved_references(engine, rows, count=1)
    plain, *others = (gradient_by(way, engine, rows, UpdateConfig(), references)[0] for way in WAYS)
    assert plain.norm() > 0 and all(apart_by(found, plain) < 1e-5 for found in others)


@pytest.mark.parametrize("active", [(), (2,), (0, 1, 2, 3, 4, 5)])
def test_what_gets_no_gradient_gets_no_backward(engine, active):
    rows = pairs_of(**AWKWARD)
    with torch.no_grad():
        logps = Scoring(engine, CPU, shares=True)(answers_of(rows)).logps_N.tolist()
    reference = {answer.response_id: logp for answer, logp in zip(answers_of(rows), logps, strict=True)}
    for i, row in enumerate(rows):
        reference[row.rejected_id] += -1.0 if i in active else 1.0
    expected, dense = gradient_by("shared", engine, rows, UpdateConfig(), [reference])
    gradient, scored = gradient_by("skipping", engine, rows, UpdateConfig(), [reference])
    assert apart_by(gradient, expected) < 1e-5
    idle = [row for i, row in enumerate(rows) if i not in active]
    assert scored.num_skipped == sum(len(row.rejected_token_ids) for row in idle)
    # The first token of an answer is predicted by its prompt, and the last one predicts nothing.
    assert dense.tokens.backward - scored.tokens.backward == sum(len(row.rejected_token_ids) - 1 for row in idle)


def test_a_prompt_is_computed_once_for_all_its_answers_and_equal_answers_once(engine):
    rows = pairs_of([(0, 6, 9), (0, 6, 4), (1, 3, 3)], prompts=[50, 7], equal=1)
    _, scored = gradient_by("shared", engine, rows, UpdateConfig(loss_type="sft"), [])
    answers = {(tuple(row.prompt_token_ids), tuple(ids.token_ids)) for row in rows for ids in row.answers}
    assert scored.tokens.real == scored.tokens.processed == 50 + 7 + sum(len(ids) - 1 for _, ids in answers)


def states_of(engine, prompt, chosen, rejected):
    """The hidden states of the rejected answer and of the prompt."""
    row = pack([Family(prompt, {0: chosen, 1: rejected})], 2, CPU)
    engine(row)
    with torch.no_grad():
        states_TH = engine.module.model.model(
            input_ids=row.tokens_T[None], position_ids=row.positions_T[None], layout=row.layout
        ).last_hidden_state[0]
    first = len(prompt) + len(chosen) - 1
    return states_TH[first:], states_TH[: len(prompt)]


@given(st.integers(1, 80), st.integers(1, 40), st.integers(2, 40), st.integers(1, 40))
@settings(max_examples=8)
def test_an_answer_sees_nothing_of_another_one(engine, num_prompt, num_chosen, num_rejected, num_other):
    (row,) = pairs_of([(0, num_chosen, num_rejected)], prompts=[num_prompt])
    prompt, chosen, rejected = map(tuple, (row.prompt_token_ids, row.chosen_token_ids, row.rejected_token_ids))
    mine, asked = states_of(engine, prompt, chosen, rejected)
    for other in (tuple((token + 1) % 32 for token in chosen), tuple(range(num_other % 32)) + (1,)):
        again, asked_again = states_of(engine, prompt, other, rejected)
        # Equal to the last bit in a row of equal length; matrix products of another shape round otherwise.
        bound = 0.0 if len(other) == len(chosen) else 2e-5
        assert (mine - again).abs().max() <= bound and (asked - asked_again).abs().max() <= bound
    changed, _ = states_of(engine, tuple((token + 1) % 32 for token in prompt), chosen, rejected)
    assert (mine - changed).abs().max() > 1e-3, "it does see its prompt"


def heads_of(row, keys: int, generator: torch.Generator):
    """Random queries, keys and values of a row: four heads that share two of keys."""
    shape = len(row.tokens_T), 16
    return [torch.randn(1, heads, *shape, generator=generator) for heads in (4, keys, keys)]


def test_one_mask_and_the_block_mask_for_gpus_say_what_segments_say(engine):
    """FlexAttention runs on a CPU too, forward and without being compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    from stages.update.attention import packed_attention
    from stages.update.flex import block_mask

    generator = torch.Generator().manual_seed(0)
    families = [Family((1, 2, 3), {0: (4, 5, 6)}, {1: 7}), Family((5,) * 150, {2: (7,) * 20, 3: (8,) * 9}, {4: 1})]
    answers = [(4, 5, 6), (7, 8, 9), (7,) * 20, (8,) * 9, (1,) * 40]
    held = pack(families, 5, CPU, keeps=True)
    more = pack_more(families, held, {1, 4}, answers)
    module = torch.nn.Identity()
    before = heads_of(held, 2, generator)
    for row, (query, key, value) in ((held, before), (more, heads_of(more, 2, generator))):
        with attending("by segments"):
            expected, _ = packed_attention(module, query, key, value, None, layout=row.layout)
        if row is held:
            row.layout.prompts.clear()  # a layer is gone through once
        with attending("under a mask"):
            masked, _ = packed_attention(module, query, key, value, None, layout=row.layout)
        assert (masked - expected).abs().max() < 1e-5
        if row is more:
            key, value = torch.cat([before[1], key], dim=2), torch.cat([before[2], value], dim=2)
        mask = block_mask(row.layout, query.shape[2], key.shape[2], CPU)
        found = flex_attention(query, key, value, block_mask=mask, enable_gqa=True).transpose(1, 2)
        assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("way", WAYS)
def test_what_a_micro_batch_kept_goes_with_it_and_waits_for_no_collection(engine, way):
    rows = pairs_of([(0, 5, 6), (1, 4, 4)], prompts=[9, 30])
    references = moved_references(engine, rows, count=1)

    def tensors_after_one() -> int:
        with attending("by segments"):
            gradient_by(way, engine, rows, UpdateConfig(), references)
        return sum(isinstance(found, torch.Tensor) for found in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        assert tensors_after_one() == tensors_after_one()
    finally:
        gc.enable()
