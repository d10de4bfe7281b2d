"""What a coupler tells the harness: communication, names, weights of tokens, inert parameters, losses, FLOPs.

Without this check a wrong value would show only in the middle of a run, or in its record.
Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.check.subject import CheckFailed, Inputs, Subject, seed_global_generator
from bench.device import is_out_of_memory
from gnnmoe.config import brief, listed
from gnnmoe.couplers.base import Coupler

BATCH, LENGTH = 2, 2
WIDTH = 16  # mixing needs D backward passes
TOKENS = 12


def communication(subject: Subject) -> str:
    """Check shapes, types and names of all values that the harness asks a coupler for, at a small width."""
    subject, coupler = _narrow(subject)
    experts = _num_experts(coupler)
    inputs = subject.inputs(BATCH, min(subject.config.max_seq_length, LENGTH), experts)
    static = _tensors("communication()", _asked("communication()", coupler.communication))
    full = _talk(coupler, inputs)
    one_token = _talk(coupler, (inputs[0][:1, :1], inputs[1][:1, :1]))
    _same_static_parts(static, full)
    for name, value in full.items():
        if name not in one_token or one_token[name].shape != value.shape:
            raise CheckFailed(
                f"communication: the shape of {name} changes with the tokens; give a mean over them"
            )
    _mixing(full, experts)
    _token_weights(coupler, inputs, experts)
    _member_names(coupler, full, experts)
    _inert_parameters(coupler)
    _auxiliary_losses(coupler, inputs)
    _flops(coupler)
    return f"{', '.join(full)}: finite, detached, of one shape for any number of tokens"


def _narrow(subject: Subject) -> tuple[Subject, Coupler]:
    """Build the coupler in eval mode at a width of about 16, or at its own width if its options need that."""
    config = subject.config
    width = -(-WIDTH // config.num_heads) * config.num_heads
    if width < config.embed_dim:
        narrow = Subject(replace(config, embed_dim=width), subject.seed, subject.device)
        try:
            return narrow, narrow.perturbed_coupler().eval()
        except Exception:
            pass
    return subject, subject.perturbed_coupler().eval()


def _asked(what: str, method: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of ``method``; a failed check names ``what`` if the method raises."""
    try:
        return method(*arguments)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckFailed(f"{what} raised {type(error).__name__}: {error}") from error


def _num_experts(coupler: Coupler) -> int:
    shape = _asked("expert_shape()", coupler.expert_shape)
    if not isinstance(shape, tuple) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
        raise CheckFailed(
            f"expert_shape() gives {brief(shape)}; it must be two positive integers: experts, width"
        )
    return shape[0]


def _talk(coupler: Coupler, inputs: Inputs) -> dict[str, Tensor]:
    what = "communication(x, u)"
    seed_global_generator(0, inputs[1].device)
    return _tensors(what, _asked(what, coupler.communication, *inputs))


def _tensors(what: str, found: Any, *, detached: bool = True) -> dict[str, Tensor]:
    """Return ``found`` after checking that it holds finite tensors by name."""
    if not isinstance(found, dict):
        raise CheckFailed(f"{what} gives a {type(found).__name__}; it must be a dict of tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckFailed(
                f"{what} gives {brief(name)}: a {type(value).__name__}; it must be a name and a tensor"
            )
        if detached and value.requires_grad:
            raise CheckFailed(f"{what}: {name} is not detached; give {name}.detach()")
        if not torch.isfinite(value).all():
            raise CheckFailed(f"{what}: {name} is not finite")
    return found


def _same_static_parts(static: dict[str, Tensor], full: dict[str, Tensor]) -> None:
    for name, value in static.items():
        if name not in full:
            raise CheckFailed(f"communication(x, u) has no {name}, which communication() has")
        if not torch.equal(full[name], value):
            raise CheckFailed(
                f"communication: {name} is not the same with inputs as without; what depends on the tokens "
                "may be there with inputs only"
            )


def _mixing(full: dict[str, Tensor], experts: int) -> None:
    if "mixing" not in full:
        raise CheckFailed("communication(x, u) has no mixing; start from super().communication(x, u)")
    if full["mixing"].shape != (experts,):
        raise CheckFailed(
            f"communication(x, u): mixing has shape {tuple(full['mixing'].shape)}; it must be one share an "
            f"expert, ({experts},)"
        )


def _token_weights(coupler: Coupler, inputs: Inputs, experts: int) -> None:
    what = "token_weights(x, u)"
    with torch.no_grad():
        found = _asked(what, coupler.token_weights, *inputs)
    if found is None:
        return
    shape = (*inputs[0].shape[:2], experts)
    if not isinstance(found, Tensor) or found.shape != shape:
        given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else brief(found)
        raise CheckFailed(f"{what} gives {given}; it must be None or a tensor (B, L, E), here {shape}")
    if not torch.isfinite(found).all() or (found < 0).any():
        raise CheckFailed(f"{what} has weights that are below 0 or not finite; each must be 0 or more")


def _member_names(coupler: Coupler, full: dict[str, Tensor], experts: int) -> None:
    found = _asked("member_names()", coupler.member_names)
    if not isinstance(found, dict):
        raise CheckFailed(
            f"member_names() gives a {type(found).__name__}; it must be a dict of lists of names"
        )
    for name, value in full.items():
        count = value.shape[0] if value.ndim else 0
        if name not in found:
            if value.ndim and count != experts:
                raise CheckFailed(
                    f"communication(x, u): {name} has {count} entries for {experts} experts; name them in "
                    "member_names()"
                )
            continue
        names = found[name]
        if not isinstance(names, list) or not all(isinstance(member, str) for member in names):
            raise CheckFailed(f"member_names(): {name} is {brief(names)}; it must be a list of texts")
        if len(names) != count or len(set(names)) != count:
            raise CheckFailed(
                f"member_names(): {name} has {len(set(names))} different names for {count} entries of "
                "communication"
            )


def _inert_parameters(coupler: Coupler) -> None:
    found = _asked("inert_parameters()", coupler.inert_parameters)
    if not isinstance(found, dict):
        raise CheckFailed(f"inert_parameters() gives a {type(found).__name__}; it must be a dict of reasons")
    parameters = dict(coupler.named_parameters())
    for name, reason in found.items():
        if name not in parameters:
            raise CheckFailed(
                f"inert_parameters() names {brief(name)}, which is no parameter; "
                f"known: {listed(list(parameters))}"
            )
        if not isinstance(reason, str) or not reason.strip():
            raise CheckFailed(
                f"inert_parameters() gives {brief(reason)} for {name}; it must be the reason, as text"
            )


def _auxiliary_losses(coupler: Coupler, inputs: Inputs) -> None:
    what = "auxiliary_losses(x, u)"
    found = _tensors(what, _asked(what, coupler.auxiliary_losses, *inputs), detached=False)
    for name, value in found.items():
        if value.ndim:
            raise CheckFailed(f"{what}: {name} has shape {tuple(value.shape)}; it must be a scalar")


def _flops(coupler: Coupler) -> None:
    found = _asked("flops(tokens)", coupler.flops, TOKENS)
    if found is not None and (type(found) is not int or found < 0):
        raise CheckFailed(f"flops({TOKENS}) gives {brief(found)}; it must be a whole number, or None")
