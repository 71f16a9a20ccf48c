"""TRL's own code beside ours, on the same tensors: equal losses and equal gradients by every token's log-prob."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from batches import summed
from trl_peer import dataset, policy_and_reference, trl_trainer

from stages.update.objectives.base import Pairs
from stages.update.objectives.registry import find_loss

pytestmark = pytest.mark.slow  # importing TRL takes some ten seconds

# our objectives with weights and parameters, TRL's names, its settings, and how many times ours its loss is
CASES = [
    ([("dpo", {})], ["sigmoid"], {}, 1),
    ([("dpo", {"beta": 0.5, "logps": "mean"})], ["sigmoid_norm"], {"beta": 0.5}, 1),
    ([("ipo", {})], ["ipo"], {}, 1),
    ([("hinge", {})], ["hinge"], {}, 1),
    ([("robust", {"label_smoothing": 0.2})], ["robust"], {"label_smoothing": 0.2}, 1),
    ([("exo_pair", {})], ["exo_pair"], {"label_smoothing": 1e-3}, 1),
    ([("exo_pair", {"beta": 0.7})], ["exo_pair"], {"label_smoothing": 1e-3, "beta": 0.7}, 1),
    ([("nca_pair", {})], ["nca_pair"], {}, 1),
    ([("sppo", {"beta": 0.1})], ["sppo_hard"], {}, 2),
    ([("sft", {})], ["sft"], {}, 1),
    ([("dpo", {}), ("sft", {}), ("hinge", {})], ["sigmoid", "sft", "hinge"], {"loss_weights": [1.0, 0.3, 2.0]}, 1),
]


@pytest.fixture(scope="module")
def models(policy_folder):
    return policy_and_reference(policy_folder)


def computed_by_trl(trainer):
    """TRL's loss on the whole dataset, with its gradient by the policy's token log-probs, and what it was made of."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    seen = []
    hooks = [
        m.register_forward_hook(lambda *args: seen.append(args[2].log_probs))
        for m in (trainer.model, trainer.ref_model)
    ]
    loss = trainer._compute_loss(trainer.model, batch, False)
    for hook in hooks:
        hook.remove()
    policy, reference = seen
    mask = batch["completion_mask"][:, 1:]
    (gradient,) = torch.autograd.grad(loss, policy)
    return SimpleNamespace(
        loss=loss.detach(),
        gradient=gradient * mask,  # elsewhere it leads nowhere: the log-probs there are constants
        policy=policy.detach(),
        reference=reference.detach(),
        mask=mask,
    )


def computed_by_us(losses, weights, theirs):
    """Our loss on the same token log-probs, with its gradient by them."""
    tokens_NT = theirs.policy.clone().requires_grad_()
    answers = (tokens_NT * theirs.mask, theirs.reference * theirs.mask, theirs.mask.float())
    (chosen, rejected), refs, lengths = (x.sum(-1).chunk(2) for x in answers)
    pairs = Pairs(chosen, rejected, refs[0][None], refs[1][None], *lengths)
    counts = {"pairs": len(chosen), "tokens": lengths[0].sum()}
    terms = [
        term
        for (name, params), weight in zip(losses, weights, strict=True)
        for term in find_loss(name, params, weight=weight)(pairs)
    ]
    loss = sum((term.loss_B * term.weight_B).sum() / counts[term.normaliser] for term in terms)
    return loss.detach(), torch.autograd.grad(loss, tokens_NT)[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "times"),
    CASES,
    ids=["+".join(theirs) for _, theirs, _, _ in CASES],
)
def test_losses_and_gradients_are_trls(models, policy_folder, tmp_path, ours, theirs, settings, times):
    trainer = trl_trainer(models, policy_folder, tmp_path, loss_type=theirs, **settings)
    expected = computed_by_trl(trainer)
    loss, gradient = computed_by_us(ours, settings.get("loss_weights", [1.0] * len(ours)), expected)
    assert expected.gradient.abs().max() > 1e-4
    assert torch.allclose(times * loss, expected.loss, rtol=1e-6)
    scale = expected.gradient.abs().max()
    assert torch.allclose(times * gradient, expected.gradient, rtol=1e-5, atol=1e-6 * float(scale))


def test_simpo_is_that_of_trls_experimental_cpo(models, policy_folder, tmp_path):
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says at import that it is experimental
        from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=False,
        disable_tqdm=True,
        loss_type="simpo",
        cpo_alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        max_length=30,
    )
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    trainer = CPOTrainer(models[0], args=config, train_dataset=dataset(), processing_class=tokenizer)
    batch = trainer.data_collator(list(trainer.train_dataset))
    mean_w, mean_l, *_ = (x.detach() for x in trainer.concatenated_forward(trainer.model, batch))
    leaves = [x.clone().requires_grad_() for x in (mean_w, mean_l)]
    expected, *_ = trainer.cpo_loss(*leaves)

    lengths = [(batch[f"{kind}_labels"] != -100).sum(-1) for kind in ("chosen", "rejected")]
    sums = [(x * length).requires_grad_() for x, length in zip((mean_w, mean_l), lengths, strict=True)]
    nothing = torch.empty(0, len(mean_w))
    found = summed(find_loss("simpo", {"beta": 2.0, "gamma": 0.7})(Pairs(*sums, nothing, nothing, *lengths)))
    assert torch.allclose(found, expected, rtol=1e-6)
    theirs, ours = torch.autograd.grad(expected.sum(), leaves), torch.autograd.grad(found.sum(), sums)
    for by_mean, by_sum, length in zip(theirs, ours, lengths, strict=True):
        assert torch.allclose(by_sum * length, by_mean, rtol=1e-5)
