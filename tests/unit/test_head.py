"""Log-probs of given tokens are those of whole logits, with their gradients, and keep little however many there are."""

from __future__ import annotations

import pytest
import torch

from stages.update import head

A, H, V = 37, 12, 50


@pytest.fixture(params=["all kept", "some kept", "none kept"])
def budget(request, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 8 * 4 * V)
    monkeypatch.setattr(head, "KEPT_BYTES", {"all kept": 10**6, "some kept": 17 * 4 * V, "none kept": 0}[request.param])
    return head.KEPT_BYTES


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_and_gradients_are_those_of_whole_logits(budget, bias, dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(H, V, bias=bias).to(dtype)
    hidden_AH = torch.randn(A, H, dtype=dtype, requires_grad=True)
    targets_A, weights_A = torch.randint(V, (A,)), torch.randn(A)
    inputs = [hidden_AH, *linear.parameters()]
    logps_A = head.token_logps(linear, hidden_AH, targets_A)
    assert sum(p.nbytes for p in logps_A.grad_fn.kept.values()) <= budget
    found = torch.autograd.grad((logps_A * weights_A).sum(), inputs)
    logits_AV = linear(hidden_AH).double()
    expected_A = logits_AV.log_softmax(-1).gather(1, targets_A[:, None])[:, 0]
    expected = torch.autograd.grad((expected_A * weights_A).sum(), inputs)
    gap = 1e-6 if dtype == torch.float32 else 1e-2
    assert logps_A.dtype == torch.float32
    assert (logps_A - expected_A).abs().max() < 10 * gap
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and (one - other).float().norm() < gap * other.float().norm() + 1e-6


def test_the_head_is_an_ordinary_one_again_afterwards():
    linear = torch.nn.Linear(H, V)
    with torch.no_grad():
        head.token_logps(linear, torch.randn(3, H), torch.tensor([0, 1, 2]))
    assert linear(torch.randn(3, H)).shape == (3, V)


def test_what_is_kept_does_not_grow_with_the_vocabulary():
    for num_words in (16_000, 128_000):
        linear = torch.nn.Linear(8, num_words, bias=False)
        logps_A = head.token_logps(linear, torch.randn(1_200, 8), torch.zeros(1_200, dtype=torch.long))
        kept = logps_A.grad_fn.kept.values()
        assert sum(p.nbytes for p in kept) <= head.KEPT_BYTES
        assert max(p.nbytes for p in kept) <= head.CHUNK_BYTES
