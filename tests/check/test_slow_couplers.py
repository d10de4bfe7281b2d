"""Where a forward takes long, token isolation is checked in fewer, and still for every pair of tokens."""

import re
from collections import Counter

import pytest
import torch

from bench.check import isolation
from bench.check.isolation import divisions
from bench.check.subject import CheckFailed, Subject
from gnnmoe.config import GNNMoEConfig
from tests.check.slow_couplers import CALLS, SHORT

HERE, WRONG = "tests.check.slow_couplers:", "tests.check.couplers:"
LENGTH = 12


@pytest.fixture
def slow(monkeypatch):
    """Take every coupler for slow."""
    monkeypatch.setattr(isolation, "SLOW", 0.0)
    monkeypatch.setattr(isolation, "SHORT", SHORT)


def check(coupler: str, length: int = LENGTH, **fields) -> str:
    fields = {"embed_dim": 8, "num_heads": 2, "max_seq_length": length, **fields}
    config = GNNMoEConfig(coupler_type=coupler, **fields)
    return isolation.token_isolation(Subject(config, 0, torch.device("cpu")))


@pytest.mark.parametrize("tokens", [1, 2, 7, 26, 256])
def test_every_ordered_pair_has_two_forwards_that_tell(tokens):
    versions = divisions(tokens).T
    assert {len(set(row)) for row in versions.tolist()} == {3}
    same = versions[:, :, None] == versions[:, None, :]  # (N, R, R)
    told = (same[:, None] & ~same[None, :]).flatten(2).any(-1)
    assert torch.equal(told, ~torch.eye(tokens, dtype=torch.bool))


def test_seven_forwards_are_enough_for_256_tokens_and_nine_for_2048():
    assert [len(divisions(tokens)) for tokens in (1, 256, 301, 302, 2048)] == [3, 7, 7, 8, 9]


@pytest.mark.parametrize("coupler", ["mean", "gate", "GNN", "HGNN", WRONG + "NoisyInTraining"])
def test_honest_couplers_pass(slow, coupler):
    modes = "in each mode" if "Noisy" in coupler else "in eval and train mode by turns"
    assert check(coupler).startswith("24 tokens: no output moves with another token's")
    assert re.search(
        rf"slow, so values by \d forwards,? {modes}, gradients at length {SHORT}\)", check(coupler)
    )


@pytest.mark.parametrize(
    ("coupler", "text"),
    [
        (WRONG + "HiddenLeak", "sees the expert outputs of token 1 of sequence 0 (its future)"),
        (WRONG + "BatchNorm", "(in train mode only)"),
        (WRONG + "PastMixing", "causal but not token-isolated: it mixes a token's own past; refused"),
        (WRONG + "InputLeak", "sees the layer input of token 3 of sequence 0 (its future)"),
        (WRONG + "AcrossBatch", "sees the expert outputs of token 0 of sequence 1 (another sequence)"),
        (WRONG + "GradientLeak", "token 0 of sequence 0 sees the expert outputs of token 1"),
        (WRONG + "DetachedLeak", "(its future)"),
        (WRONG + "ExpertChoice", "(its future)"),
        (WRONG + "Memory", "the same input gives different outputs in train mode"),
        ("examples.leaking_coupler:LeakingCoupler", "sees the expert outputs of token"),
        (HERE + "Late", "sees the expert outputs of token 7 of sequence"),
        (HERE + "LatePast", "token 9 of sequence 0 sees the layer input of token 8 of sequence 0 (its past)"),
    ],
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_leaks_are_caught_and_named(slow, coupler, text, seed):
    config = GNNMoEConfig(coupler_type=coupler, embed_dim=8, num_heads=2, max_seq_length=LENGTH)
    with pytest.raises(CheckFailed, match=re.escape(text)):
        isolation.token_isolation(Subject(config, seed, torch.device("cpu")))


@pytest.mark.parametrize(
    ("coupler", "only"),
    [("Late", ""), ("LateInEval", " (in eval mode only)"), ("LateInTraining", " (in train mode only)")],
)
def test_a_leak_beyond_the_short_length_is_named_with_its_mode(slow, coupler, only):
    with pytest.raises(CheckFailed) as failed:
        check(HERE + coupler)
    seen = r"token 9 of sequence ([01]) sees the expert outputs of token 7 of sequence ([01])"
    found = re.fullmatch(seen + re.escape(f" (another sequence){only}"), str(failed.value))
    assert found
    assert set(found.groups()) == {"0", "1"}


def test_few_forwards_are_long_and_gradients_are_short(slow):
    CALLS.clear()
    check(HERE + "Counted", length=128)
    calls = Counter(CALLS)
    assert calls[128, False, False] + calls[128, True, False] == 7
    assert calls[128, False, True] + calls[128, True, True] == 0
    assert calls[SHORT, False, True] == calls[SHORT, True, True] == 1


@pytest.mark.parametrize(
    ("coupler", "length", "slow_one"),
    [("Sleepy", 64, True), pytest.param("Sleepy", 16, False, marks=pytest.mark.slow), ("Counted", 64, False)],
)
def test_what_is_slow_is_timed(coupler, length, slow_one):
    CALLS.clear()
    assert ("it is slow" in check(HERE + coupler, length=length)) == slow_one
    long_forwards = sum(shape == length for shape, *_ in CALLS)
    assert (long_forwards < 10) == slow_one
