"""Options for one coupler only: ``HGNN.residual=false`` is ignored where the coupler is another."""

import pytest

from bench.cli import parse
from bench.config import RunConfig
from gnnmoe.couplers.registry import build_coupler, coupler_identity, resolved_options
from tests.gnnmoe._support import small_config

BY_PATH = "gnnmoe.couplers.hgnn:HGNNExpertCoupler"


def options(coupler_type: str, **by_name) -> dict:
    return resolved_options(small_config(coupler_type=coupler_type, coupler_options=by_name))


def build(coupler_type: str, **by_name):
    return build_coupler(small_config(coupler_type=coupler_type, coupler_options=by_name))


def test_an_option_with_a_prefix_counts_for_its_coupler_only():
    given = {"HGNN.residual": "false", f"{BY_PATH}.backend": "loop"}
    assert options("HGNN", **given) == {**options("HGNN"), "residual": False, "backend": "loop"}
    assert options("mean", **given) == {}
    assert build("HGNN", **given).layers.residual is False  # pyright: ignore
    assert build("HGNN").layers.residual is True  # pyright: ignore
    assert build("mean", **given).name == "mean"


def test_a_registered_name_is_a_prefix_for_its_class_by_path_too():
    assert options(BY_PATH, **{"HGNN.residual": "no"})["residual"] is False
    assert options(BY_PATH, **{f"{BY_PATH}.residual": "no"})["residual"] is False


@pytest.mark.parametrize("order", [1, -1])
def test_an_option_without_prefix_wins(order):
    given = dict([("residual", "true"), ("HGNN.residual", "false")][::order])
    assert options("HGNN", **given)["residual"] is True


def test_identity_holds_the_options_of_the_coupler_at_hand_only():
    def identity(coupler_type: str, **by_name):
        return coupler_identity(small_config(coupler_type=coupler_type, coupler_options=by_name))

    given = {"HGNN.residual": "false"}
    assert identity("mean", **given) == identity("mean")
    assert identity("HGNN", **given) == identity("HGNN", residual=False) != identity("HGNN")


@pytest.mark.parametrize("coupler_type", ["HGNN", "mean"])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("HGN.residual", "coupler option 'HGN.residual': unknown coupler 'HGN'.*Did you mean 'HGNN'"),
        (".residual", "coupler option '.residual': unknown coupler ''"),
        ("no_such:Thing.k", "coupler option 'no_such:Thing.k': .* module 'no_such' cannot be imported"),
        ("HGNN.residul", "unknown option of coupler HGNN 'residul'.*Did you mean 'residual'"),
        ("HGNN.residual", "option residual of coupler HGNN is '2'; it must be true or false"),
    ],
)
def test_a_wrong_prefix_or_option_is_refused_whatever_the_coupler(coupler_type, key, message):
    with pytest.raises(ValueError, match=message):
        options(coupler_type, **{key: "2"})


def test_a_prefix_passes_through_the_command_line():
    flags = ["--coupler", "HGNN", "--coupler-option", "HGNN.residual=false"]
    config = parse(RunConfig, [*flags, f"--coupler-option={BY_PATH}.backend=loop"]).model.resolved(50)
    assert config.coupler_options == {"HGNN.residual": "false", f"{BY_PATH}.backend": "loop"}
    assert resolved_options(config).items() >= {"residual": False, "backend": "loop"}.items()
