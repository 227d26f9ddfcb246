import copy

import pytest
import torch

from muon import Muon, orthogonal, orthogonal_long


def matrices(seed=0):
    torch.manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape))
        for shape in [(32, 32), (32, 32), (96, 32), (96, 32), (32, 96)]
    ]


def test_orthogonal_brings_all_singular_values_near_1_and_keeps_the_directions():
    torch.manual_seed(0)
    x = torch.randn(3, 16, 40) * torch.logspace(0, -1, 16)[:, None]
    made = orthogonal(x)
    values = torch.linalg.svdvals(made)
    assert torch.linalg.svdvals(x).min() < 0.5
    assert 0.65 < values.min()
    assert values.max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    # Diagonal, if the directions are x's own.
    within = u.mT @ made @ v.mT
    assert (within - torch.diag_embed(within.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3


def test_long_matrices_take_the_shorter_way_to_the_same_result():
    x = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x /= x.norm(dim=(1, 2), keepdim=True)
    assert torch.allclose(orthogonal_long(x), orthogonal(x, torch.float64), atol=1e-9)
    assert torch.allclose(orthogonal(x.float()).double(), orthogonal(x, torch.float64), atol=1e-4)


def test_a_matrix_of_zeros_stays_zeros():
    assert torch.equal(orthogonal(torch.zeros(1, 8, 8)), torch.zeros(1, 8, 8))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_ten_steps_are_torchs_own_muons(decay):
    ours, theirs = matrices(), matrices()
    optimizers = [
        Muon(ours, 0.02, decay, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, 0.02, decay, adjust_lr_fn="match_rms_adamw"),
    ]
    for step in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for begin, p, q in zip(matrices(), ours, theirs):
        assert (q - begin).norm() > 0.5 and (p - q).norm() < 0.02 * (q - begin).norm()


@pytest.mark.parametrize("shape", [(8, 32, 96), (8, 128, 128), (2, 256, 256)])
def test_no_singular_value_is_thrown_far_by_bfloat16(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    full, half = orthogonal(x), orthogonal(x, torch.bfloat16)
    assert full.dtype == torch.float32
    assert half.dtype == torch.bfloat16
    assert not torch.equal(full, half.float())
    assert torch.linalg.svdvals(full).max() < 1.25
    assert torch.linalg.svdvals(half.float()).max() < 1.3


def test_what_has_no_gradient_stays_and_what_was_saved_goes_on():
    ours, again = matrices(), matrices()
    first, second = Muon(ours, 0.02), Muon(again, 0.02)
    for p in ours[1:]:
        p.grad = torch.ones_like(p)
    before = ours[0].clone()
    first.step()
    assert torch.equal(ours[0], before) and not torch.equal(ours[1], matrices()[1])
    for p, q in zip(ours, again):
        q.data.copy_(p)
        q.grad = None if p.grad is None else p.grad.clone()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, again))
