"""The search of a run and ``bench.tune``, also in a child (A5, A7, A8, B1, B6 to B9, B12, B13, E3)."""

from __future__ import annotations

import gc
import os
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bench.cli import parse
from bench.config import RunConfig, TrainingConfig
from bench.data.corpus import load_corpus
from bench.measure.memory import CannotPredict, predict_peak
from bench.run.__main__ import main
from bench.run.prepare import Identifier, prepare
from bench.training.checkpoint import load_checkpoint
from bench.training.ranks import ALONE, Ranks
from bench.tune import find, trials
from bench.tune.__main__ import main as tune
from bench.tune.__main__ import request_of
from bench.tune.find import cached_search
from bench.tune.search import Found, NoFeasibleBatch, SearchFailed, Shape, Trial
from bench.tune.trials import (
    MEASURED_STEPS,
    MOST_PIECES,
    WARM_UP_STEPS,
    ParametersNotApplied,
    Request,
    Trials,
    TrialSetup,
    search_here,
    search_in_child,
    why_it_fails,
)
from gnnmoe import GNNMoEConfig
from tests.bench._fake_memory import FakeMemory
from tests.bench._forked import fork_context
from tests.bench._runs import act_at_step, interrupt, only_run, refusal, results_of

pytestmark = pytest.mark.core("tune")
REPOSITORY = Path(__file__).parents[2]
SMALL = GNNMoEConfig(coupler_type="mean", num_experts=2, embed_dim=8, num_layers=1, max_seq_length=16,
                     vocab_size=43)  # fmt: skip
MEAN = ["--coupler", "mean", "--num-experts", "2"]
ALL = 10**12
STEPS = WARM_UP_STEPS + MEASURED_STEPS  # of a trial
gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def setup(batch_size: int = 16, limit: int = ALL, **settings) -> TrialSetup:
    return TrialSetup(SMALL, TrainingConfig(), batch_size, limit, **{"device": "cpu", **settings})


@cache
def peak_of(size: int, batch_size: int = 16, words: int = SMALL.vocab_size, dropout: float = 0.0) -> int:
    pieces, model = 2 if size < batch_size else 1, replace(SMALL, vocab_size=words, dropout_rate=dropout)
    return trials.predict_peak(
        model, size * pieces, 16, TrainingConfig(), micro_batch_size=size, device=torch.device("cpu")
    )


@pytest.fixture(scope="module", autouse=True)
def _predictions_are_made_once():
    """A prediction is a pure function that takes a second."""
    known: dict[str, int] = {}

    def remembered(*arguments, **named):
        key = repr((arguments, named))
        if key not in known:
            known[key] = predict_peak(*arguments, **named)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trials, "predict_peak", remembered)
        yield


@pytest.fixture(scope="module")
def words(small_data_dir) -> int:
    return load_corpus(data_dir=small_data_dir).vocabulary.size


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GNNMOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tuned(tiny, words) -> list[str]:
    """A run with a batch of 16 of which 8 rows at once fit: the trial of 16 fails, that of 8 runs."""
    flags = [
        *tiny,
        "--no-speed",
        *MEAN,
        "--batch-size",
        "16",
        "--min-steps-per-epoch",
        "2",
        "--dropout-rate",
        "0.1",
    ]
    limit = (peak_of(8, 16, words, 0.1) + peak_of(16, 16, words, 0.1)) // 2
    return [*flags, "--tune-batch-size", "--memory-target", "1.0", "--memory-budget", f"{limit}B"]


@pytest.fixture
def quick_trials(monkeypatch) -> list[int]:
    """Trials that only say what was tried: everything fits."""
    tried: list[int] = []

    def trial(self, shape):
        tried.append(shape.rows)
        return Trial(shape, tokens_per_second=1.0)

    monkeypatch.setattr(Trials, "__call__", trial)
    return tried


def without_search(flags: list[str]) -> list[str]:
    start = flags.index("--tune-batch-size")
    return [flag for place, flag in enumerate(flags) if not start <= place < start + 5]


@pytest.mark.slow
def test_b7_e3_a_run_with_a_search_is_the_run_with_its_answer_bit_for_bit(tuned, words, monkeypatch, capsys):
    """B7: after a failing and a passing trial; A7, E3: asked, tuned and used stand side by side.

    B1: the run that is told the answer tries nothing.
    """
    tuned = [flag for flag in tuned if flag != "--no-speed"]
    assert main([*tuned, "--tune-mode", "power"]) == 0
    folder, record = only_run(results_of(tuned))
    printed = " ".join(capsys.readouterr().out.split())
    found, used = record["tuned"], record["used"]
    assert [(t["size"], t["failure"] is None) for t in found["trials"]] == [(16, False), (8, True)]
    assert (found["status"], found["micro_batch_size"], found["from_cache"]) == ("ok", 8, False)
    assert (record["requested"]["batch_size"], record["requested"]["micro_batch_size"]) == (16, None)
    assert (used["batch_sizes"], used["micro_batch_size"], used["accumulation"]) == ([16], 8, 2)
    assert (used["micro_batch_shapes"], used["batch_shapes"]) == ({"8x16": 8}, {"16x16": 4})
    assert used["ledger"]["tuned_micro_batch_size"] == 8, "the ledger's number is what is run at once"
    assert {epoch["batch_size"] for epoch in used["ledger"]["epochs"]} == {16}, "and an update's stays"
    peak = record["memory"]["peak_allocated_bytes"]
    assert pytest.approx(peak_of(8, 16, words, 0.1), rel=0.1) == peak <= found["limit_bytes"]
    for part in ("16 sequences × 16 tokens", "micro-batch 8 of at most 16, 2 sizes tried",
                 "as 8 micro-batches of 8 × 16", "16: peak above", "8: fits",
                 "micro-batch 8 of a batch of 16"):  # fmt: skip
        assert part in printed
    log = (folder / "log.txt").read_text()
    assert log.index("searching for the largest micro-batch") < log.index("building") < log.index("training")

    results = str(results_of(tuned).with_name("plain"))
    plain = [*without_search(tuned), "--micro-batch-size", "8", "--results-dir", results]
    monkeypatch.setattr(Trials, "__call__", lambda *_: pytest.fail("a probe ran"))
    assert main(plain) == 0
    other, expected = only_run(results_of(plain))
    assert expected["tuned"] == {"value": None, "reason": "no batch-size search was asked for"}
    assert expected["requested"]["micro_batch_size"] == 8
    assert (folder / "history.jsonl").read_text() == (other / "history.jsonl").read_text()
    assert record["quality"] == expected["quality"]
    assert {**used, "ledger": None} == {**expected["used"], "ledger": None}
    ours, theirs = (load_checkpoint(path / "checkpoint.pt")["model"] for path in (folder, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_b8_the_answer_is_kept_and_any_change_searches_again(tuned, monkeypatch, quick_trials):
    tried = quick_trials

    def trials_of(*flags: str) -> int:
        tried.clear()
        prepared = prepare(parse(RunConfig, [*tuned, *flags]))
        said = []
        find.find(prepared.search(said.append), ALONE, said.append, lambda _: None)
        assert not said
        return len(tried)

    assert trials_of() > 0
    assert trials_of() == 0
    for flags in (["--seed", "1"], ["--max-steps", "7"], ["--study", "other"]):
        assert trials_of(*flags) == 0, f"{flags} changes nothing that a batch takes"
    for flags in (["--max-seq-length", "8"], ["--coupler", "gate"], ["--memory-budget", "2GiB"],
                  ["--weight-decay", "0.2"], ["--tune-mode", "power"], ["--batch-size", "8"]):  # fmt: skip
        assert trials_of(*flags) > 0, flags
    here = find.place_of(prepare(parse(RunConfig, tuned)).search(print))
    for name in ("torch", "coupler_sha256", "project_sha256", "threads"):
        with monkeypatch.context() as patch:
            elsewhere = {**here, name: "x"}
            patch.setattr(find, "place_of", lambda _, elsewhere=elsewhere: elsewhere)
            assert trials_of() > 0, name


def test_b8_a_broken_file_or_another_device_is_searched_again_and_said(tuned, cache_dir, monkeypatch):
    request, said = prepare(parse(RunConfig, tuned)).search(print), []
    path = cache_dir / f"batch-size-{find._key(request)}.json"
    made = Found(Shape(8, 16), "cap", (Trial(Shape(8, 16)),))
    assert cached_search(request, lambda: made, print) == (made, False)
    whole = path.read_text()
    for damaged in ("", "{", whole.replace("8", "9")):
        path.write_text(damaged)
        with pytest.warns(UserWarning, match="batch size of an earlier search in .* is broken") as caught:
            assert cached_search(request, lambda: made, print) == (made, False)
        assert len(caught) == 1
        assert cached_search(request, lambda: pytest.fail("searched"), print) == (made, True)
    kept = []
    for name in ("P100", "A100", "A100", "H100", "A100"):
        monkeypatch.setattr(find, "device_name", lambda _, name=name: name)
        kept.append(cached_search(request, lambda: made, said.append)[1])
    assert kept == [False, False, True, False, True]
    assert said[0].startswith("the batch size was tuned before on ")
    assert said[0].endswith("; searching again on this device")
    assert len(said) == 3


@pytest.fixture
def nothing_fits(monkeypatch) -> None:
    def trial(self, shape):
        return Trial(shape, "peak above 1 KiB", measured_peak_bytes=shape.rows * 2**20)

    monkeypatch.setattr(Trials, "__call__", trial)


def test_a8_a_search_that_fails_ends_the_run_loudly(tuned, nothing_fits):
    assert main(tuned) == 1
    _, record = only_run(results_of(tuned))
    assert record["status"] == "oom"
    for part in ("NoFeasibleBatch: no batch fits", "smallest peak seen: 1.0 MiB", "lower max_seq_length"):
        assert part in record["error"]
    assert record["tuned"]["status"] == "failed"
    assert [trial["size"] for trial in record["tuned"]["trials"]] == [16, 2, 1]
    assert record["used"]["value"] is None


def test_a8_with_a_fallback_the_configured_size_is_used_and_the_record_says_failed(
    tuned, nothing_fits, capsys
):
    assert main([*tuned, "--tune-fallback"]) == 0
    _, record = only_run(results_of(tuned))
    assert record["tuned"]["status"] == "failed"
    assert "the fit failed" in find.words_of(record["tuned"] | {"method": "shape"})
    assert record["used"]["micro_batch_shapes"] == {"16x16": 4}
    assert record["used"]["ledger"]["tuned_micro_batch_size"] is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the search failed" in printed
    assert "tuned: FAILED: NoFeasibleBatch" in printed


def test_b9_another_error_in_a_trial_crashes_the_run(tuned, monkeypatch):
    monkeypatch.setattr(Trials, "__call__", lambda *_: torch.ones(2) @ torch.ones(3))
    assert main([*tuned, "--tune-fallback"]) == 1
    _, record = only_run(results_of(tuned))
    assert (record["status"], record["error"][:12]) == ("crashed", "RuntimeError")


def test_a_resumed_run_keeps_what_was_found_and_does_not_search_again(tuned, monkeypatch, quick_trials):
    tuned = [*tuned, "--tune-max-batch-size", "8"]
    steps = act_at_step(monkeypatch, 3, interrupt)
    assert main(tuned) == 130
    monkeypatch.setattr("bench.run.session.find", lambda *_, **__: pytest.fail("searched again"))
    assert main([*tuned, "--resume"]) == 0
    assert steps == [8] * 5
    _, record = only_run(results_of(tuned))
    assert record["tuned"]["micro_batch_size"] == record["used"]["micro_batch_size"] == 8


def test_a_run_has_its_id_before_the_search_and_a_micro_batch_counts(tiny):
    def run_id(*flags: str) -> str:
        return prepare(parse(RunConfig, [*tiny, *flags])).run_id

    plain = run_id()
    assert run_id("--micro-batch-size", "4") == plain, "the whole batch is no split"
    tunes = [["--tune-batch-size", *flags] for flags in (
        [], ["--memory-budget", "1GiB"], ["--memory-target", "0.5"], ["--tune-mode", "power"],
        ["--tune-init", "2"], ["--tune-max-batch-size", "2"])]  # fmt: skip
    ids = [plain, run_id("--micro-batch-size", "2"), *(run_id(*flags) for flags in tunes)]
    assert len(set(ids)) == len(ids)
    assert run_id("--tune-batch-size", "--tune-init", "4") == ids[2], "4 is where it begins anyhow"


TUNE, FIT, CONTROL = "--tune-batch-size", "--fit-shape", "--control-memory"
ALL_SWITCHES = f"{TUNE}, {FIT} or {CONTROL}"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--micro-batch-size 3", "does not divide the batch of 4; the nearest that does is 2"),
        ("--micro-batch-size 4 --batch-schedule 0:4,1:6", "4 and 6; the nearest that does is 2"),
        ("--micro-batch-size 0", "--micro-batch-size is 0; it must be a whole number from 1 to"),
        (f"{TUNE} --memory-target 1.5", "--memory-target is 1.5; it must be a number in (0, 1]"),
        (f"{TUNE} --memory-budget apples", "apples"),
        (f"{TUNE} --memory-budget 1KiB", "memory budget of 1.0 KiB is smaller than the "),
        (f"{FIT} --memory-budget 1KiB", "is smaller than"),
        (f"{TUNE} --tune-init 3", "tune_init is 3, which does not divide"),
        (f"{TUNE} --tune-init 4 --tune-max-batch-size 2", "tune_init is 4, above the tune_max_batch_size"),
        (f"{CONTROL} --micro-batch-size 4 --tune-max-batch-size 2",
         "micro_batch_size is 4, above the tune_max_batch_size of 2"),
        (f"{TUNE} --micro-batch-size 2", "drop micro_batch_size, or the search"),
        (f"{FIT} --micro-batch-size 2", "fit_shape finds the micro-batch"),
        (f"{FIT} {TUNE}", "fit_shape finds the micro-batch"),
        (f"{FIT} --curriculum rarity --epochs 2", "a curriculum orders blocks of one length"),
        (f"{FIT} --shape-min-length 17", "must rise"),
        (f"{FIT} --shape-length-step 0", "--shape-length-step is 0"),
        (f"{TUNE} --tune-max-seconds 2147484", "it must be a number in (0, 1e+06]"),
        # A flag that would do nothing is refused with the switches that use it.
        ("--memory-budget 1GiB", f"memory_budget is for {ALL_SWITCHES}; add a switch, or drop what would do"),
        ("--tune-max-batch-size 2", f"tune_max_batch_size is for {ALL_SWITCHES};"),
        ("--tune-fallback", f"tune_fallback is for {TUNE} or {FIT};"),
        ("--tune-max-seconds 3", f"tune_max_seconds is for {TUNE} or {FIT};"),
        (f"{CONTROL} --tune-max-trials 3", f"tune_max_trials is for {TUNE} or {FIT};"),
        (f"{FIT} --tune-init 2", f"tune_init is for {TUNE};"),
        (f"{TUNE} --shape-min-length 8", f"shape_min_length is for {FIT} or {CONTROL};"),
        (f"{CONTROL} --shape-max-length 32", f"shape_max_length is for {FIT};"),
        (f"{CONTROL} --shape-length-step 8", f"shape_length_step is for {FIT};"),
        ("--tune-mode power --memory-target 0.5",
         f"memory_target is for {ALL_SWITCHES}; tune_mode is for {TUNE};"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_status_2_and_nothing_is_written(tiny, flags, said, capsys):
    printed = refusal(capsys, [*tiny, *flags.split()])
    assert printed.startswith("error: ")
    assert said in printed
    assert not results_of(tiny).exists()


def test_what_is_refused_before_a_sweep_begins_and_a_flag_that_is_its_default_is_not_given(tiny):
    assert prepare(parse(RunConfig, [*tiny, "--memory-target", "0.85", "--tune-mode", "binsearch"]))
    with pytest.raises(ValueError, match="tune_mode is for --tune-batch-size"):
        Identifier()(parse(RunConfig, [*tiny, "--tune-mode", "power"]))


def test_a5_the_smallest_curriculum_epoch_binds(tiny):
    flags = "--tune-batch-size --min-steps-per-epoch 3 --curriculum rarity --epochs 2".split()
    config = parse(RunConfig, [*tiny, *flags])
    prepared = prepare(config)
    sampler = prepared.loaders["train"].sampler_obj
    smallest = min(sampler.samples_in(epoch) for epoch in range(2))
    assert smallest < len(prepared.loaders["train"].dataset_obj)
    assert request_of(config, None, print).rows[-1] == smallest // 3
    assert prepared.search(print).rows[-1] == 4, "no micro-batch is larger than the batch"
    config = replace(config, memory=replace(config.memory, tune_max_batch_size=2))
    assert request_of(config, None, print).rows[-1] == 2
    assert replace(prepared, config=config).search(print).rows[-1] == 2


def shape(size: int) -> Shape:
    return Shape(size, 16)


def test_trials_do_whole_steps_and_leave_the_random_state(monkeypatch):
    steps, real = [], trials.training_step

    def step(model, batch, *arguments):
        steps.append((tuple(batch["input_ids"].shape), int((batch["targets"] < 0).sum())))
        return real(model, batch, *arguments)

    monkeypatch.setattr(trials, "training_step", step)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert Trials(setup())(shape(4)).micro_steps == MOST_PIECES * STEPS
    assert steps == [((8, 16), 0)] * 4, "full length, no target ignored, two pieces"
    assert torch.equal(torch.get_rng_state(), before)


def test_b10_a_trial_that_runs_out_of_memory_fails_and_the_next_one_runs(monkeypatch):
    memory, real = FakeMemory(0, 1, limit_bytes=5), trials.training_step

    def step(model, batch, optimizer, norm, size, shapes):
        memory.step(size)
        return real(model, batch, optimizer, norm, size, shapes)

    monkeypatch.setattr(trials, "training_step", step)
    run = Trials(setup(batch_size=8))
    first, second = run(shape(8)), run(shape(4))
    assert "OutOfMemoryError: CUDA out of memory" in (first.failure or "")
    assert (first.measured_peak_bytes, first.tokens_per_second) == (None, None)
    assert first.predicted_peak_bytes == peak_of(8, 8)
    assert second.ran
    assert memory.tried == [8, 4, 4, 4, 4]


def test_a_trial_fails_above_the_limit_and_where_the_allocator_retried():
    assert why_it_fails(100, 100, 0) is None
    assert why_it_fails(101, 100, 0) == "peak above 100 B"
    assert why_it_fails(50, 100, 2) == "the allocator had to retry 2 times"
    assert Trials(setup(limit=peak_of(4)))(shape(4)).ran
    over = Trials(setup(limit=peak_of(4) - 1))(shape(4))
    assert not over.ran
    assert over.measured_peak_bytes == peak_of(4)
    assert over.tokens_per_second is None, "what does not fit is not timed"


def test_b4_a_first_trial_runs_whatever_is_predicted_and_later_hopeless_ones_do_not(monkeypatch):
    run = Trials(setup(limit=1000))
    first, second = run(shape(8)), run(shape(4))
    assert first.measured_peak_bytes == peak_of(8)
    assert (second.micro_steps, second.measured_peak_bytes) == (0, None)
    assert "not run: far above" in (second.failure or "")
    monkeypatch.setattr(trials, "free_host_bytes", lambda: 1000)
    assert "1000 B are free here" in (Trials(setup())(shape(8)).failure or ""), "Linux would kill the process"


def test_a_coupler_whose_peak_cannot_be_predicted_is_tried_all_the_same(monkeypatch):
    def unpredictable(*_, **__):
        raise CannotPredict("it reads its numbers")

    monkeypatch.setattr(trials, "predict_peak", unpredictable)
    trial = Trials(setup())(shape(4))
    assert trial.ran
    assert trial.predicted_peak_bytes is None


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_b6_a_child_s_search_is_the_same(start, monkeypatch):
    if start == "fork":  # it begins at once
        monkeypatch.setattr(trials, "multiprocessing", SimpleNamespace(get_context=lambda _: fork_context()))
    limit = (peak_of(8) + peak_of(16)) // 2
    request = Request(setup(limit=limit), ALL, 1.0, "binsearch", (16,), (8, 16), 16, 10, 100.0)
    told: list[Trial] = []
    child, here = search_in_child(request, told.append), search_here(request, lambda _: None)
    assert tuple(told) == child.trials
    assert (child.shape, child.stopped) == (here.shape, here.stopped) == (shape(8), "limit")
    same = [(t.shape, t.failure, t.measured_peak_bytes) for t in here.trials]
    assert [(t.shape, t.failure, t.measured_peak_bytes) for t in child.trials] == same


@pytest.fixture
def command(tiny, monkeypatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", "80")
    places = tiny.index("--data-dir")
    return [*TINY_TUNE, *MEAN, *tiny[places:]]


TINY_TUNE = (
    "--embed-dim 8 --num-heads 2 --num-layers 1 --max-seq-length 16 --batch-size 16 --min-steps-per-epoch 2"
    " --num-eval-samples 8"
).split()


def test_the_command_prints_trials_limit_knee_and_how_to_split_in_80_columns(command, words, capsys):
    limit = peak_of(8, 16, words)
    flags = [*command, "--memory-target", "0.5", "--memory-budget", f"{2 * limit}B", "--tune-init", "8"]
    flags += ["--tune-max-batch-size", "9"]
    assert tune(flags) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(printed.out.split())
    assert "largest size: 8 of at most 9: a larger size does not fit." in text
    assert "knee: 8, the smallest size within 5% of the best tokens/s." in text
    assert "as 2 micro-batches of 8 (--micro-batch-size 8)" in text
    for part in ("predicted", "measured", "tokens/s", "✗"):
        assert part in text
    (row,) = [line for line in lines if "✓ knee" in line or "✓ largest" in line]
    assert row.split()[1] == row.split()[2] == f"{limit / 2**20:.1f}", "predicted and measured side by side"
    assert "8 sequences: fits" in printed.err, "progress"
    assert not results_of(command).exists()
    assert tune([*flags, "--quiet"]) == 0
    printed = capsys.readouterr()
    assert "from an earlier search" in " ".join(printed.out.split())
    assert "at once" not in printed.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--control-memory", "does not use --control-memory; drop it here"),
        ("--fit-shape --tune-fallback", "does not use --tune-fallback;"),
        ("--fit-shape --control-memory --micro-batch-size 2",
         "does not use --control-memory and --micro-batch-size;"),
        ("--fit-shape --tune-mode power", "tune_mode is for --tune-batch-size"),
        ("--fit-shape --tune-batch-size", "fit_shape finds the micro-batch"),
        ("--memory-budget 1XB", "unknown unit 'XB'"),
        ("--memory-target 2", "--memory-target is 2"),
        ("--memory-budget 1KiB", "is smaller than the"),
    ],
)  # fmt: skip
def test_the_command_refuses_what_it_would_not_use(command, quick_trials, flags, said, capsys):
    assert said in refusal(capsys, [*command, *flags.split()], tune)
    assert quick_trials == []


def test_a_command_that_finds_nothing_says_so_and_no_more(command, nothing_fits, monkeypatch, capsys):
    monkeypatch.setattr(trials, "predict_peak", lambda *_, **__: 10**12)
    assert tune([*command, "--fit-shape", "--quiet", "--shape-min-length", "16"]) == 1
    printed = capsys.readouterr()
    assert (printed.out, len(printed.err.splitlines())) == ("", 1)
    assert printed.err.startswith("error: no batch fits")


def test_the_command_is_a_switch_itself(command, quick_trials, capsys):
    flags = "--tune-max-trials 3 --tune-mode power --tune-init 3 --memory-target 0.5".split()
    assert tune([*command, *flags]) == 0
    assert quick_trials == [3, 6, 12]
    assert tune([*command, "--tune-init", "16", "--tune-max-trials", "1"]) == 0
    assert "A batch of 16 sequences runs whole." in " ".join(capsys.readouterr().out.split())


FIT_FLAGS = ["--fit-shape", "--memory-budget", "140KiB", "--shape-length-step", "4"]
REQUEST = Request(setup(4, 130_000), 130_000, 1.0, "shape", (8, 16), (1, 2), 1, 8, 100.0)


@pytest.fixture
def forked(monkeypatch) -> None:
    """Let the search's process begin at once; that a spawned process searches is shown in test_tune."""
    monkeypatch.setattr(trials, "multiprocessing", SimpleNamespace(get_context=lambda _: fork_context()))


def dies(request, send) -> Found:
    os._exit(9)


def breaks(request, send) -> Found:
    raise ZeroDivisionError("a fault")


def applies_nothing(request, send) -> Found:
    raise ParametersNotApplied("parameters not applied")


def finds_nothing(request, send) -> Found:
    raise NoFeasibleBatch([Trial(Shape(1, 8), "no")], Shape(1, 8))


def is_silent(request, send) -> Found:
    time.sleep(1000)
    raise AssertionError("it was not ended")


def never_ends(request, send) -> Found:
    send(Trial(Shape(1, 8)))
    send(Trial(Shape(1, 16), "no"))
    time.sleep(1000)
    raise AssertionError("it was not ended")


@pytest.mark.parametrize(
    ("work", "error", "said"),
    [
        (dies, SearchFailed, "died .exit code 9"),
        (breaks, SearchFailed, "ZeroDivisionError: a fault"),
        (finds_nothing, NoFeasibleBatch, "no batch fits"),
        (is_silent, SearchFailed, "no trial ended within"),
        (applies_nothing, ParametersNotApplied, "^parameters not applied$"),
    ],
)
def test_a8_what_goes_wrong_in_a_child_is_a_failed_search_or_what_it_is(forked, work, error, said):
    with pytest.raises(error, match=said):
        search_in_child(replace(REQUEST, max_seconds=0.2) if work is is_silent else REQUEST, print, work)


def test_b6_at_the_deadline_the_answer_is_what_ran_before_it(forked, monkeypatch):
    def late(trial: Trial) -> None:
        if not trial.ran:  # the last message: from here on the time is up
            monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=lambda: float("inf")))

    found = search_in_child(REQUEST, late, never_ends)
    assert (found.shape, found.stopped, len(found.trials)) == (Shape(1, 8), "max_seconds", 2)


def fit_on_rank(rank: int, store: Path, flags: list[str], said: Any) -> None:
    """Fit three times with made-up searches of the two ranks; send what came of it, and the collectives."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    real, collectives = dist.all_gather_object, []
    dist.all_gather_object = lambda *arguments: (collectives.append(1), real(*arguments))
    request = prepare(parse(RunConfig, flags)).search(print)
    find.cached_search = lambda request, make, say, keep: (make(), False)
    answers: list[Any] = []
    for places in ((2, 1), (3, 4), (None, 2)):
        find.search_here = lambda *_, place=places[rank]: found_at(request.shapes, place)
        try:
            record = find.find(request, Ranks(rank, 2, backend="gloo"), lambda _: None)
        except SearchFailed as error:
            answers.append(type(error).__name__)
        else:
            answers.append((record["status"], record["length"], record["micro_batch_size"]))
    said.put((rank, answers, len(collectives)))


def found_at(shapes: list[Shape], place: int | None) -> Found:
    if place is None:
        raise NoFeasibleBatch([Trial(shapes[0], "no")], shapes[0])
    return Found(shapes[place], "limit", (Trial(shapes[place]),))


def test_b12_two_ranks_fit_the_smaller_shape_and_none_waits_for_one_on_which_nothing_fits(tiny, tmp_path):
    context = fork_context()
    said = context.Queue()
    ranks = [
        context.Process(
            target=fit_on_rank, args=(rank, tmp_path / "store", [*tiny, *FIT_FLAGS], said), daemon=True
        )
        for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    try:
        answers = sorted(said.get(timeout=100) for _ in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    for (_, found, collectives), failed in zip(answers, ("NoFeasibleBatch", "SearchFailed"), strict=True):
        assert found == [("ok", 8, 1), ("ok", 16, 1), failed]
        assert collectives == 3, "one collective per search"


@gpu
@no_gpu
def test_gpu_b10_a_small_budget_on_a_large_card_is_kept_to(tmp_path):
    """The child's allocator gets the budget, so a size that does not fit runs out of memory for real."""
    model = GNNMoEConfig(embed_dim=256, num_layers=4, max_seq_length=128, vocab_size=33278)
    budget = 2 * 2**30
    setup = TrialSetup(model, TrainingConfig(), 4096, int(budget * 0.85), "cuda")
    request = Request(setup, budget, 0.85, "binsearch", (128,), tuple(range(1, 4097)), 4096, 12, 100.0)
    before = torch.cuda.memory_allocated()
    result = search_in_child(request, lambda _: None)
    assert torch.cuda.memory_allocated() == before, "the parent's device is untouched"
    assert 1 <= result.shape.rows < 4096
    best = result.trial
    assert best.measured_peak_bytes is not None
    assert best.measured_peak_bytes <= setup.limit_bytes


@gpu
@no_gpu
def test_gpu_a5_b6_a_search_on_the_device_in_a_child(tuned, tmp_path):
    """A5, B6: in a child, within two minutes, never above the cap, the parent's device untouched."""
    before = _held_on_the_device()
    flags = [*without_search(tuned), "--tune-batch-size", "--device", "cuda"]
    assert main(flags) == 0
    _, record = only_run(results_of(tuned))
    assert record["tuned"]["micro_batch_size"] == 16
    assert record["tuned"]["seconds"] < 120
    assert all(t["micro_steps"] <= STEPS * MOST_PIECES for t in record["tuned"]["trials"])
    assert _held_on_the_device() == before


def _held_on_the_device():
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # they last as long as the process
    return torch.cuda.memory_allocated()


@gpu
@no_gpu
def test_gpu_b7_a_run_with_a_search_is_the_run_with_its_answer(tuned):
    flags = [*without_search(tuned), "--device", "cuda", "--tune-batch-size", "--tune-max-batch-size", "8"]
    assert main(flags) == 0
    folder, record = only_run(results_of(tuned))
    assert record["used"]["micro_batch_size"] == 8
    plain = [*without_search(tuned), "--device", "cuda", "--micro-batch-size", "8", "--study", "plain"]
    assert main(plain) == 0
    (path,) = results_of(tuned).glob("plain/*/record.json")
    assert (folder / "history.jsonl").read_text() == (path.parent / "history.jsonl").read_text()


@gpu
@no_gpu
def test_gpu_b6_d4_a_fit_on_the_device_keeps_to_its_budget_in_a_child():
    """B6, D4 (gpu): the child's allocator gets the budget; the parent's device is untouched."""
    before, full = torch.cuda.memory_allocated(), 256
    model = GNNMoEConfig(embed_dim=256, num_layers=4, max_seq_length=full, vocab_size=8192)
    budget, rows = 2 * 2**30, [2**power for power in range(9)]
    setup = TrialSetup(model, TrainingConfig(), max(rows), int(budget * 0.85), "cuda")
    asked = Request(setup, budget, 0.85, "shape", (full // 2, full), tuple(rows), 1, 12, 100.0)
    found = search_in_child(asked, print)
    peak = found.trial.measured_peak_bytes
    assert peak is not None
    assert peak <= setup.limit_bytes
    assert found.stopped == "limit"
    assert torch.cuda.memory_allocated() == before
