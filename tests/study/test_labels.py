"""What configurations are called."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import pytest

from bench.config import FlagTable, RunConfig
from bench.record import RecordedConfig
from bench.run.prepare import settings_in_record
from bench.study.labels import Key, files_named, flags_that_count, name_parts
from bench.study.labels import labels as labels_of

ONE, OTHER = "1a2b3c4d5e6f", "9a8b7c6d5e4f"


def labels(configurations: list[FlagTable], keys: Sequence[Key] | None = None) -> list[str]:
    """Return the labels of configurations that differ where their settings do, or that have these keys."""
    plain = [(hashlib.sha256(repr(sorted(one.items(), key=str)).encode()).hexdigest()[:12], None)
             for one in configurations]  # fmt: skip
    return labels_of(configurations, keys or plain)


def of(**groups: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the default config with other values in some groups."""
    return flags_that_count(recorded(**groups))


def recorded(**groups: dict[str, Any]) -> RecordedConfig:
    """Return the default config, as a record has it, with other values in some groups."""
    default = settings_in_record(RunConfig()).model_dump()
    return RecordedConfig(**{name: fields | groups.get(name, {}) for name, fields in default.items()})


def settings(**changes: Any) -> dict[str, Any]:
    base = {"coupler_type": "HGNN", "static_hyperedge_strategy": "all_pairs", "num_experts": 4,
            "ffn_dim": None, "coupler_option": [], "hgnn_learnable_edge_weights": True}  # fmt: skip
    return {**base, **changes}


def test_only_what_differs_is_named():
    assert labels([settings(), settings(num_experts=8)]) == ["HGNN · num_experts 4", "HGNN · num_experts 8"]


def test_a_flag_that_was_not_given_is_in_no_label():
    found = labels([settings(max_steps=5, epochs=None), settings(max_steps=None, epochs=2)])
    assert found == ["HGNN · max_steps 5", "HGNN · epochs 2"]
    found = labels([settings(num_eval_samples=5), settings(num_eval_samples=None)])
    assert found == ["HGNN · num_eval_samples 5", "HGNN · num_eval_samples all"]


def test_the_files_of_a_config_are_named():
    assert files_named(recorded()) == ""
    model = {
        "coupler_type": "a.py:One",
        "hgnn_conv_type": "a.py:Two",
        "static_hyperedge_strategy": "b.py:star:hub=1",
    }
    assert files_named(recorded(model=model)) == "a.py and b.py"


def test_fields_of_hypergraphs_are_named_only_for_couplers_in_which_they_vary():
    found = labels([
        settings(coupler_type="mean"),
        settings(),
        settings(static_hyperedge_strategy="all_triplets"),
        settings(static_hyperedge_strategy="all_triplets", hgnn_learnable_edge_weights=False),
    ])  # fmt: skip
    assert found[0] == "mean"
    assert found[1] == "HGNN · all_pairs · learned weights"
    assert found[3] == "HGNN · all_triplets · no weights"


def test_what_differs_between_couplers_is_named_for_all():
    assert labels([settings(coupler_type="GNN", num_experts=2), settings()]) == [
        "GNN · num_experts 2", "HGNN · num_experts 4"]  # fmt: skip


def test_a_matched_width_is_named_only_where_labels_would_be_equal():
    assert labels([settings(coupler_type="mean", ffn_dim=261), settings(ffn_dim=256)]) == ["mean", "HGNN"]
    assert labels([settings(ffn_dim=261), settings(ffn_dim=256)]) == [
        "HGNN · ffn_dim 261",
        "HGNN · ffn_dim 256",
    ]


def test_labels_of_different_configurations_always_differ():
    many = [
        settings(num_experts=e, coupler_option=o) for e in (2, 4) for o in ([], ["k=2"], ["k=2", "HGNN.x=1"])
    ]
    found = labels(many)
    assert len(set(found)) == len(many)
    assert found[2] == "HGNN · num_experts 2 · k=2 x=1"


def test_settings_leave_out_seed_places_and_options_of_other_couplers():
    found = of(model={"coupler_type": "mean", "coupler_option": ["HGNN.backend=loop", "k=1", "mean.a=b.c"]},
               training={"seed": 3, "learning_rate": 0.1}, places={"study": "s"})  # fmt: skip
    assert (found["coupler_type"], found["learning_rate"]) == ("mean", 0.1)
    assert found["coupler_option"] == ["a=b.c", "k=1"]
    assert not {"seed", "study"} & found.keys()


def options_of(coupler: str, *options: str) -> list[str]:
    return of(model={"coupler_type": coupler, "coupler_option": list(options)})["coupler_option"]


def test_an_option_is_the_same_with_its_owner_and_without():
    assert options_of("gate", "gate.k=1") == options_of("gate", "k=1") == ["k=1"]
    assert options_of("gate", "b=2", "gate.k=1") == options_of("gate", "k=1", "b=2")
    assert options_of("gate", "k=2", "gate.k=1") == ["k=2"], "without an owner wins, as in gnnmoe"


def test_options_of_a_coupler_in_a_file_are_named_without_its_path():
    path = "examples/x.py:NormCoupler"
    found = [{"coupler_type": path, "coupler_option": options_of(path, f"{path}.p={p}")} for p in (1, 2)]
    assert labels(found) == ["NormCoupler · p=1", "NormCoupler · p=2"]
    whole = [settings(coupler_type=path, coupler_option=[f"{path}.p={p}"]) for p in (1, 2)]
    assert labels(whole) == ["NormCoupler · p=1", "NormCoupler · p=2"]
    assert options_of(path, "norm.p=1") != options_of(path, "norm.p=2"), "norm may be its name"


def test_code_from_outside_is_shown_by_its_name_alone():
    found = [settings(coupler_type="mean"),
             *(settings(hgnn_conv_type="my/l.py:Largest", static_hyperedge_strategy=text)
               for text in ("my/s.py:star:hub=1", "package.s:ends", "file:e.json"))]  # fmt: skip
    assert labels(found) == ["mean", "HGNN · star:hub=1", "HGNN · ends", "HGNN · file:e.json"]


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"coupler_type": "my/c.py:LowRank", "coupler_option": ["rank=3"]}, ["LowRank", "rank=3"]),
        ({"coupler_type": "gate"}, ["gate"]),
        ({"hgnn_conv_type": "my/l.py:Largest", "static_hyperedge_strategy": "my/s.py:star:hub=1",
          "coupler_option": ["HGNN.residual=false", "gate.k=1"]},
         ["HGNN", "Largest", "star:hub=1", "residual=false"]),
    ],
)  # fmt: skip
def test_the_title_of_a_run_has_its_options_and_no_path(model, parts):
    assert name_parts(recorded(model=model)) == parts


def test_what_the_settings_do_not_tell_apart_is_told_by_the_configuration():
    """A hyperedge file with other members, a checkpoint of other bytes: the config has their names only."""
    own = settings(static_hyperedge_strategy="file:e.json")
    assert labels([own, own, settings(coupler_type="mean")], [(ONE, None), (OTHER, None), ("m", None)]) == [
        "HGNN · configuration 1a2b3c4d", "HGNN · configuration 9a8b7c6d", "mean"]  # fmt: skip
    assert labels([own, own], [(ONE, None), (ONE, None)]) == ["HGNN", "HGNN"], "one, in two tables"


def test_versions_of_the_code_of_a_coupler_are_named():
    own = [settings(coupler_type="c.py:C")] * 3
    codes = ["3fa9c1d2" * 8, "77" * 32, None]
    assert labels(own, [(ONE, code) for code in codes]) == [
        "C · code 3fa9c1d2", "C · code 77777777", "C · code not known"]  # fmt: skip
    both = labels(own, [(ONE, codes[0]), (ONE, codes[1]), (OTHER, codes[0])])
    assert both == ["C · configuration 1a2b3c4d · code 3fa9c1d2",
                    "C · configuration 1a2b3c4d · code 77777777",
                    "C · configuration 9a8b7c6d"]  # fmt: skip


def test_as_many_digits_are_named_as_it_takes():
    own = [settings()] * 2
    assert labels(own, [("0123456789ab", None), ("0123456799ab", None)]) == [
        "HGNN · configuration 012345678", "HGNN · configuration 012345679"]  # fmt: skip


def test_settings_that_differ_in_one_configuration_are_one_label():
    """Another spelling of one value: the first is shown."""
    assert labels([settings(num_experts=4), settings(num_experts=8)], [(ONE, None)] * 2) == [
        "HGNN · num_experts 4"] * 2  # fmt: skip


def test_what_would_be_equal_is_told_apart():
    found = labels([settings(static_hyperedge_strategy=value) for value in ("2", "2 (2)", None, "2")])
    assert found[0] == found[3] == "HGNN · 2", "the same configuration, in two tables"
    alike = labels([settings(num_experts=value) for value in ("4", 4, "num_experts 4")])
    assert len({*found}) == len({*alike}) == 3
    assert not any("(2)" in label for label in alike)
    hostile = [settings(coupler_type=name) for name in ("a", "a", "a · configuration 1a2b3c4d")]
    assert len({*labels(hostile, [(ONE, None), (OTHER, None), ("x", None)])}) == 3


def test_memory_counts_only_where_something_was_asked_of_it():
    plain, mean = of(model={"coupler_type": "mean"}), {"coupler_type": "mean"}
    assert of(model=mean, memory={"memory_target": 0.5}) == plain
    assert labels([of(model=mean, memory={"micro_batch_size": 4}), plain]) == [
        "mean · micro_batch_size 4", "mean"]  # fmt: skip


def test_execution_is_named_where_it_is_not_the_plain_one():
    mean = {"coupler_type": "mean"}
    before = of(model=mean)
    low, both, batched = (of(model=mean, execution=execution) for execution in (
        {"precision": "bf16"}, {"precision": "bf16", "compile": True}, {"experts": "batched"}))  # fmt: skip
    named = ["mean", "mean · bf16", "mean · bf16 · compile True", "mean · batched"]
    assert labels([before, low, both, batched]) == named


def test_the_start_is_named_where_it_is_not_the_projects():
    project, original = (of(model={"coupler_type": "GNN", "initialization": name})
                         for name in ("project", "original"))  # fmt: skip
    assert labels([project, original]) == ["GNN", "GNN · original start"]
    assert labels([original]) == ["GNN"], "only what differs is named"
