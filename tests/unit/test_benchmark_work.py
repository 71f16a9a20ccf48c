"""What the update's benchmark counts and how it makes its work."""

from __future__ import annotations

import pytest

from benchmarks.update_measure import active
from benchmarks.update_work import Pair, Sizes, random_pairs, useful_flops

TINY = Sizes(vocabulary=10, layers=1, width=2, inner=3, heads=1)


def test_the_active_share_is_spread_over_the_pairs():
    for share in (0.0, 0.25, 0.5, 1.0):
        chosen = [active(place, share) for place in range(8)]
        assert sum(chosen) == 8 * share
        assert sum(chosen[:4]) == 4 * share


def test_useful_flops_by_hand():
    """A prompt of 2 tokens, answers of 1 and 2: 34 parameters in the linear maps of a layer, 20 in the head."""
    pair = Pair([4, 5], [2], [6, 2])
    prompt = 2 * 2 * 34 + 4 * 3 * 2
    chosen = 2 * 34 + 4 * (2 + 1) * 2 + 2 * 20
    rejected = 2 * 2 * 34 + 4 * (2 + 3 + 2) * 2 + 2 * 2 * 20
    assert TINY.layer_parameters == 34
    assert useful_flops([pair], TINY, active_share=1.0) == 3 * (prompt + chosen + rejected)
    assert useful_flops([pair], TINY, active_share=0.0) == 3 * (prompt + chosen) + rejected


@pytest.mark.parametrize(("prompt", "answer"), [(5, 3), (1, 1)])
def test_pairs_have_their_lengths_and_do_not_depend_on_a_larger_vocabulary(prompt, answer):
    pairs = random_pairs(4, prompt=prompt, answer=answer, vocabulary=16_000)
    assert {(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs} == {(prompt, answer, answer)}
    assert pairs == random_pairs(4, prompt=prompt, answer=answer, vocabulary=128_000)
