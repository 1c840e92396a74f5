import math

import pytest
import torch

from fused_rlhf.objectives.value import value_loss, value_metrics


@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_by_cases_and_masked_nan(clip):
    generator = torch.Generator().manual_seed(0)
    v, r, old = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(4, 6, generator=generator) > 0.3
    v[~mask] = r[~mask] = old[~mask] = math.nan
    v.requires_grad_()
    total = 0.0
    for value, ret, before in zip(v[mask].tolist(), r[mask].tolist(), old[mask].tolist()):
        square = (value - ret) ** 2
        if clip:
            square = max(square, (min(max(value, before - clip), before + clip) - ret) ** 2)
        total += 0.5 * square
    loss = value_loss(v, r, old, mask, cliprange_value=clip)
    assert loss.item() == pytest.approx(total / mask.sum().item(), rel=1e-13)
    loss.backward()
    assert v.grad[mask].isfinite().all()
    assert (v.grad[~mask] == 0).all()
    metrics = value_metrics(v.detach(), r, old, mask, cliprange_value=clip)
    left = (r - v.detach())[mask]
    assert metrics["explained_variance"].item() == pytest.approx(1 - (left.var() / r[mask].var()).item(), rel=1e-12)
    with pytest.raises(ValueError, match="returns must have the shape of values"):
        value_loss(v, r[:2], old)
