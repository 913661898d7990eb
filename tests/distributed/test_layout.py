"""`Layout`: cuts, shards, positions, balance and errors."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

import farlight as fl
from farlight.distributed import Layout

SHUFFLED = Layout([0, 3, 3, 7, 12, 20], [1, 0, 2, 1, 0])


@pytest.mark.parametrize("layout", [Layout.even(20, 3), Layout([0, 0, 20]), SHUFFLED, Layout([0, 20], [2], world=4)])
def test_shards_partition_the_sequence(layout: Layout) -> None:
    x = torch.arange(40).view(2, 20)
    shards = [layout.shard(x, 1, rank) for rank in range(layout.world)]
    assert [s.shape[1] for s in shards] == list(layout.lengths)
    ids = [layout.position_ids(rank) for rank in range(layout.world)]
    assert sorted(torch.cat(ids).tolist()) == list(range(20))
    for rank, (shard, position) in enumerate(zip(shards, ids, strict=True)):
        assert torch.equal(shard[0], position)
        assert set(layout.owner_of(position.numpy())) <= {rank}
        assert layout.local_index(position.numpy()).tolist() == list(range(len(position)))


def test_a_layout_is_a_value() -> None:
    again = pickle.loads(pickle.dumps(SHUFFLED))
    assert again == SHUFFLED
    assert hash(again) == hash(SHUFFLED)
    assert again != Layout.even(20, 3)
    assert eval(repr(SHUFFLED), {"Layout": Layout}) == SHUFFLED


def test_a_single_piece_is_a_view_and_gradients_flow() -> None:
    x = torch.zeros(1, 20, requires_grad=True)
    Layout.even(20, 4).shard(x, 1, 1).sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [0.0] * 5 + [1.0] * 5 + [0.0] * 10
    whole = torch.zeros(1, 20)
    assert Layout.even(20, 4).shard(whole, 1, 1).data_ptr() == whole[:, 5:].data_ptr()


def test_labels_are_shifted_before_they_are_sharded() -> None:
    labels = Layout.shift_labels(torch.arange(20)[None])
    shards = [Layout.even(20, 3).shard(labels, 1, rank) for rank in range(3)]
    assert torch.cat(shards, 1)[0].tolist() == [*range(1, 20), -100]


@pytest.mark.parametrize(
    "pattern, move",
    [
        (fl.causal() & fl.window(40, 0), "cheapest"),
        (fl.window(9) | fl.global_tokens([0, 1]), "cheapest"),
        (~fl.causal() | fl.sees_all([3]), "keys"),
    ],
)
def test_balanced_cuts_even_out_the_pairs_that_ranks_compute(pattern: fl.Pattern, move: str) -> None:
    layout = Layout.balanced(pattern, 2000, 5, heads=2, move=move)
    assert layout.n == 2000
    pairs = layout.communication(pattern, heads=2, head_dim=8, move=move).pairs
    assert pairs.sum() == pattern.count(2000, heads=2)
    assert pairs.max() < 1.1 * pairs.mean()


def test_plain_causal_attention_gets_head_and_tail_pieces() -> None:
    layout = Layout.balanced(fl.causal(), 1600, 4)
    assert layout.owners == (0, 1, 2, 3, 3, 2, 1, 0)
    assert set(layout.lengths) == {400}
    pairs = layout.communication(fl.causal(), heads=1, head_dim=8, move="keys").pairs
    assert pairs.max() == pairs.min()


def test_cuts_stay_at_multiples_of_a_block() -> None:
    layout = Layout.even(100, 3, multiple=16)
    assert layout.cuts == (0, 32, 64, 100)
    assert Layout.even(10, 4, multiple=16).cuts == (0, 0, 0, 0, 10)


def test_nothing_allowed_is_cut_evenly() -> None:
    assert Layout.balanced(fl.offsets([]), 10, 2) == Layout.even(10, 2)


def test_wrong_layouts_are_refused() -> None:
    for cuts in ([1, 2], [0], [0, 5, 3], [0, -1]):
        with pytest.raises(fl.ArgumentError, match=r"Layout: .*(must ascend from 0|must be a whole number)"):
            Layout(cuts)
    with pytest.raises(fl.ArgumentError, match="1 owners for the 2 pieces"):
        Layout([0, 1, 2], [0])
    with pytest.raises(fl.ArgumentError, match="rank 3 owns a piece, but there are 2 ranks"):
        Layout([0, 1], [3], world=2)
    with pytest.raises(fl.ArgumentError, match="is not the layout's 20 tokens"):
        SHUFFLED.shard(torch.zeros(1, 19), 1, 0)
    with pytest.raises(fl.ArgumentError, match="rank 3 is not one of the layout's 3"):
        SHUFFLED.position_ids(3)
    assert isinstance(SHUFFLED.owner_of(np.arange(3)), np.ndarray)
