from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from bench.data.blocks import IGNORED, EvalWindows, TrainBlocks

pytestmark = pytest.mark.core("loader")


def test_training_blocks_by_hand(make_split):
    blocks = TrainBlocks(make_split(11), 4)  # the last 3 targets fill no block
    batch = blocks.__getitems__([1, 0])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert batch["targets"].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert len(blocks) == 2
    assert blocks[1]["targets"].tolist() == [5, 6, 7, 8]
    for tensor in batch.values():
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 2 * 4 * 8


def test_subsets_are_nested_and_belong_to_the_seed(make_split):
    """E1: subsets are nested (10k ⊂ 20k) and fixed by the seed."""
    split = make_split(400)
    small, large = (TrainBlocks.subset(split, 4, n, seed=3).indices.tolist() for n in (10, 20))
    assert large[:10] == small
    assert len(set(large)) == 20
    assert TrainBlocks.subset(split, 4, 20, seed=4).indices.tolist() != large


def test_more_blocks_than_there_are(make_split):
    """E1: more asked for than there are: all of them, said once."""
    blocks = TrainBlocks.subset(make_split(43), 4, 11, seed=0)
    assert len(blocks) == 10
    assert blocks.note == "You asked for 11 train blocks of 4 tokens; only 10 exist. Using all 10."
    assert TrainBlocks.subset(make_split(43), 4, 10, seed=0).note is None
    windows = EvalWindows(make_split(43, "test"), 4, 4, num_blocks=12)
    assert windows.num_scored == 43
    assert windows.note == "You asked for 12 test blocks of 4 tokens; only 11 exist. Using all 11."
    assert EvalWindows(make_split(43), 4, 4, num_blocks=11).note is None


def test_windows_by_hand(make_split):
    windows = EvalWindows(make_split(9), 4, 2)
    batch = windows.__getitems__(range(len(windows)))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 0]]
    assert batch["targets"].tolist() == [
        [1, 2, 3, 4],
        [IGNORED, IGNORED, 5, 6],
        [IGNORED, IGNORED, 7, 8],
        [IGNORED, IGNORED, 9, IGNORED],
    ]
    assert windows.document_ids().tolist() == [0] * 4 + [1] * 5
    assert windows[1]["targets"].tolist() == [IGNORED, IGNORED, 5, 6]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), length=st.integers(1, 12), extra=st.integers(0, 60), batch=st.integers(1, 9))
def test_each_target_is_scored_once_in_order(make_split, data, length, extra, batch):
    """C5, C12: for any count, length, stride and batch, with the full context that the stride leaves."""
    split = make_split(length + extra)
    stride = data.draw(st.integers(1, length))
    blocks = data.draw(st.none() | st.integers(1, 8))
    windows = EvalWindows(split, length, stride, blocks)
    loader = DataLoader(windows, batch_size=batch, collate_fn=lambda item: item)
    scored, seen = [], 0
    for item in loader:
        inputs, targets = item["input_ids"], item["targets"]
        used = targets != IGNORED
        assert inputs.shape == targets.shape == (len(inputs), length)
        assert torch.equal(inputs[used], targets[used] - 1)  # the synthetic stream counts up
        assert used.any(dim=1).all()
        scored += targets[used].tolist()
        seen += len(inputs)
    assert scored == list(range(1, windows.num_scored + 1))
    assert windows.num_scored == min(split.num_tokens, (blocks or 10**6) * length)
    assert len(windows.document_ids()) == windows.num_scored
    assert seen == len(windows)


@pytest.mark.parametrize("stride", [0, 5])
def test_stride_out_of_range(make_split, stride):
    with pytest.raises(ValueError, match=rf"stride must lie in 1..4 \(max_seq_length\); got {stride}"):
        EvalWindows(make_split(9), 4, stride)


def test_split_too_small_for_a_block(make_split):
    message = "train split has 7 tokens, one block needs 8; use a smaller max_seq_length or a larger corpus"
    with pytest.raises(ValueError, match=message):
        TrainBlocks(make_split(7), 8)
    with pytest.raises(ValueError, match=message):
        EvalWindows(make_split(7), 8, 8)


def test_wikitext_blocks(wikitext):
    """A2: 16,317 training blocks, 1,700 full validation blocks and one of 46."""
    train = TrainBlocks(wikitext.splits["train"], 128)
    assert len(train) == 16_317
    windows = EvalWindows(wikitext.splits["validation"], 128, 128)
    targets = windows.__getitems__(range(len(windows)))["targets"]
    scored = (targets != IGNORED).sum(dim=1)
    assert scored[:-1].tolist() == [128] * 1_700
    assert scored[-1] == 46
    assert np.array_equal(targets[targets != IGNORED].numpy(), wikitext.splits["validation"].stream[1:])
