"""Everything that an objective may ask of the trainer, against plain torch, on one rank and on two."""

from __future__ import annotations

import pytest
import torch
from plain_update import plain_logps
from ranks import on_ranks
from trainer_cases import OBJECTIVES, all_updated, plain, rows_of
from trainer_laws import check_metrics, check_steps

from stages.update.model import load_policy, read_weights
from stages.update.rows import answers_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def other(policy_folder, tmp_path_factory) -> dict[str, float]:
    """The log-probs of a model that is not the start."""
    model = load_policy(policy_folder, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    folder = tmp_path_factory.mktemp("other")
    model.save_pretrained(folder)
    return plain_logps(folder, answers_of(rows_of("pairs")))


@pytest.fixture(scope="module")
def results(policy_folder, other):
    return {world: on_ranks(world, all_updated, policy_folder, OBJECTIVES, other) for world in (1, 2)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_layout_takes_plain_torchs_steps(results, policy_folder, other, name):
    update, steps = plain(policy_folder, OBJECTIVES[name], other)
    for ranks in results.values():
        check_steps(ranks, update, steps, name, start=read_weights(policy_folder))
        check_metrics(ranks[0][name]["steps"], steps)


def test_metrics_do_not_depend_on_the_number_of_ranks(results):
    for name in OBJECTIVES:
        for one, two in zip(results[1][0][name]["steps"], results[2][0][name]["steps"], strict=True):
            assert one.keys() == two.keys()
            for key in one.keys() - {"step_s", "tokens/processed"}:  # a rank without rows runs a dummy
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-3), (name, key)
