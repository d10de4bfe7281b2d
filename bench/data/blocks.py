"""Fixed-length samples of a token stream in memory, as torch data sets that return whole batches.

Shape suffixes: B samples, L length, S stride, N targets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bench.data.tokenizer import Split
from gnnmoe.config import Refused
from gnnmoe.head import IGNORED
from gnnmoe.seeds import stream_seed


class TrainBlocks(Dataset[dict[str, Tensor]]):
    """Full, disjoint blocks: block i has the inputs ``stream[i·L : i·L + L]`` and the targets one later.

    ``indices`` holds the numbers of the blocks that are served. ``note`` is a message if fewer blocks are
    served than were asked for, else None.
    """

    def __init__(self, split: Split, length: int) -> None:
        _require_one_block(split, length)
        self.length = length
        self.note: str | None = None
        self._windows = torch.from_numpy(split.stream).unfold(0, length + 1, length)  # (blocks, L + 1) view
        self.indices = torch.arange(len(self._windows))

    @classmethod
    def subset(cls, split: Split, length: int, num_samples: int, seed: int) -> TrainBlocks:
        """Return ``num_samples`` random blocks: the first blocks of one permutation per seed.

        So a larger subset contains a smaller one, and a subset is the same in every epoch.
        """
        require_at_least("num_samples", num_samples, 1)
        blocks = cls(split, length)
        if num_samples >= len(blocks):
            blocks.note = _shortage(split, num_samples, len(blocks), length)
            return blocks
        order = np.random.default_rng(stream_seed(seed, "data.subset")).permutation(len(blocks))
        blocks.indices = torch.from_numpy(order[:num_samples])
        return blocks

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one sample: ``input_ids`` and ``targets``, each (L,) int64."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch: ``input_ids`` and ``targets``, each (B, L) int64."""
        tokens = self._windows[self.indices[torch.as_tensor(indices)]]
        # Not contiguous(): for one sample it returns a view, and inputs and targets would share their memory.
        form = torch.contiguous_format
        return {
            "input_ids": tokens[:, :-1].clone(memory_format=form),
            "targets": tokens[:, 1:].clone(memory_format=form),
        }


class EvalWindows(Dataset[dict[str, Tensor]]):
    """Windows that score each of the first ``num_scored`` targets exactly once.

    Window k starts at k·S. The first window scores its L targets. Each later window scores its last S
    targets, with L − S tokens of context. Other targets are −100, and inputs past the end are ``<eos>``.
    ``num_blocks`` keeps the first ``num_blocks`` · L targets; None keeps all. ``note`` is a message if there
    are fewer, else None.
    """

    def __init__(self, split: Split, length: int, stride: int, num_blocks: int | None = None) -> None:
        _require_one_block(split, length)
        if not 1 <= stride <= length:
            raise Refused(f"stride must lie in 1..{length} (max_seq_length); got {stride}")
        self.split, self.length, self.stride = split, length, stride
        self.note: str | None = None
        self.num_scored = split.num_tokens
        if num_blocks is not None:
            require_at_least("the number of evaluation blocks", num_blocks, 1)
            self.num_scored = min(num_blocks * length, split.num_tokens)
            self.note = _shortage(split, num_blocks, -(-split.num_tokens // length), length)
        self._windows = 1 - (length - self.num_scored) // stride  # 1 + ceil((N − L) / S)
        # Both are padded to the end of the last window; <eos> is the token in front of every stream.
        padded = (self._windows - 1) * stride + length
        inputs = np.full(padded, split.stream[0])
        targets = np.full(padded, IGNORED, dtype=np.int64)
        inputs[: self.num_scored] = split.stream[: self.num_scored]
        targets[: self.num_scored] = split.stream[1 : 1 + self.num_scored]
        self._inputs = torch.from_numpy(inputs).unfold(0, length, stride)  # (windows, L) view
        self._targets = torch.from_numpy(targets).unfold(0, length, stride)

    def __len__(self) -> int:
        return self._windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one window: ``input_ids`` and ``targets``, each (L,) int64."""
        return {key: value[0] for key, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch: ``input_ids`` and ``targets``, each (B, L) int64."""
        chosen = torch.as_tensor(indices)
        targets = self._targets[chosen]
        context = torch.arange(self.length) < self.length - self.stride
        targets[(chosen % self._windows > 0)[:, None] & context] = IGNORED
        return {"input_ids": self._inputs[chosen], "targets": targets}

    def target_numbers(self, windows: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the numbers of the targets that ``windows`` score, in order, (targets,) int64.

        With these numbers the losses of several ranks can be put back in the order of the text.
        """
        first = [0 if window == 0 else self.length + (window - 1) * self.stride for window in windows]
        ends = [min(self.length + window * self.stride, self.num_scored) for window in windows]
        empty = np.empty(0, dtype=np.int64)
        return np.concatenate([empty, *map(np.arange, first, ends)])

    def document_ids(self) -> np.ndarray:
        """Return the document number of each scored target, (num_scored,) int64."""
        return self.split.document_ids()[: self.num_scored]


def batch_bytes(batch_size: int, length: int) -> int:
    """Return the bytes of one batch: inputs and targets, (B, L) int64 each."""
    return 2 * batch_size * length * 8


def _require_one_block(split: Split, length: int) -> None:
    require_at_least("max_seq_length", length, 1)
    if split.num_tokens < length:
        raise Refused(
            f"the {split.name} split has {split.num_tokens} tokens, one block needs {length}; "
            "use a smaller max_seq_length or a larger corpus"
        )


def require_at_least(what: str, value: int, least: int) -> int:
    """Return ``value``.

    Raises:
        Refused: it is below ``least``.
    """
    if value < least:
        raise Refused(f"{what} must be {least} or more; got {value}")
    return value


def _shortage(split: Split, asked: int, available: int, length: int) -> str | None:
    if asked <= available:
        return None
    return (
        f"You asked for {asked:,} {split.name} blocks of {length} tokens; only {available:,} exist. "
        f"Using all {available:,}."
    )
