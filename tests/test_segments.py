import torch

from fused_rlhf.segments import Sequences
from tests.helpers import worst


def test_sums_and_means_over_ragged_and_empty_sequences():
    index = torch.tensor([0, 0, 0, 2, 2, 4])
    sequences = Sequences.of(index, 6)
    assert sequences.offsets.tolist() == [0, 3, 3, 5, 5, 6, 6]
    assert sequences.lengths.tolist() == [3, 0, 2, 0, 1, 0]
    x = torch.randn(6, dtype=torch.float64).requires_grad_()
    expected = torch.stack([x[:3].sum(), x[:0].sum(), x[3:5].sum(), x[:0].sum(), x[5], x[:0].sum()])
    assert worst(sequences.sum(x), expected) < 1e-15
    assert worst(sequences.mean(x), expected / torch.tensor([3, 1, 2, 1, 1, 1])) < 1e-15
    assert torch.equal(sequences.spread(sequences.sum(x)), sequences.sum(x)[index])
    assert torch.autograd.gradcheck(lambda v: sequences.spread(sequences.mean(v)).square(), [x])


def test_no_tokens_and_no_sequences_stay_differentiable():
    none = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    for count in (0, 3):
        total = Sequences.of(torch.zeros(0, dtype=torch.int64), count).sum(none)
        assert total.shape == (count,)
        total.sum().backward()
