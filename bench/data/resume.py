"""Where a training loader stands, and going back there."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.utils.data import DataLoader

from bench.data.block_loader import BlockLoader, check_unchanged
from bench.data.blocks import TrainBlocks

_SAME = {
    "max_seq_length": "the same max_seq_length",
    "seed": "the same seed",
    "num_samples": "the same number of training samples",
}


def loader_state(loader: DataLoader[Any], samples_consumed: int) -> dict[str, Any]:
    """Return what ``resume_loader`` needs, ready for JSON.

    ``samples_consumed``: the samples of this epoch that were trained on, over all ranks, counted from
    the epoch's beginning. Raises ValueError outside 0..samples of the epoch and for an evaluation.
    """
    loader = _training(loader)
    samples = loader.sampler_obj.samples_in(loader.sampler_obj.epoch)
    if not 0 <= samples_consumed <= samples:
        raise ValueError(
            f"samples_consumed must lie in 0..{samples}, the samples of epoch {loader.sampler_obj.epoch}; "
            f"got {samples_consumed}"
        )
    return _identity(loader) | {
        "epoch": loader.sampler_obj.epoch,
        "samples_consumed": samples_consumed,
        "order_sha256": _order_sha256(loader),
    }


def resume_loader(loader: DataLoader[Any], state: dict[str, Any]) -> None:
    """Let a loader go on after the samples that ``state`` counts, at its own batch size and world size.

    The rest of the epoch is served in the same order; later epochs are whole.

    Raises:
        ValueError: another corpus, length, seed, subset or curriculum, or a state that is incomplete.
    """
    loader = _training(loader)
    own = _identity(loader)
    missing = sorted({*own, "epoch", "samples_consumed", "order_sha256"} - set(state))
    if missing:
        raise ValueError(f"the state of the loader lacks {', '.join(missing)}; take it by loader_state")
    if own["vocabulary_sha256"] != state["vocabulary_sha256"]:
        raise ValueError(
            f"cannot resume with the vocabulary of another corpus: {_two(own, state, 'vocabulary')}"
        )
    if own["corpus_sha256"] != state["corpus_sha256"]:
        raise ValueError(f"cannot resume on another corpus: {_two(own, state, 'corpus')}")
    for name, remedy in _SAME.items():
        if own[name] != state[name]:
            raise ValueError(f"cannot resume: {name} was {state[name]} and is {own[name]}; use {remedy}")
    sampler = loader.sampler_obj
    before = sampler.epoch, sampler.start
    sampler.move_to(state["epoch"])
    if _order_sha256(loader) != state["order_sha256"]:
        sampler.move_to(before[0])
        sampler.start = before[1]
        raise ValueError(
            f"cannot resume: the order of epoch {state['epoch']} differs; use the same curriculum"
        )
    sampler.start = state["samples_consumed"]
    loader.agree(f"resumed after {sampler.start} samples")


def _training(loader: DataLoader[Any]) -> BlockLoader:
    checked = check_unchanged(loader)
    if not isinstance(checked.dataset, TrainBlocks):
        raise ValueError("only a training loader has a place to resume at; an evaluation begins anew")
    return checked


def _identity(loader: BlockLoader) -> dict[str, Any]:
    return {
        "corpus": loader.corpus.name,
        "corpus_sha256": loader.corpus.sha256,
        "vocabulary_sha256": loader.corpus.vocabulary.sha256,
        "max_seq_length": loader.dataset_obj.length,
        "seed": loader.sampler_obj.seed,
        "num_samples": loader.sampler_obj.num_samples,
    }


def _order_sha256(loader: BlockLoader) -> str:
    return hashlib.sha256(loader.sampler_obj.order().astype("<i8").tobytes()).hexdigest()


def _two(own: dict[str, Any], state: dict[str, Any], what: str) -> str:
    then, now = (f"{found['corpus']} ({found[f'{what}_sha256'][:12]})" for found in (state, own))
    return f"it was {then} and is {now}; load the same data set with the same tokenizer"
