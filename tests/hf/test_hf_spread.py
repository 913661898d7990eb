"""Hugging Face decoders with their sequence over ranks: `fl.hf.sparsify(model, pattern, mesh=…)` and the collator."""

from __future__ import annotations

import pytest
import spread_models
import torch
from ranks import in_ranks

import farlight as fl
from farlight.distributed import Layout

pytest.importorskip("transformers")


def test_losses_and_gradients_are_those_of_one_process() -> None:
    assert in_ranks(2, spread_models.losses_and_gradients_are_those_of_one_process) == [8, 8]


def test_a_mask_that_hides_tokens_is_refused() -> None:
    collate = fl.hf.sequence_collator(Layout.even(4, 2), 0)
    with pytest.raises(fl.ArgumentError, match="the attention_mask hides tokens"):
        collate({"input_ids": torch.zeros(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])})


def test_a_layout_without_a_mesh_is_refused() -> None:
    with pytest.raises(fl.ArgumentError, match="pass mesh=, too"):
        fl.hf.sparsify(torch.nn.Linear(1, 1), layout=Layout.even(4, 2))
