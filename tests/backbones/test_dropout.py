"""Masks are random where they should be, and depend on nothing that they should not."""

import pytest
import torch
from torch import Tensor

from unipelt_cli.backbones.dropout import Dropout, DropoutKeys, DropoutSource

CPU = torch.device("cpu")


def dropped(shape: tuple[int, ...], keys: DropoutKeys | None = None, p: float = 0.1) -> Tensor:
    """Return 1 where a mask drops and 0 where it keeps."""
    dropout = Dropout(p, DropoutSource())
    mask = dropout.mask(keys or dropout.draws.next(shape[0]), shape, CPU)
    assert set(mask.unique().tolist()) == {-1, 0}
    return (mask == 0).float()


def correlation(table: Tensor) -> float:
    """Return the mean square of the correlations of columns, times the rows: 1 where none is."""
    table = (table - table.mean(0)) / table.std(0)
    correlations = table.T @ table / len(table)
    return float(correlations.fill_diagonal_(0).square().mean()) * len(table)


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_it_drops_the_share_it_should_and_keeps_the_mean(p: float, kind: torch.dtype) -> None:
    dropout = Dropout(p, DropoutSource())
    torch.manual_seed(0)
    x = torch.ones(1001, 1003, dtype=kind, requires_grad=True)
    y = dropout(x)
    assert float((y == 0).float().mean()) == pytest.approx(p, abs=0.002)
    assert float(y.detach().float().mean()) == pytest.approx(1, abs=0.003)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert not torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x
    assert Dropout(0.0, DropoutSource())(x) is x


def test_what_is_dropped_has_no_pattern() -> None:
    torch.manual_seed(1)
    table = dropped((64, 53, 384)).view(-1, 384)
    assert correlation(table) == pytest.approx(1, abs=0.05), "columns know of each other"
    assert correlation(table[:2000].T) == pytest.approx(1, abs=0.05), "tokens know of each other"
    assert float(table.sum(1).var()) == pytest.approx(384 * 0.09, rel=0.1)
    assert float(table.sum(0).var()) == pytest.approx(len(table) * 0.09, rel=0.25)
    draws = torch.stack([dropped((4, 8, 32)).flatten() for _ in range(500)])
    assert correlation(draws) == pytest.approx(1, abs=0.05), "places know of each other"
    assert correlation(draws.T) == pytest.approx(1, abs=0.05), "draws know of each other"
    centred = table - table.mean()
    corners = centred[::2, ::2] * centred[1::2, ::2] * centred[::2, 1::2] * centred[1::2, 1::2]
    assert abs(float(corners.mean())) < 5 * 0.09**2 / corners.numel() ** 0.5


def test_a_row_has_the_same_mask_whatever_it_is_padded_to_and_beside_whom() -> None:
    keys = DropoutSource().next(6)
    whole = dropped((6, 3, 20, 27), keys)
    assert torch.equal(dropped((6, 3, 31, 40), keys)[:, :, :20, :27], whole)
    some = torch.tensor([4, 1])
    assert torch.equal(dropped((2, 3, 20, 27), keys.take(some)), whole[some])
    assert not torch.equal(whole[0], whole[1])


def test_several_runs_in_one_pass_draw_what_each_draws_alone() -> None:
    together, seeds, counts = DropoutSource(), (5, 9), (3, 2)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with together.of(generators, counts):
        first, second = together.next(5), together.next(5)
    start = 0
    for seed, count in zip(seeds, counts, strict=True):
        torch.manual_seed(seed)
        alone = DropoutSource()
        for keys in (first, second):
            own = keys.take(torch.arange(start, start + count))
            expected = dropped((count, 7, 9), alone.next(count))
            assert torch.equal(dropped((count, 7, 9), own), expected)
        start += count
    assert together.next(5).rows.shape == (5,), "the global generator is used again"
