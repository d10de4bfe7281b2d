"""Run ids, the record's keys, and files that are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench import files
from bench.config import ModelConfig, RunConfig, TrainingConfig, config_of, run_flags
from bench.files import check_writable
from bench.record import Damaged, Record, RunFolder, is_measured, refuse_another_file
from bench.run.prepare import configuration_id, identity, settings_in_record
from bench.run.prepare import run_id as schema_run_id
from bench.study.run_files import train_rows
from gnnmoe.couplers.registry import coupler_identity
from tests._records import made_record, record_json

pytestmark = pytest.mark.core("record")
DATA = "0" * 64
WIKITEXT_2 = "cae8a46fa3c69638a202eafb4a08e4d4edd20cf83cda7562162d37a0fc74514d"
REFERENCE = Path(__file__).parents[2] / "results/reference"


def run_id(config: RunConfig, data: str, device: str, **world) -> str:
    config = dataclasses.replace(config, training=config.training.settled(120))
    return schema_run_id(identity(config, coupler_identity(config.model.resolved(1)), data, device, **world))


def with_field(group: str, name: str, value) -> RunConfig:
    config = RunConfig()
    changed = dataclasses.replace(getattr(config, group), **{name: value})
    return dataclasses.replace(config, **{group: changed})


VALUES = {
    "coupler_type": "mean", "hgnn_conv_type": "PyGHypergraphConv", "static_hyperedge_strategy": "all",
    "coupler_options": {"residual": False}, "dropout_rate": 0.5, "adam_betas": (0.5, 0.5),
    "learning_rate": 0.5, "weight_decay": 0.5, "min_lr_ratio": 0.5, "max_grad_norm": 0.5,
    "batch_schedule": "0:16,1:32", "initialization": "original",
}  # fmt: skip
BY_OTHER_MEANS = {"vocab_size", "coupler_option", "dataset_name", "dataset_config_name", "allow_failed_check",
                  "audit", "diagnostics", "marginal", "profile", "speed",  # checked and measured besides
                  "text_column", "tokenizer",  # the data count by their content
                  "curriculum", "curriculum_pacing", "curriculum_start",  # by the order they give
                  "strict_curriculum", "min_steps_per_epoch"}  # fmt: skip


def test_a_run_id_changes_with_everything_that_can_change_a_number():
    seen = {run_id(RunConfig(), DATA, "cpu")}
    for group in ("model", "data", "training", "measure"):
        for field in dataclasses.fields(getattr(RunConfig(), group)):
            if field.name in BY_OTHER_MEANS:
                continue
            value = getattr(getattr(RunConfig(), group), field.name)
            changed = (not value) if isinstance(value, bool) else VALUES.get(field.name, 32)
            name = run_id(with_field(group, field.name, changed), DATA, "cpu")
            assert name not in seen, f"{group}.{field.name} does not count"
            seen.add(name)
    for name, value in (
        ("audit", "full"),
        ("marginal", True),
        ("profile", True),
        ("speed", False),
        ("diagnostics", False),
    ):
        assert run_id(with_field("measure", name, value), DATA, "cpu") in seen
    assert run_id(RunConfig(), "1" * 64, "cpu") not in seen
    assert run_id(RunConfig(), DATA, "cuda") not in seen
    assert run_id(RunConfig(), DATA, "cpu", world_size=2) not in seen
    assert run_id(RunConfig(), DATA, "cpu", curriculum={"order_sha256": "0"}) not in seen


def test_every_committed_record_has_the_ids_of_its_config():
    """The identity of a config that a committed run had never changes."""
    known, differing = run_flags(), []
    paths = sorted(REFERENCE.glob("*/*/record.json"))
    for path in paths:
        record = json.loads(path.read_text())
        fields = {name: value for group in record["config"].values() for name, value in group.items()}
        config = config_of({name: value for name, value in fields.items() if name in known})
        device, world = record["environment"]["device_type"], record["environment"].get("world_size", 1)
        coupler = coupler_identity(config.model.resolved(1))
        found = identity(config, coupler, record["data"]["sha256"], device, world_size=world)
        ids = (path.parent.name, record["run_id"], record["configuration"])
        if ids != (schema_run_id(found), schema_run_id(found), configuration_id(found)):
            differing.append(path.parent.name)
    assert len(paths) >= 284
    assert not differing


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("training", "max_steps", 120),
        ("training", "warmup_steps", 15),
        ("training", "eval_every", 40),
        ("model", "coupler_option", ("backend=vectorized",)),
        ("model", "coupler_option", ("residual=True",)),
        ("measure", "allow_failed_check", True),
        ("data", "dataset_name", "wikitext"),
        ("data", "dataset_config_name", "wikitext-2-v1"),
        ("training", "batch_schedule", "0:16"),
        ("training", "batch_schedule", "0:16,3:16"),
        ("places", "run_name", "x"),
        ("places", "study", "x"),
        ("places", "quiet", True),
        ("places", "force", True),
    ],
)
def test_the_same_run_said_in_other_words_has_the_same_id(group, name, value):
    assert run_id(with_field(group, name, value), DATA, "cpu") == run_id(RunConfig(), DATA, "cpu")


def test_the_default_run_on_wikitext_2_keeps_its_id():
    """Shares of the training count as steps, and the default speed pass as the one of the first records."""
    assert run_id(RunConfig(), WIKITEXT_2, "cpu") == "a38be5e8f024"


def test_shares_of_the_training_are_steps_of_it_rounded_up():
    for steps, expected in ((120, (15, 40)), (20, (3, 7)), (1, (1, 1)), (100, (13, 34))):
        found = TrainingConfig().settled(steps)
        assert (found.warmup_steps, found.eval_every) == expected
    given = TrainingConfig(warmup_steps=0, eval_every=1).settled(120)
    assert (given.warmup_steps, given.eval_every) == (0, 1)
    assert TrainingConfig(eval_every=1.0).settled(120).eval_every == 120


def test_one_batch_schedule_has_one_id():
    one = run_id(with_field("training", "batch_schedule", "0:16,3:32"), DATA, "cpu")
    for text in ("0:16,03:32", " 0:016 , 3:32", "0:16,2:16,3:32,4:32"):
        assert run_id(with_field("training", "batch_schedule", text), DATA, "cpu") == one
    assert run_id(with_field("training", "batch_schedule", "0:16,4:32"), DATA, "cpu") != one


def test_fields_that_a_coupler_never_reads_do_not_count():
    mean = with_field("model", "coupler_type", "mean")
    other = dataclasses.replace(mean, model=dataclasses.replace(mean.model, static_hyperedge_strategy="all"))
    assert run_id(mean, DATA, "cpu") == run_id(other, DATA, "cpu")
    assert run_id(RunConfig(), DATA, "cpu") != run_id(
        with_field("model", "static_hyperedge_strategy", "all"), DATA, "cpu"
    )


def test_a_new_record_has_a_reason_where_nothing_is_known_and_no_other_key():
    record = record_json(run_id="abc", status="interrupted")
    assert tuple(record) == tuple(Record.model_fields)
    assert record["quality"] == {"value": None, "reason": "the run did not get this far"}
    assert not is_measured(made_record().speed)
    assert (is_measured(0), is_measured(None)) == (True, False)
    with pytest.raises(ValueError, match="perplexity"):
        made_record(perplexity=3.0)


@pytest.mark.parametrize(("text", "written"), [
    ("in /home/amelia/data/x.npz.", "in x.npz."),
    ("--data-dir=/scratch/lab/wiki copy", "--data-dir=wiki copy"),
    ("--config ../amelia/x.toml ~/y", "--config x.toml y"), ("'/my lab/own.py:Own'", "'own.py:Own'"),
    ("model:/x/checkpoint.pt", "model:checkpoint.pt"), ("C:\\Users\\amelia\\x", "x"),
    ('File "/x/.venv/lib/python3.11/site-packages/torch/nn/m.py", line 1', 'File "torch/nn/m.py", line 1'),
    (f'File "{Path(__file__).parents[2]}/bench/session.py", line 9', 'File "bench/session.py", line 9'),
    ("on gpu-node17.cs.example.org, by amelia", "on HOST, by USER"),
    ("(f pid=12, ip=10.1.2.3)", "(f pid=12, ip=HOST)"), ("http://192.168.0.7:8265/x", "http://HOST:8265/x"),
    ("https://joe:token@example.org/x", "https://USER@example.org/x"),
    *((text, text) for text in ("1,126 tokens/s", "λ = (E − k) / (k (E − 1))", "±0.01 nats/token", "and/or",
      "https://arxiv.org/abs/2308.00951", "results/default/a38be5e8f024", "D⁻¹ H W B⁻¹ Hᵀ X Θ", "<br/> </b>",
      "examples.leaking_coupler:LeakingCoupler", "step 3/120", r"a \n b", "127.0.0.1:8000", "torch 2.11.0",
      "driver 580.159.04", "1.2.3.4.5")),
])  # fmt: skip
def test_no_place_and_no_name_of_the_machine_is_written(tmp_path, monkeypatch, text, written):
    monkeypatch.setattr("platform.node", lambda: "gpu-node17.cs.example.org")
    monkeypatch.setattr("getpass.getuser", lambda: "amelia")
    files._own_names.cache_clear()
    folder = RunFolder(tmp_path, "study", "id")
    folder.create(made_record(error=text, tuned={"value": None, "reason": text}))
    folder.log(text)
    files._own_names.cache_clear()
    record = json.loads((folder.path / "record.json").read_text())
    assert record["error"] == record["tuned"]["reason"] == written
    assert (folder.path / "log.txt").read_text().endswith(f"Z {written}\n")


def test_names_of_the_machine_that_are_words_of_the_record_change_no_key_and_no_value(tmp_path, monkeypatch):
    """A user max and a host hnhn: the flags max_steps and --max-steps stay, and so does the layer HNHN."""
    monkeypatch.setattr("platform.node", lambda: "hnhn.lab")
    monkeypatch.setattr("getpass.getuser", lambda: "max")
    files._own_names.cache_clear()
    config = RunConfig(model=ModelConfig(hgnn_conv_type="HNHN"))
    record = made_record(run_id="id", command="bench.run --max-steps 2 --note 'max on hnhn'",
                         config=settings_in_record(config))  # fmt: skip
    folder = RunFolder(tmp_path, "study", "id")
    folder.create(record)
    files._own_names.cache_clear()
    read = folder.read_record()
    assert isinstance(read, Record)
    assert read.command == "bench.run --max-steps 2 --note 'USER on HOST'"
    assert read == record.model_copy(update={"command": read.command})
    assert read.config.model["hgnn_conv_type"] == "HNHN"
    assert read.config.training["max_steps"] is None


def test_a_record_names_folders_and_files_by_their_names_alone():
    config = RunConfig()
    paths = {"data_dir": "/scratch/wiki", "results_dir": "/x/results", "checkpoint_dir": "../there"}
    places = dataclasses.replace(config.places, **{name: Path(path) for name, path in paths.items()})
    model = dataclasses.replace(config.model, coupler_type="lib/own.py:Own")
    found = settings_in_record(dataclasses.replace(config, places=places, model=model))
    assert [found.places[name] for name in ("data_dir", "results_dir", "checkpoint_dir")] == [
        "wiki", "results", "there"]  # fmt: skip
    assert found.coupler == "own.py:Own"


def test_a_folder_of_a_run_gives_back_what_it_was_given_and_is_set_aside_under_another_name(tmp_path):
    for number in (1, 2):
        folder = RunFolder(tmp_path, "study", "id")
        assert folder.read_record() is None
        folder.create(made_record(seed=number))
        assert folder.read_record() == made_record(seed=number)
        assert (folder.path / "history.jsonl").read_text() == ""
        folder.write_arrays("nll.npz", {"a": np.arange(3)})
        assert np.load(folder.path / "nll.npz")["a"].tolist() == [0, 1, 2]
        for step in (1, 2):
            folder.append_history({"step": step})
        lines = (folder.path / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        folder.set_aside()
    kept = {
        path.parent.name: json.loads(path.read_text())["seed"]
        for path in tmp_path.glob("study/*/record.json")
    }
    assert kept == {"id.1": 1, "id.2": 2}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """Record: written to a temporary name and renamed; NaN is no JSON and is refused."""
    folder = RunFolder(tmp_path, "study", "id")
    folder.create(made_record(run_id="id"))
    with pytest.raises(ValueError, match="JSON"):
        folder.write_record(made_record().model_copy(update={"seed": math.nan}))

    class Unwritable:
        def __array__(self, *_, **__):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        folder.write_arrays("nll.npz", {"bad": Unwritable()})  # pyright: ignore[reportArgumentType]
    assert folder.read_record() == made_record(run_id="id")
    assert {path.name for path in folder.path.iterdir()} == {"record.json", "history.jsonl", "log.txt"}


@pytest.mark.parametrize("text", ['{"run_id": ', "[]", '{"a": 1}'])
def test_a_damaged_record_is_called_that(tmp_path, text):
    folder = RunFolder(tmp_path, "study", "id")
    folder.create(made_record())
    (folder.path / "record.json").write_text(text)
    assert isinstance(folder.read_record(), Damaged)
    (folder.path / "record.json").unlink()
    assert isinstance(folder.read_record(), Damaged)


def test_a_run_is_locked_for_everybody_else(tmp_path):
    first, second = RunFolder(tmp_path, "study", "id"), RunFolder(tmp_path, "study", "id")
    with first.locked():
        with pytest.raises(ValueError, match="another process is at run id"), second.locked():
            pass
        with RunFolder(tmp_path, "study", "other").locked():
            pass
    with second.locked():
        pass
    assert not list(tmp_path.iterdir()), "neither a lock nor an empty folder stays"


def test_the_history_is_json_where_a_number_is_not_finite(tmp_path):
    folder = RunFolder(tmp_path, "study", "id")
    folder.path.mkdir(parents=True)
    row = {"kind": "train", "step": 1, "epoch": 0, "tokens": 4, "learning_rate": 0.1}
    folder.append_history(row | {"loss": math.inf, "gradient_norm": math.nan})
    expected = json.dumps(row | {"loss": None, "gradient_norm": None}) + "\n"
    assert folder.read_history() == expected
    (row,) = train_rows(folder.path)
    assert math.isnan(row["loss"])
    assert math.isnan(row["gradient_norm"])


def test_a_study_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "study").write_text("")
    with pytest.raises(ValueError, match="cannot be written"), RunFolder(tmp_path, "study", "id").locked():
        pass
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable(tmp_path / "study" / "results")
    check_writable(tmp_path / "new" / "results")
    assert [path.name for path in tmp_path.iterdir()] == ["study"], "checking leaves nothing"
    (tmp_path / "link").symlink_to("nowhere/results")
    for folder in (tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(ValueError, match=r"cannot be written .the link link points nowhere"):
            check_writable(folder, "--checkpoint-dir")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "id").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        RunFolder(tmp_path, "other", "id").create(made_record())


def test_a_class_of_an_unknown_home_folder_is_just_another_class():
    refuse_another_file(["mine.py:Mean"], "a", [(["~nobody-has-this-name/their.py:Sum"], "b")])
    with pytest.raises(ValueError, match="is another file"):
        refuse_another_file(["mine.py:Mean"], "a", [(["~nobody-has-this-name/their.py:Mean"], "b")])


def test_a_coupler_option_counts_the_same_as_a_flag_and_as_a_dict():
    flag = run_id(with_field("model", "coupler_option", ("backend=loop",)), DATA, "cpu")
    table = run_id(with_field("model", "coupler_options", {"backend": "loop"}), DATA, "cpu")
    assert flag == table != run_id(RunConfig(), DATA, "cpu")
