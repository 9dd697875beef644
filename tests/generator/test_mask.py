"""Who sees whom: the rule against a table, and the Random Frame Mask against its probabilities."""

from __future__ import annotations

import pytest
import torch

from kit.draws import Draws
from kit.generator import mask as masks
from kit.generator.mask import CONDITION, attention_views, draw_kept_frames, visible
from kit.scales import ScaleSchedule


@pytest.fixture(autouse=True, params=["whole", "by frame"])
def views(request, monkeypatch):
    """Runs a test with one view of all tokens and with a view per frame."""
    if request.param == "by frame":
        monkeypatch.setattr(masks, "SHORT", 0)


SCHEDULE = ScaleSchedule(4, ((1, 1), (1, 2), (2, 2)))
S = 2


def tokens() -> list[tuple[int, int]]:
    """Returns (f, k) of every token, the condition first."""
    return [(CONDITION, 0)] * S + [(b.f, b.k) for b in SCHEDULE.blocks for _ in range(b.h * b.w)]


def attention_mask(schedule, S, window=None, kept=None):
    """Joins the views to one mask: (S + L, S + L), or (B, 1, S + L, S + L) with `kept`."""
    tokens = S + schedule.length
    mask = torch.zeros(*(() if kept is None else (len(kept), 1)), tokens, tokens, dtype=torch.bool)
    views = attention_views(schedule, S, schedule.length, window, kept)
    assert [view.queries.start for view in views[1:]] == [view.queries.stop for view in views[:-1]]
    for view in views:
        part = mask[..., view.queries, :]
        part[..., view.keys] = True if view.mask is None else view.mask
        assert kept is not None or part[..., view.keys].any(0).all(), "keys that no query sees"
    assert views[0].queries.start == 0 and views[-1].queries.stop == tokens
    return mask


def may_see(query: tuple[int, int], key: tuple[int, int], window: int | None) -> bool:
    """Returns whether a query may see a key, by the rule as written in the method."""
    if key[0] == CONDITION:
        return True
    if query[0] == CONDITION or key[0] > query[0]:
        return False
    if key[0] == query[0]:
        return key[1] <= query[1]
    return window is None or query[0] - key[0] <= window


@pytest.mark.parametrize("window", [None, 0, 1, 2, 9])
def test_mask_is_the_rule_for_every_pair(window):
    expected = [[may_see(q, k, window) for k in tokens()] for q in tokens()]
    mask = attention_mask(SCHEDULE, S, window)
    assert mask.shape == (S + SCHEDULE.length,) * 2 and mask.dtype == torch.bool
    assert mask.tolist() == expected


def test_truth_table_written_out():
    """What blocks (2, 1) and (2, 0) see of the condition and of all blocks of four frames with two scales."""
    f = torch.tensor([CONDITION, 0, 0, 1, 1, 2, 2, 3, 3])
    k = torch.tensor([0, 0, 1, 0, 1, 0, 1, 0, 1])
    query = torch.tensor(2), torch.tensor(1)
    assert visible(*query, f, k).tolist() == [True] * 7 + [False] * 2
    assert visible(*query, f, k, window=1).tolist() == [True, False, False] + [True] * 4 + [False] * 2
    assert visible(*query, f, k, window=0).tolist() == [True] + [False] * 4 + [True] * 2 + [False] * 2
    assert visible(torch.tensor(2), torch.tensor(0), f, k).tolist() == [True] * 6 + [False] * 3


def may_see_with_history(query: tuple[int, int], key: tuple[int, int], window: int | None) -> bool:
    """Does the same for full history: block (f, 3) repeats frame f and is the only block of it that later frames see."""
    if key[0] == CONDITION or query[0] == CONDITION:
        return key[0] == CONDITION
    if query[1] == 3:  # a history block
        return key == query or (key[1] == 3 and key[0] < query[0] and (window is None or query[0] - key[0] < window))
    if key[0] == query[0]:
        return key[1] <= query[1]
    return key[1] == 3 and key[0] < query[0] and (window is None or query[0] - key[0] <= window)


@pytest.mark.parametrize("kept", [None, [[True, False, True, True], [False] * 4]])
@pytest.mark.parametrize("window", [None, 0, 1, 2, 9])
def test_full_history_is_the_rule_for_every_pair(window, kept):
    layout = SCHEDULE.with_history()
    places = [(CONDITION, 0)] * S + [(b.f, b.k) for b in layout.blocks for _ in range(b.h * b.w)]
    mask = attention_mask(layout, S, window, None if kept is None else torch.tensor(kept))
    for sample, row in enumerate(kept or [[True] * 4]):
        expected = [
            [may_see_with_history(q, k, window) and (k[0] in (CONDITION, q[0]) or row[k[0]]) for k in places] for q in places
        ]
        assert (mask if kept is None else mask[sample, 0]).tolist() == expected


def test_without_a_condition():
    assert torch.equal(attention_mask(SCHEDULE, 0), attention_mask(SCHEDULE, S)[S:, S:])


def test_where_all_is_seen_there_is_no_mask(monkeypatch):
    """With one block per frame a view has a mask only where frames are dropped; its keys are a slice."""
    monkeypatch.setattr(masks, "SHORT", 0)
    schedule, nothing_dropped = ScaleSchedule(3, ((2, 2),)), torch.ones(1, 3, dtype=torch.bool)
    for kept, masked in ((None, [False] * 4), (nothing_dropped, [False, False, True, True])):
        found = attention_views(schedule, S, schedule.length, kept=kept)
        assert [view.mask is not None for view in found] == masked
        assert [view.keys for view in found] == [slice(0, n) for n in (2, 6, 10, 14)]


def test_masks_of_long_sequences_are_not_kept(monkeypatch):
    found = {}
    for short in (100, 0):
        monkeypatch.setattr(masks, "SHORT", short)
        found[short] = [attention_views(SCHEDULE, S, SCHEDULE.length)[-1].mask for _ in range(2)]
    assert found[100][0] is found[100][1] and found[0][0] is not found[0][1]


def test_a_sequence_ends_with_a_block():
    assert attention_views(SCHEDULE, S, 3)[-1].queries.stop == S + 3
    with pytest.raises(ValueError, match="2 tokens end within a block of 4 latent frames"):
        attention_views(SCHEDULE, S, 2)


@pytest.mark.parametrize("window", [None, 2])
def test_frame_mask_hides_whole_frames_from_later_frames_alone(window):
    """Compares every sample with the rule; the condition and a frame's own blocks are never dropped."""
    kept = torch.tensor([[True] * 4, [False] * 4, [True, False, True, True], [False, True, False, False]])
    mask = attention_mask(SCHEDULE, S, window, kept)
    assert mask.shape == (4, 1, S + SCHEDULE.length, S + SCHEDULE.length)
    for sample, row in enumerate(kept.tolist()):
        expected = [[may_see(q, k, window) and (k[0] in (CONDITION, q[0]) or row[k[0]]) for k in tokens()] for q in tokens()]
        assert mask[sample, 0].tolist() == expected
    assert torch.equal(mask[0, 0], attention_mask(SCHEDULE, S, window))
    assert mask.any(-1).all()  # no query is left with nothing to see


@pytest.mark.parametrize("p_mask", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("window", [None, 1])
def test_measured_visibility_of_past_frames(p_mask, window):
    """The share of samples in which frame f sees frame g < f is 1 - p_mask inside the window, within 4 standard errors."""
    n, schedule = 3000, ScaleSchedule(4, ((1, 1),))
    kept = draw_kept_frames(4, p_mask, Draws(0, range(n)))
    share = attention_mask(schedule, 1, window, kept)[:, 0].float().mean(0)
    bound = 4 * (p_mask * (1 - p_mask) / n) ** 0.5 + 1e-6
    for f in range(4):
        assert share[1 + f, 0] == 1 and share[1 + f, 1 + f] == 1
        for g in range(4):
            if g < f and (window is None or f - g <= window):
                assert abs(share[1 + f, 1 + g] - (1 - p_mask)) <= bound
            elif g != f:
                assert share[1 + f, 1 + g] == 0


def test_frames_are_dropped_independently():
    """The drops of two frames are uncorrelated over samples, within 5 standard errors."""
    kept = draw_kept_frames(3, 0.3, Draws(1, range(5000))).float()
    correlation = torch.corrcoef(kept.T)
    assert (correlation - torch.eye(3)).abs().max() < 5 / 5000**0.5


def test_frame_mask_is_reproducible():
    draws = [draw_kept_frames(5, 0.5, Draws(s, range(50))) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
