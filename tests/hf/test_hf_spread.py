"""Hugging Face decoders with their sequence over ranks: `fl.hf.sparsify(model, pattern, mesh=…)` and the collator."""

from __future__ import annotations

import pytest
import spread_models
import torch
from ranks import in_ranks

import farlight as fl
from farlight.distributed import Layout
from farlight.hf.spread import Spread, attend_spread

pytest.importorskip("transformers")


def test_losses_and_gradients_are_those_of_one_process() -> None:
    assert in_ranks(2, spread_models.losses_and_gradients_are_those_of_one_process) == [16, 16]


def test_routers_choose_as_in_one_process() -> None:
    assert in_ranks(2, spread_models.routers_choose_as_in_one_process) == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_models_and_routers_on_more_ranks(world: int) -> None:
    assert in_ranks(world, spread_models.losses_and_gradients_are_those_of_one_process, seconds=600) == [16] * world
    assert in_ranks(world, spread_models.routers_choose_as_in_one_process, seconds=600) == [3] * world


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["DDP", "FSDP2", "accelerate"])
def test_gradients_beside_data_parallelism(kind: str) -> None:
    if kind == "accelerate":
        pytest.importorskip("accelerate")
    assert min(in_ranks(4, spread_models.gradients_beside_data_parallelism, kind, seconds=600)) > 10


def test_a_mask_that_hides_tokens_is_refused() -> None:
    collate = fl.hf.sequence_collator(Layout.even(4, 2), 0)
    with pytest.raises(fl.ArgumentError, match="the attention_mask hides tokens"):
        collate({"input_ids": torch.zeros(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])})


def test_biases_made_for_a_shard_are_refused() -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(fl.UnsupportedError, match="Identity has key_bias made for its shard, which says nothing of the tokens"):
        attend_spread(
            torch.nn.Identity(), Spread(None), fl.causal(), q, q, q, None, scale=None, dropout=0.0, backend="auto", sinks=None,
            score=fl.score.softcap(2.0) + fl.score.key_bias(torch.zeros(1, 1, 4)),
        )  # fmt: skip


def test_a_layout_without_a_mesh_is_refused() -> None:
    with pytest.raises(fl.ArgumentError, match="pass mesh=, too"):
        fl.hf.sparsify(torch.nn.Linear(1, 1), layout=Layout.even(4, 2))
