"""Run ids, the record's keys, and files that are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from bench.config import RunConfig
from bench.measure.quantity import is_measured, not_measured
from bench.records.schema import KEYS, config_dict, new_record, run_id
from bench.records.store import RunFolder, check_writable

pytestmark = pytest.mark.core("record")
DATA = "0" * 64


def with_field(group: str, name: str, value) -> RunConfig:
    config = RunConfig()
    changed = dataclasses.replace(getattr(config, group), **{name: value})
    return dataclasses.replace(config, **{group: changed})


def test_a_run_id_changes_with_everything_that_can_change_a_number():
    other = {int: 32, float: 0.5, bool: None, str: "other", tuple: (0.5, 0.5), type(None): 7, dict: {"k": 1}}
    base = run_id(RunConfig(), DATA, "cpu")
    seen = {base}
    for group in ("model", "data", "training", "measure"):
        for field in dataclasses.fields(getattr(RunConfig(), group)):
            value = getattr(getattr(RunConfig(), group), field.name)
            if field.name in ("vocab_size", "coupler_option", "dataset_name"):
                continue  # follow from the data; the same as coupler_options; counted by content
            changed = (not value) if isinstance(value, bool) else other[type(value)]
            identity = run_id(with_field(group, field.name, changed), DATA, "cpu")
            assert identity not in seen, f"{group}.{field.name} does not count"
            seen.add(identity)
    assert run_id(RunConfig(), "1" * 64, "cpu") not in seen
    assert run_id(RunConfig(), DATA, "cuda") not in seen
    assert run_id(RunConfig(), DATA, "cpu", world_size=2) not in seen


def test_a_run_id_does_not_change_with_names_and_places():
    base = run_id(RunConfig(), DATA, "cpu")
    for name, value in (("run_name", "x"), ("study", "x"), ("quiet", True), ("force", True)):
        assert run_id(with_field("places", name, value), DATA, "cpu") == base


def test_a_coupler_option_counts_the_same_as_a_flag_and_as_a_dict():
    flag = run_id(with_field("model", "coupler_option", ("backend=loop",)), DATA, "cpu")
    table = run_id(with_field("model", "coupler_options", {"backend": "loop"}), DATA, "cpu")
    assert flag == table != run_id(RunConfig(), DATA, "cpu")


def test_a_new_record_has_every_key_and_a_reason_where_nothing_is_known():
    record = new_record(run_id="abc", status="interrupted")
    assert tuple(record) == KEYS
    assert record["quality"] == not_measured("the run did not get this far")
    assert not is_measured(record["speed"])
    with pytest.raises(KeyError, match="perplexity"):
        new_record(perplexity=3.0)


def test_zero_is_a_measurement_and_null_is_not():
    assert is_measured(0)
    assert is_measured({"peak": 1})
    assert not is_measured(None)
    assert not is_measured(not_measured("no GPU"))


def test_a_record_comes_back_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path, "study", "id")
    folder.create()
    record = new_record(run_id="id", config=config_dict(RunConfig()))
    folder.write_record(record)
    assert folder.read_record() == record


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    """Record: written to a temporary name and renamed; NaN is no JSON and is refused."""
    folder = RunFolder(tmp_path, "study", "id")
    folder.create()
    folder.write_record({"value": 1})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_record({"value": math.nan})

    class Unwritable:
        def __array__(self, *_, **__):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        folder.write_arrays("nll.npz", {"bad": Unwritable()})  # pyright: ignore[reportArgumentType]
    assert folder.read_record() == {"value": 1}
    assert {path.name for path in folder.path.iterdir()} == {"record.json", "history.jsonl", "log.txt"}


def test_arrays_and_history_come_back(tmp_path):
    folder = RunFolder(tmp_path, "study", "id")
    folder.create()
    folder.write_arrays("nll.npz", {"a": np.arange(3)})
    assert np.load(folder.path / "nll.npz")["a"].tolist() == [0, 1, 2]
    folder.append_history({"step": 1})
    folder.append_history({"step": 2})
    lines = (folder.path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_setting_aside_never_overwrites(tmp_path):
    for number in (1, 2):
        folder = RunFolder(tmp_path, "study", "id")
        folder.create()
        folder.write_record({"number": number})
        folder.set_aside()
    kept = sorted(path.name for path in (tmp_path / "study").iterdir())
    assert kept == ["id.1", "id.2"]
    assert json.loads((tmp_path / "study" / "id.1" / "record.json").read_text()) == {"number": 1}


def test_checking_that_a_folder_can_be_written_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new" / "results")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable(tmp_path / "file" / "results")
