"""Policies on the line through two others: momentum and averages."""

from __future__ import annotations

import pytest
import torch
from tiny_models import policy
from transformers import AutoModelForCausalLM

from stages.errors import InputError, StageError
from stages.protocols import Weights
from stages.update.mixing import mix
from stages.update.model import read_weights


def shifted(folder, out, seed, dtype=torch.float32):
    """A policy near another one, with its tokenizer, as an update leaves it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(out)
    for file in folder.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return out


@pytest.fixture(scope="module")
def two(policy_folder, tmp_path_factory):
    """Two policies of one model: newer, older."""
    root = tmp_path_factory.mktemp("policies")
    return [Weights.found(shifted(policy_folder, root / name, seed), round=seed) for seed, name in enumerate("ab")]


def mixed(newer, older, by, out, dtype="float32"):
    master = mix(newer, older, by=by, out=out, dtype=dtype, pad_token=None)
    return Weights.found(out / "policy", round=1, master=master)


def test_it_goes_on_by_a_share_of_the_last_change(two, tmp_path):
    newer, older = two
    a, b = read_weights(newer.path), read_weights(older.path)
    for by in (0.3, -0.9):
        found = read_weights(mixed(newer, older, by, tmp_path / str(by)).path)
        assert found.keys() == a.keys()
        for name, value in found.items():
            assert torch.allclose(value, a[name] + by * (a[name] - b[name]), atol=1e-7)


def test_no_momentum_gives_the_newer_policy_bit_for_bit(two, tmp_path):
    newer, older = two
    a, found = read_weights(newer.path), read_weights(mixed(newer, older, 0.0, tmp_path).path)
    assert all(torch.equal(found[name], a[name]) for name in a)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounds_without_momentum_start_from_the_very_weights_of_plain_rounds(two, tmp_path, dtype):
    plain = mixed(*two, 0.7, tmp_path / "plain", dtype)  # a policy as rounds publish them
    assert mixed(plain, two[1], 0.0, tmp_path / "mixed", dtype).identity == plain.identity


def test_a_mixture_of_a_policy_with_itself_is_that_policy(two, tmp_path):
    a, found = read_weights(two[0].path), read_weights(mixed(two[0], two[0], 5.0, tmp_path).path)
    assert all(torch.equal(found[name], a[name]) for name in a)


def test_it_is_computed_on_the_masters_and_keeps_one(policy_folder, two, tmp_path):
    rounded = shifted(policy_folder, tmp_path / "rounded", seed=0, dtype=torch.bfloat16)
    newer = Weights.found(rounded, round=1, master=two[0].path)
    found = mixed(newer, two[1], 0.3, tmp_path / "out", dtype="bfloat16")
    exact = read_weights(mixed(two[0], two[1], 0.3, tmp_path / "exact").path)
    assert all(torch.equal(value, exact[name]) for name, value in read_weights(found.master).items())
    assert all(torch.equal(value, exact[name].bfloat16()) for name, value in read_weights(found.path).items())


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", True), ("llama", False)])
def test_tied_weights_stay_tied_and_what_it_writes_is_whole(tmp_path, kind, tied):
    older = Weights.found(policy(kind, tmp_path / "older"), round=0)
    newer = Weights.found(shifted(older.path, tmp_path / "newer", seed=3), round=1)
    out = mixed(newer, older, 0.3, tmp_path / "out").path
    model = AutoModelForCausalLM.from_pretrained(out)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert {f.name for f in out.glob("tokenizer*")} == {f.name for f in newer.path.glob("tokenizer*")}


def test_policies_of_two_models_are_refused(two, tmp_path):
    other = policy("gpt2", tmp_path / "gpt2")
    with pytest.raises(InputError, match="names or shapes"):
        mixed(two[0], Weights.found(other, round=0), 0.3, tmp_path / "out")


def test_weights_that_are_not_those_of_the_lineage_are_refused(two, tmp_path):
    newer, older = two
    with pytest.raises(StageError, match="sha256"):
        mixed(newer, Weights(older.path, "0" * 64, 0), 0.3, tmp_path)
