"""Every pair is trained once an epoch, on one rank, whatever the sizes."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from stages.update.batching import deal, global_batches, num_steps, token_batch


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 3), st.integers(0, 9))
def test_every_row_stands_behind_one_step_an_epoch(num_rows, size, num_epochs, seed):
    batches = list(global_batches(num_rows, size=size, num_epochs=num_epochs, seed=seed))
    assert len(batches) == num_steps(num_rows, size=size, num_epochs=num_epochs)
    per_epoch = math.ceil(num_rows / size)
    for epoch in range(num_epochs):
        rows = [row for batch in batches[epoch * per_epoch : (epoch + 1) * per_epoch] for row in batch]
        assert sorted(rows) == list(range(num_rows))
    assert batches == list(global_batches(num_rows, size=size, num_epochs=num_epochs, seed=seed))


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 9))
def test_dealing_loses_no_row_and_gives_every_rank_as_many_micro_batches(num_rows, world_size, size):
    rows = list(range(num_rows))
    dealt = [deal(rows, rank=rank, world_size=world_size, micro_batch_size=size) for rank in range(world_size)]
    assert sorted(row for rank in dealt for part in rank for row in part) == rows
    assert len({len(rank) for rank in dealt}) == 1
    assert all(len(part) <= size for rank in dealt for part in rank)


def test_token_0_is_a_real_token_and_lengths_alone_make_the_mask():
    batch = token_batch([[1, 0], [1]], [[0, 2], [2]])
    assert batch.tokens_NT.tolist() == [[1, 0, 0, 2], [1, 2, 0, 0]]
    assert batch.mask_NT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.answer_NT.tolist() == [[False, False, True, True], [False, True, False, False]]
