"""Every pair is trained once an epoch, on one rank, whatever the sizes."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from stages.update.batching import Load, deal, global_batches, num_steps, token_batch


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 3), st.integers(0, 9))
def test_every_row_stands_behind_one_step_an_epoch(num_rows, size, num_epochs, seed):
    batches = list(global_batches(num_rows, size=size, num_epochs=num_epochs, seed=seed))
    assert len(batches) == num_steps(num_rows, size=size, num_epochs=num_epochs)
    per_epoch = math.ceil(num_rows / size)
    for epoch in range(num_epochs):
        rows = [row for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
        assert sorted(rows) == list(range(num_rows))
    assert batches == list(global_batches(num_rows, size=size, num_epochs=num_epochs, seed=seed))


@st.composite
def loads(draw):
    prompts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=12))
    lengths = st.integers(1, 60)
    rows = draw(st.lists(st.tuples(st.integers(0, len(prompts) - 1), lengths, lengths), min_size=1, max_size=40))
    return [
        Load(prompt, prompts[prompt], chosen + rejected, 3.0 * chosen + rejected) for prompt, chosen, rejected in rows
    ]


def num_tokens(loads, part):
    prompts = {loads[i].prompt: loads[i].prompt_tokens for i in part}
    return sum(prompts.values()) + sum(loads[i].answer_tokens for i in part)


@given(loads(), st.integers(1, 4), st.integers(1, 9), st.integers(1, 300))
def test_dealing_loses_no_row_keeps_the_bounds_and_gives_every_rank_as_many_forwards(rows, world_size, size, tokens):
    ranks = deal(rows, world_size=world_size, max_rows=size, max_tokens=tokens)
    assert sorted(row for rank in ranks for part in rank for row in part) == list(range(len(rows)))
    assert len(ranks) == world_size and len({len(rank) for rank in ranks}) == 1
    for part in (part for rank in ranks for part in rank):
        assert len(part) <= size
        assert num_tokens(rows, part) <= tokens or len(part) == 1


@given(loads(), st.integers(2, 4))
def test_no_rank_has_more_to_do_than_a_fair_share_and_the_longest_row(rows, world_size):
    def cost(part):
        prompts = {rows[i].prompt: rows[i].prompt_tokens for i in part}
        return 3 * sum(prompts.values()) + sum(rows[i].cost for i in part)

    ranks = deal(rows, world_size=world_size, max_rows=100, max_tokens=10**6)
    total = sum(3 * row.prompt_tokens + row.cost for row in rows)
    longest = max(3 * row.prompt_tokens + row.cost for row in rows)
    for rank in ranks:
        assert sum(cost(part) for part in rank) <= total / world_size * 1.25 + longest


def test_token_0_is_a_real_token_and_lengths_alone_make_the_mask():
    batch = token_batch([[1, 0], [1]], [[0, 2], [2]])
    assert batch.tokens_NT.tolist() == [[1, 0, 0, 2], [1, 2, 0, 0]]
    assert batch.mask_NT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_NT.tolist() == [[False, False, True, True], [False, True, False, False]]
