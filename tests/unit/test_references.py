"""References named by their folders: found, hashed, of the policy's tokenizer; and which policies a round names."""

from __future__ import annotations

import json
import shutil

import pytest
from policy_cases import shop_of, weights
from refusals import refused

from pipeline.lineage import Lineage, RoundRecord
from pipeline.policies import PolicyLine
from pipeline.run import Run
from stages.protocols import Weights

# ---- what may be a reference ----------------------------------------------------------------------------------------


def test_a_brother_of_the_policy_may_be_its_reference(models, tmp_path):
    shop = shop_of(models, f"reference={models / 'brother'}", into=tmp_path / "run")
    Run(shop).prepare()
    ((name, found),) = PolicyLine(shop, Lineage.read(tmp_path / "none.json")).of(1).references
    assert name == str(models / "brother") and found.path == models / "brother"


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("stranger", ["policy's tokenizer", "the policy's own family"]),
        ("nobody", ["no such path"]),
        ("empty", ["config.json"]),
    ],
)
def test_what_cannot_be_a_reference_is_refused_before_a_model_is_loaded(models, tmp_path, named, says):
    (models / "empty").mkdir(exist_ok=True)
    refused(
        lambda: Run(shop_of(models, f"reference={models / named}", into=tmp_path / "run")).prepare(),
        "reference",
        *says,
    )


def test_a_token_with_another_id_is_another_tokenizer(models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models / "brother", other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    shop = shop_of(models, f"reference={other}", into=tmp_path / "run")
    refused(lambda: Run(shop).prepare(), "reference", "token 'a'")


# ---- which policies a round names -----------------------------------------------------------------------------------


def line_of(shop, *starts: int) -> PolicyLine:
    """The policies after rounds that started from some results, each round's result being its number."""
    lineage = Lineage(shop.folder / "run.json")
    first = shop.sources.policy
    for number, start in enumerate(starts, start=1):
        begun = weights(start) if start else first
        made = weights(number)
        record = RoundRecord(number, begun, begun, [], made, made, "promote", "", {})
        lineage.rounds.append(record)
    return PolicyLine(shop, lineage)


def named(models, tmp_path, starts, *overrides):
    shop = shop_of(models, *overrides, into=tmp_path / "run")
    found = line_of(shop, *starts).of(len(starts) + 1)
    return found.sampling.round, found.start.round, [reference.round for _, reference in found.references]


def test_words_for_references_mean_what_they_say(models, tmp_path):
    plain = [0, 1, 2]
    assert named(models, tmp_path, plain, "reference=round_start") == (3, 3, [3])
    assert named(models, tmp_path, plain, "reference=initial") == (3, 3, [0])
    assert named(models, tmp_path, plain, "reference=previous") == (3, 3, [2])
    several = ["reference=[initial, previous]", "update.loss_type=mrpo"]
    assert named(models, tmp_path, plain, *several) == (3, 3, [0, 2])
    nothing = ["reference=none", "update.loss_type=simpo", "update.beta=null"]
    assert named(models, tmp_path, plain, *nothing) == (3, 3, [])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_whose_weights_were_removed_is_made_again_where_it_is_used(models, tmp_path, dtype):
    shop = shop_of(models, "reference=ema", "momentum=0.3", f"policy.dtype={dtype}", into=tmp_path / "run")
    lineage, before = Lineage(shop.folder / "run.json"), shop.sources.policy
    for number, name in enumerate(["brother", "policy", "brother"], start=1):
        made = Weights.found(models / name, round=number)
        lineage.settle(RoundRecord(number, before, before, [], made, made, "promote", "", {}))
        before = made
    line = PolicyLine(shop, lineage)
    first = line.of(4)
    mixtures = {file: file.read_bytes() for file in shop.folder.glob("round-*/*/*/*.safetensors")}
    assert {file.relative_to(shop.folder).parts[:2] for file in mixtures} == {
        *((f"round-{number:04d}", "ema") for number in (2, 3, 4)),
        ("round-0004", "start"),
    }
    for gone in (mixtures, [file for file in mixtures if file.parent.name == "policy"]):
        for file in gone:
            file.unlink()
        assert line.of(4) == first
        assert {file: file.read_bytes() for file in mixtures} == mixtures
    lineage.settle(RoundRecord(4, first.sampling, first.start, [], before, before, "promote", "", {}))
    for file in mixtures:
        file.unlink()
    assert line.of(4) == first and not any(file.exists() for file in mixtures), "a settled round's name is enough"


def test_in_the_first_round_every_word_means_the_first_policy(models, tmp_path):
    for word in ("round_start", "initial", "previous", "ema"):
        assert named(models, tmp_path, [], f"reference={word}", "momentum=0.3") == (0, 0, [0])


def test_starting_from_the_first_policy_samples_with_the_latest(models, tmp_path):
    assert named(models, tmp_path, [0, 0, 0], "start=initial") == (3, 0, [0])
    assert named(models, tmp_path, [0, 0, 0], "start=initial", "reference=initial") == (3, 0, [0])


def test_a_round_may_name_others_than_the_rest(models, tmp_path):
    rounds = "rounds=[{}, {start: initial, reference: initial}, {reference: previous}]"
    assert named(models, tmp_path, [0], rounds) == (1, 0, [0])
    assert named(models, tmp_path, [0, 0], rounds) == (2, 2, [0])


def test_a_stale_round_samples_with_the_policy_before_and_trains_from_the_latest(models, tmp_path):
    stale = "max_staleness=1"
    assert named(models, tmp_path, [], stale) == (0, 0, [0])
    assert named(models, tmp_path, [0], stale) == (0, 1, [1])
    assert named(models, tmp_path, [0, 1, 2], stale) == (2, 3, [3])
    assert named(models, tmp_path, [0, 0, 0], stale, "start=initial") == (2, 0, [0])
