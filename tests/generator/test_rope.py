"""Multi-scale Temporal RoPE: positions of tokens, and the effect of rotation on attention scores."""

from __future__ import annotations

import pytest
import torch

from kit.generator.rope import positions, rotary_table, rotate
from kit.scales import ScaleSchedule

SMALL = ScaleSchedule(2, ((1, 1), (2, 2)))


def test_positions_written_out():
    """The 5 condition tokens are at (i, i, i), the others at (f, y, x) + 5 on the raw grid of each scale."""
    assert positions(SMALL, 5).tolist() == [
        [0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3], [4, 4, 4],
        [5, 5, 5],
        [5, 5, 5], [5, 5, 6], [5, 6, 5], [5, 6, 6],
        [6, 5, 5],
        [6, 5, 5], [6, 5, 6], [6, 6, 5], [6, 6, 6],
    ]  # fmt: skip


def test_positions_without_a_condition_are_frame_row_column():
    schedule = ScaleSchedule(3, ((1, 2), (2, 3)))
    f, _, y, x = schedule.coordinates.unbind(1)
    assert torch.equal(positions(schedule, 0), torch.stack([f, y, x], 1).float())


def test_centred_grids_lie_in_the_middle_of_what_they_cover():
    schedule = ScaleSchedule(2, ((1, 1), (2, 2), (4, 8)))
    where = positions(schedule, 3, align="center") - 3
    time, y, x = where[3:].unbind(1)
    assert torch.equal(where[:3] + 3, torch.arange(3.0)[:, None].expand(3, 3))
    assert torch.equal(time, schedule.coordinates[:, 0].float())
    assert (y[0].item(), x[0].item()) == (1.5, 3.5)
    assert list(zip(y[1:5].tolist(), x[1:5].tolist())) == [(0.5, 1.5), (0.5, 5.5), (2.5, 1.5), (2.5, 5.5)]
    finest = schedule.block(0, 2).slice
    assert torch.equal(where[3:][finest], positions(schedule, 0)[finest])


def test_ordinary_positions_are_places_in_the_sequence():
    assert positions(SMALL, 5, align="sequence").tolist() == [[i, i, i] for i in range(15)]


def test_unknown_align_is_refused():
    with pytest.raises(ValueError, match="align=corner; expected one of: grid, center, sequence"):
        positions(SMALL, 5, align="corner")


@pytest.mark.parametrize("head_dim, shares", [(64, (8, 12, 12)), (80, (10, 15, 15)), (128, (16, 24, 24)), (8, (1, 1, 2))])
def test_every_pair_belongs_to_one_axis(head_dim, shares):
    """A shift along one axis rotates only that axis's pairs of channels; the three axes together have all pairs."""
    turned = []
    for axis in torch.eye(3):
        cos, sin = rotary_table(axis[None], head_dim)
        assert cos.shape == sin.shape == (1, head_dim // 2)
        turned.append((sin[0] != 0) | (cos[0] != 1))
    turned = torch.stack(turned)
    assert turned.sum(1).tolist() == list(shares)
    assert turned.sum(0).tolist() == [1] * (head_dim // 2)


def test_frequencies_fall_from_one_along_each_axis():
    _, sin = rotary_table(torch.ones(1, 3), 64)
    for share in sin[0].split([8, 12, 12]):
        frequency = share.arcsin()  # the first is sin(1 rad)
        assert frequency[0].item() == pytest.approx(1.0)
        ratios = frequency[1:] / frequency[:-1]
        torch.testing.assert_close(ratios, torch.full_like(ratios, 10_000 ** (-1 / len(share))), rtol=1e-3, atol=0)


def test_turning_keeps_lengths_and_the_origin():
    x = torch.randn(2, 3, 4, 64)
    where = torch.rand(4, 3) * 20
    where[0] = 0
    y = rotate(x, rotary_table(where, 64))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[:, :, 0], x[:, :, 0])
    assert not torch.allclose(y[:, :, 1:], x[:, :, 1:])
    assert rotate(x.bfloat16(), rotary_table(where, 64)).dtype == torch.bfloat16


def test_halves_turn_as_complex_numbers():
    """Channels i and i + head_dim / 2 are the real and the imaginary part; all turn to the same side."""
    x, (cos, sin) = torch.randn(2, 3, 4, 16), rotary_table(torch.rand(4, 3) * 20, 16)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.complex(cos, sin)
    torch.testing.assert_close(rotate(x, (cos, sin)), torch.cat([turned.real, turned.imag], -1))


def scores(q: torch.Tensor, k: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    table = rotary_table(where, q.shape[-1])
    return rotate(q, table) @ rotate(k, table).transpose(-1, -2)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_scores_depend_on_relative_positions_only(head_dim):
    q, k = torch.randn(2, 1, 1, 6, head_dim)
    where = torch.randint(0, 9, (6, 3)).float()
    base = scores(q, k, where)
    torch.testing.assert_close(scores(q, k, where + torch.tensor([3.0, 5.0, 7.0])), base, atol=1e-3, rtol=1e-3)
    for axis in torch.eye(3):  # but each axis counts
        moved = where.clone()
        moved[1] += axis
        assert not torch.allclose(scores(q, k, moved)[..., 0, 1], base[..., 0, 1], atol=1e-3)
