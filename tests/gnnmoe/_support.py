"""What the tests of the model share: small builds, inputs, gradients, and the one tolerance.

Shapes: B batch, L length, E experts, D width, N tokens, M hyperedges.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from gnnmoe import Coupler, GNNMoEConfig, GNNMoEModel, build_coupler, coupler_names
from gnnmoe.couplers.mean import MeanCoupler
from gnnmoe.hypergraph.backends import BACKENDS, OPTIONAL_PACKAGES
from gnnmoe.hypergraph.propagation import FORMULAS
from gnnmoe.hypergraph.strategies import STRATEGIES, Members
from gnnmoe.layers.base import LAYERS, HypergraphLayer

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
DEFAULT_STRATEGIES = [name for name in STRATEGIES if name != "file"]
"""All that can stand without arguments."""
NO_HYPEREDGES = "ignore:(HGNN. .* has no hyperedges|topk. k is)"
Module = TypeVar("Module", bound=nn.Module)


def _cases() -> list:
    """Each coupler, and the hypergraph coupler with each layer and each strategy, not with each pair."""
    cases = [
        pytest.param({"coupler_type": name}, id=name, marks=pytest.mark.core(f"coupler:{name}"))
        for name in coupler_names()
    ]
    strategies = itertools.cycle(name for name in DEFAULT_STRATEGIES if name != "all_pairs")  # HGNN's default
    for conv, strategy in zip(LAYERS, strategies, strict=False):
        fields = {"static_hyperedge_strategy": strategy, "hgnn_conv_type": conv}
        marks = [pytest.mark.core(f"{kind}:{name}") for kind, name in
                 (("coupler", "HGNN"), ("strategy", strategy), ("conv", conv))]  # fmt: skip
        cases.append(pytest.param(fields, id=f"HGNN-{conv}-{strategy}", marks=marks))
    fields = {"hgnn_learnable_edge_weights": False}
    cases.append(pytest.param(fields, id="HGNN-unlearned", marks=pytest.mark.core("coupler:HGNN")))
    return cases


every_coupler = pytest.mark.parametrize("fields", _cases())
every_formula = pytest.mark.parametrize("formula", FORMULAS)
every_strategy = pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=pytest.mark.core(f"strategy:{name}")) for name in DEFAULT_STRATEGIES],
)
every_conv_type = pytest.mark.parametrize(
    "conv_type", [pytest.param(name, marks=pytest.mark.core(f"conv:{name}")) for name in LAYERS]
)
SYMMETRIC = ("all_pairs", "all_triplets", "all", "k_subsets", "pairs_and_triplets")
"""Strategies that no permutation of the experts changes."""
every_symmetric_strategy = pytest.mark.parametrize("strategy", SYMMETRIC)


def backends(*names: str) -> Any:
    """Parametrize over backends; one not installed is skipped, unless REQUIRE_OPTIONAL names it."""
    required = os.environ.get("REQUIRE_OPTIONAL", "").split(",")
    cases = []
    for name in names or BACKENDS:
        package = OPTIONAL_PACKAGES.get(name)
        missing = package is not None and importlib.util.find_spec(package) is None
        skip = pytest.mark.skipif(missing and name not in required, reason=f"{package} is not installed")
        cases.append(
            pytest.param(name, marks=[skip, pytest.mark.core(f"backend:{name}")] if not package else skip)
        )
    return pytest.mark.parametrize("backend", cases)


def small_config(**fields: Any) -> GNNMoEConfig:
    defaults = {"embed_dim": 6, "max_seq_length": 8, "vocab_size": 50}
    return GNNMoEConfig(**{**defaults, **fields})


def make_coupler(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A small coupler with every parameter moved away from its start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        coupler: Coupler = build_coupler(small_config(**fields))
        return perturbed(coupler.to(dtype))


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """A small model with every parameter moved, so that no zero hides anything."""
    with torch.random.fork_rng(devices=[]):
        model = GNNMoEModel(small_config(**fields), seed=seed).to(dtype)
        torch.manual_seed(seed)
        return perturbed(model).eval()


def make_layer(
    members: list[Members], E: int, conv_type: str, backend: str = "vectorized", D: int = 3
) -> Any:
    options: dict[str, Any] = {"backend": backend} if conv_type in FORMULAS else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        layer = LAYERS[conv_type](members, E, D, 1, **options)
        return perturbed(layer.double())


def hear(layer: HypergraphLayer, x_NED: Tensor, weights_M: Tensor, start_NED: Tensor | None = None) -> Tensor:
    """What a hypergraph layer makes of features and hyperedge weights (N, E, D)."""
    return layer(x_NED, layer.from_weights(weights_M), x_NED if start_NED is None else start_NED)


def perturbed(module: Module, scale: float = 0.3) -> Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return module


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def token_ids(*shape: int, seed: int = 2, vocab_size: int = 50) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Any, expected: Any, dtype: torch.dtype = torch.float64, what: str = "") -> None:
    """Equal up to the tolerance of ``dtype``, relative to the largest value."""
    actual, expected = (torch.as_tensor(v, dtype=torch.float64).detach() for v in (actual, expected))
    assert actual.shape == expected.shape, what
    if not expected.numel():
        return
    assert expected.isfinite().all(), what
    difference = (actual - expected).abs().max().item()
    allowed = TOLERANCE[dtype] * max(expected.abs().max().item(), 1e-3)
    assert difference <= allowed, f"{what}: {difference:.2e} apart, {allowed:.2e} allowed"


def gradients(output: Tensor, leaves: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of ``output``; zeros for what it does not read."""
    leaves = list(leaves)
    if not leaves or not output.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    projection = normal(*output.shape, seed=99, dtype=output.dtype)
    found = torch.autograd.grad((output * projection).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def assert_same_function(
    actual: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    inputs: Iterable[Tensor],
    parameters: dict[str, Tensor] | None = None,
) -> None:
    """Two functions agree in output and in the gradient of every input and parameter."""
    inputs = [value.detach().clone().requires_grad_(True) for value in inputs]
    leaves = {f"input {k}": value for k, value in enumerate(inputs)} | (parameters or {})
    outputs = actual(*inputs), expected(*inputs)
    assert_near(*outputs, what="output")
    pairs = zip(*(gradients(output, leaves.values()) for output in outputs), strict=True)
    for name, (one, other) in zip(leaves, pairs, strict=True):
        assert_near(one, other, what=f"gradient of {name}")


def dense_oracle(H_EM: Tensor, w_M: Tensor, formula: str) -> Tensor:
    """D⁻¹ H W B⁻¹ Hᵀ (or without W, or symmetric) as explicit matrices; every expert has a hyperedge."""
    D, B, W = torch.diag(H_EM @ w_M), torch.diag(H_EM.sum(0)), torch.diag(w_M)
    if formula == "PyGHypergraphConv":
        W = torch.eye(len(w_M), dtype=w_M.dtype)
    if formula == "HGNNConv":
        root = torch.diag(torch.diag(D) ** -0.5)
        return root @ H_EM @ W @ torch.linalg.inv(B) @ H_EM.T @ root
    return torch.linalg.inv(D) @ H_EM @ W @ torch.linalg.inv(B) @ H_EM.T


class WithAuxiliaryLoss(MeanCoupler):
    """The mean, with a loss of its own: what a router adds.

    .. math:: y = f(\\tfrac{1}{E} \\sum_e x_e)

    Shapes: those of the mean. Source: this test's.
    """

    def auxiliary_losses(
        self, expert_outputs: Tensor, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        return {"a": expert_outputs.square().mean(), "b": expert_outputs.new_ones(())}
