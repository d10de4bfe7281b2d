"""The profile: its times, its counts, and the command."""

from __future__ import annotations

import pytest
import torch

from bench.data import profile as profile_module
from bench.data.__main__ import main
from bench.data.blocks import EvalWindows, TrainBlocks, batch_bytes
from bench.data.corpus import load_corpus
from bench.data.loader import create_loader
from bench.data.profile import LoaderCheck, profile_loader

pytestmark = pytest.mark.core("loader")


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (32, 128)])
def test_bytes_of_a_batch(make_split, batch, length):
    """C10: 2·B·L·8 bytes, the storage of the tensors and no view of a larger one."""
    split = make_split(40 * length)
    for blocks in (TrainBlocks(split, length), EvalWindows(split, length, length)):
        tensors = blocks.__getitems__(range(batch)).values()
        measured = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        assert measured == batch_bytes(batch, length) == 2 * batch * length * 8


@pytest.fixture(scope="module")
def corpus(small_data_dir):
    return load_corpus(source="folder", data_dir=small_data_dir)


def test_a_sound_loader_passes(corpus):
    """C9: every count of an epoch, and the times of as many batches as were asked for."""
    found = profile_loader(corpus, batch_size=4, max_seq_length=16, batches=70)
    tokens = corpus.splits["train"].num_tokens
    blocks = tokens // 16
    expected = {check.name: check.expected for check in found.checks}
    assert found.passed
    assert found.fetch_seconds.shape == (70,)
    assert found.tokens == 70 * 4 * 16
    assert expected["bytes per batch"] == 1024
    assert expected["train, drop_last: batches"] == blocks // 4
    assert expected["train, all: samples"] == blocks
    assert expected["validation: tokens"] == corpus.splits["validation"].num_tokens
    times = found.milliseconds()
    assert times["p50"] <= times["p95"] <= times["max"]
    assert found.tokens_per_second == pytest.approx(found.tokens / found.fetch_seconds.sum())


def test_a_loader_that_loses_a_block_fails(corpus, monkeypatch):
    """C9: the counts come from the tensors, so a loader that skips text is found."""
    sound = TrainBlocks.__init__

    def lose_one(self, *arguments, **options):
        sound(self, *arguments, **options)
        self.indices = self.indices[:-1]

    monkeypatch.setattr(TrainBlocks, "__init__", lose_one)
    found = profile_loader(corpus, batch_size=4, max_seq_length=16, batches=5)
    assert not found.passed
    wrong = {check.name for check in found.checks if not check.passed}
    assert {"train, all: samples", "train, all: tokens"} <= wrong
    assert "validation: tokens" not in wrong


def test_a_slow_loader_fails(corpus, monkeypatch):
    monkeypatch.setattr(profile_module, "LIMIT_MS", 0.0)
    found = profile_loader(corpus, batch_size=4, max_seq_length=16, batches=5)
    assert [check.name for check in found.checks if not check.passed] == ["p95 ms per batch"]
    assert LoaderCheck("p95", 5.0, 4.99, at_most=True).passed
    assert not LoaderCheck("p95", 5.0, 5.0, at_most=True).passed


def test_fetching_is_quick():
    """C9: p95 of fetching a batch of 32 × 128 below 5 ms (0.1 ms is usual)."""
    found = profile_loader(load_corpus(source="embedded"))
    assert found.milliseconds()["p95"] < 5.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fetching_with_the_copy_to_the_device_is_quick():
    """C9 (gpu): with the copy to the device."""
    found = profile_loader(load_corpus(source="embedded"), device=torch.device("cuda"))
    assert found.passed
    assert found.milliseconds()["p95"] < 5.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_bytes_of_a_batch_on_the_device():
    """C10 (gpu): what the allocator hands out is the predicted 2·B·L·8."""
    loader = create_loader(load_corpus(source="embedded"), "train", 32, max_seq_length=128)
    batch = next(iter(loader))
    before = torch.cuda.memory_allocated()
    held = {name: tensor.to("cuda") for name, tensor in batch.items()}
    assert torch.cuda.memory_allocated() - before == batch_bytes(32, 128)
    assert all(tensor.is_pinned() for tensor in batch.values())
    assert len(held) == 2


# --- the command -----------------------------------------------------------------------------------


def test_the_command_on_the_embedded_text(capsys, monkeypatch):
    """C9: two tables within 80 columns, exit status 0. How long a fetch takes is not this test's matter."""
    monkeypatch.setattr(profile_module, "LIMIT_MS", 1e6)
    assert main(["profile", "--data-source", "embedded", "--batches", "20"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    for part in ("preparing, s", "p95 ms per batch", "tokens/s", "65,536", "train, drop_last: batches"):
        assert part in printed.out
    assert "✗" not in printed.out


def test_the_command_says_what_is_wrong(capsys, monkeypatch, small_data_dir):
    """C9: exit status 1 and a cross."""
    monkeypatch.setattr(profile_module, "batch_bytes", lambda *_: 7)
    flags = ["--data-dir", str(small_data_dir), *"--max-seq-length 16 --batch-size 4 --batches 5".split()]
    assert main(["profile", *flags]) == 1
    assert "✗" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["profil"], "unknown command of bench.data 'profil'; allowed: profile. Did you mean 'profile'?"),
        (["profile", "--data-source", "embedded", "--batch-size", "9999"], "use a batch of at most"),
        (["profile", "--batch-size", "0"], "--batch-size is 0"),
        (["profile", "--data-dir", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_wrong_input_ends_with_status_2(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_help(capsys):
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert "python -m bench.data profile" in capsys.readouterr().out
