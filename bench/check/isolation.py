"""Token isolation: no output of a coupler may depend on the inputs of another token.

Group testing covers every ordered pair of N tokens in 2·⌈log₂ N⌉ forwards: two different tokens differ in
some bit of their numbers. For each bit and each of its two values, the check moves all tokens with that
value at once. No output of another token may change by one bit. The gradient of a sum over the outputs with
that value must be exactly 0 at the inputs of all other tokens.

A slow coupler gets fewer forwards (``FewForwards``), and its gradients are checked at a few tokens only.
Shapes: B batch, L length, N = B·L tokens, E experts, D width, R forwards.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from typing import NamedTuple, cast

import torch
from torch import Tensor

from bench.check.subject import (
    STREAM,
    Check,
    CheckFailed,
    Inputs,
    Subject,
    call,
    deterministic,
    eval_mode,
    global_random_state_kept,
    modes,
    run_check,
)
from gnnmoe.couplers.base import Coupler
from gnnmoe.model import GNNMoEModel
from gnnmoe.seeds import stream_seed

SOURCES = ("expert outputs", "layer input")
BOTH = range(len(SOURCES))
BATCH = 2  # so that the check covers tokens of neighbouring sequences
SLOW = 0.02  # seconds per forward: a slower coupler gets fewer forwards
SHORT = 16  # length at which the check looks at the gradients of a slow coupler
VERSIONS = 3  # of each token's inputs, for a slow coupler
EXPLAINED_SEQUENCES, EXPLAINED_LENGTHS = 2, (16, 128)  # part of the batch searched for a pair of tokens
ISOLATED = "tokens: no output moves with another token's expert outputs or layer input"
NOT_REPEATED = "the same input gives different outputs in {} mode: see no_memory"


# --- the check of an untrained coupler ---------------------------------------------------------------


def token_isolation(subject: Subject) -> str:
    """Check values and gradients in eval and train mode, at the run's own E, L, D and options."""
    coupler = subject.perturbed_coupler()
    length = subject.config.max_seq_length
    inputs, moved, third = (subject.inputs(BATCH, length) for _ in range(3))
    few = tuple((x[:, :SHORT], layer_input[:, :SHORT]) for x, layer_input in (inputs, moved, third))
    if length > SHORT and is_slow(coupler.eval(), few[0], inputs):
        return _slow_token_isolation(coupler, few, (inputs, moved, third))

    def leaks() -> bool:
        return gradient_leak(coupler, inputs, third[1]) or any(
            value_leak(coupler, inputs, moved, [which]) for which in BOTH
        )

    _refuse_leaks(coupler, inputs, moved, leaks)
    return f"{BATCH * length} {ISOLATED}"


def _slow_token_isolation(coupler: Coupler, few: Sequence[Inputs], versions: Sequence[Inputs]) -> str:
    """Check the gradients and values of a few tokens, then the values of all tokens."""
    values = FewForwards(coupler, few)

    def leaks() -> bool:
        mode = "train" if coupler.training else "eval"
        return gradient_leak(coupler, few[0], few[2][1]) or values.leak(mode) is not None

    _refuse_leaks(coupler, few[0], few[1], leaks)
    how = _all_values(FewForwards(coupler, versions))
    tokens = versions[0][1].shape[:2].numel()
    return f"{tokens} {ISOLATED} (it is slow, so values by {how}, gradients at length {SHORT})"


def _all_values(forwards: FewForwards) -> str:
    """Check that no value moves with another token, and say how many forwards that took.

    The two modes take turns, so an output that leaks in one mode only differs from the other mode's output.
    If the outputs of the two modes differ, each mode runs all forwards.
    """
    if forwards.leak("eval", "train") is None:
        return f"{len(forwards)} forwards, in eval and train mode by turns"
    found = {mode: leak for mode in ("eval", "train") if (leak := forwards.leak(mode))}
    for mode, leak in found.items():
        if not repeats(forwards.coupler.train(mode == "train"), forwards.inputs(0)):
            raise CheckFailed(NOT_REPEATED.format(mode))
        raise CheckFailed(forwards.explain(leak, mode) + _only(list(found)))
    return f"{len(forwards)} forwards in each mode"


def _refuse_leaks(coupler: Coupler, inputs: Inputs, moved: Inputs, leaks: Callable[[], bool]) -> None:
    """Raise ``CheckFailed``, naming two tokens, if ``leaks()`` in eval or train mode."""
    failed_modes, explanation = [], ""
    for mode in modes(coupler):
        if not repeats(coupler, inputs):
            raise CheckFailed(NOT_REPEATED.format(mode))
        if leaks():
            failed_modes.append(mode)
            explanation = explanation or explain(coupler, inputs, moved)
    if failed_modes:
        raise CheckFailed(explanation + _only(failed_modes))


def _only(failed_modes: Sequence[str]) -> str:
    return f" (in {failed_modes[0]} mode only)" if len(failed_modes) == 1 else ""


@torch.no_grad()
def is_slow(coupler: Coupler, few: Inputs, inputs: Inputs) -> bool:
    """Return whether a forward takes longer than ``SLOW``; a forward of all ``inputs`` runs only in doubt."""
    call(coupler, few)  # the first call may be slow by chance
    expected = _seconds(coupler, few) * inputs[1].shape[1] / few[1].shape[1]
    return expected > SLOW and (expected > 10 * SLOW or _seconds(coupler, inputs) > SLOW)


def _seconds(coupler: Coupler, inputs: Inputs) -> float:
    start = time.perf_counter()
    call(coupler, inputs)
    return time.perf_counter() - start


# --- the check of the trained couplers ---------------------------------------------------------------


def rows_to_judge(batches: Iterable[dict[str, Tensor]], at_once: int | None) -> Tensor:
    """Return the input ids (B, L) of the check: as many rows as one forward has; None: a whole batch.

    B is at least 2, with rows of a second batch if necessary: a single row has no other row to see.
    """
    first, *second = (batch["input_ids"] for batch in itertools.islice(batches, 2))
    return torch.cat([first, *second])[: max(2, at_once or len(first))]


def check_trained_isolation(
    model: GNNMoEModel, input_ids: Tensor, *, autocast_dtype: torch.dtype | None = None
) -> Check:
    """Check the coupler of every layer on trained weights, at the run's own B, L and precision.

    The model runs once on ``input_ids`` (B, L) in eval mode. Each coupler is then checked in place on the
    inputs that it received, in 2·⌈log₂ B·L⌉ + 3 forwards per layer without gradients. Weights, gradients,
    training flags and torch's global random state stay as they were.
    """
    device = input_ids.device
    with ExitStack() as stack:
        stack.enter_context(global_random_state_kept(device))
        stack.enter_context(eval_mode(model))
        stack.enter_context(torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None))
        return run_check("trained_isolation", lambda: _every_layer(model, input_ids))


def _every_layer(model: GNNMoEModel, input_ids: Tensor) -> str:
    captured = _coupler_inputs(model, input_ids)
    generator = torch.Generator().manual_seed(stream_seed(0, STREAM))
    for number, (coupler, inputs) in enumerate(captured):
        moved = inputs[0].clone(), inputs[1].clone()
        for x in moved:
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            x += (noise * x.float().std()).to(x.dtype)
        with ExitStack() as stack:
            if not repeats(coupler, inputs):
                stack.enter_context(deterministic())
                if not repeats(coupler, inputs):
                    raise CheckFailed(f"layer {number}: the same input gives different outputs")
            if value_leak(coupler, inputs, moved, BOTH):
                raise CheckFailed(f"layer {number}: {explain(coupler, inputs, moved)}")
    shape = tuple(input_ids.shape)
    return f"{len(captured)} layers on the trained weights, (B, L) = {shape}: no token sees another"


@torch.no_grad()
def _coupler_inputs(model: GNNMoEModel, input_ids: Tensor) -> list[tuple[Coupler, Inputs]]:
    """Return the coupler of each layer with its inputs; a compiled model runs uncompiled."""
    captured: list[tuple[Coupler, Inputs]] = []

    def capture(coupler: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(coupler, Coupler)
        captured.append((coupler, (args[0].detach(), args[1].detach())))

    plain: GNNMoEModel = getattr(model, "_orig_mod", model)
    couplers = [cast(Coupler, layer.coupler) for layer in plain.layers]
    handles = [coupler.register_forward_pre_hook(capture) for coupler in couplers]
    compiler_loaded = "torch._dynamo" in sys.modules
    try:
        with torch.compiler.set_stance("force_eager") if compiler_loaded else nullcontext():
            plain(input_ids, return_logits=False)
    finally:
        for handle in handles:
            handle.remove()
    assert len(captured) == len(couplers), "a layer did not call its coupler exactly once"
    return captured


# --- group testing -----------------------------------------------------------------------------------


@torch.no_grad()
def value_leak(coupler: Coupler, inputs: Inputs, moved: Inputs, which: Sequence[int]) -> bool:
    """Return whether an output changes when the inputs ``which`` of other tokens move."""
    layer_input = inputs[1]
    nobody = torch.zeros(layer_input.shape[:2], dtype=torch.bool, device=layer_input.device)
    base = call(coupler, with_tokens_moved(inputs, moved, [], nobody))
    for mask in _groups(nobody.shape, nobody.device):
        output = call(coupler, with_tokens_moved(inputs, moved, which, mask))
        if not torch.equal(output[~mask], base[~mask]):
            return True
    return False


def gradient_leak(coupler: Coupler, inputs: Inputs, weights_BLD: Tensor) -> bool:
    """Return whether an output has a gradient, however small, at another token's inputs."""
    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    output = call(coupler, (leaves[0], leaves[1])) * weights_BLD
    for mask in _groups(output.shape[:2], output.device):
        gradients = torch.autograd.grad(output[mask].sum(), leaves, retain_graph=True, allow_unused=True)
        if any(g is not None and g[~mask].any() for g in gradients):
            return True
    return False


def _groups(shape: torch.Size, device: torch.device) -> Iterator[Tensor]:
    """Yield two boolean masks (B, L) for each bit of the token numbers: the bit is set, it is not set."""
    numbers = torch.arange(shape.numel(), device=device).view(shape)
    for bit in range((shape.numel() - 1).bit_length()):
        has_bit = (numbers >> bit) % 2 == 1
        yield has_bit
        yield ~has_bit


@torch.no_grad()
def repeats(coupler: Coupler, inputs: Inputs) -> bool:
    """Return whether the same input gives the same output twice."""
    return torch.equal(call(coupler, inputs), call(coupler, inputs))


def with_tokens_moved(inputs: Inputs, moved: Inputs, which: Iterable[int], mask_BL: Tensor) -> Inputs:
    """Return a copy of ``inputs`` in which the tokens of ``mask_BL`` come from ``moved``.

    Only the inputs ``which`` change. The function always copies, so that strides and alignment are the same
    each time; the rounding depends on them.
    """
    copies = [x.clone() for x in inputs]
    for index in which:
        copies[index][mask_BL] = moved[index][mask_BL]
    return copies[0], copies[1]


# --- few forwards, for a slow coupler ----------------------------------------------------------------


class Leak(NamedTuple):
    """A token that has the same version of its inputs in two forwards, but different outputs."""

    forwards: tuple[int, int]
    token: int


class FewForwards:
    """The forwards of one coupler on three versions of its inputs; each runs once per mode.

    Each forward gives every token one of its three versions. Two forwards with the same version of a token
    must give the same output for that token, bit for bit. So each token divides the forwards into three
    parts, by its versions. Different tokens have different divisions, and neither of two divisions into
    three parts refines the other. Therefore each ordered pair s, t has two forwards in which s keeps its
    version and t does not. R forwards have (3ᴿ⁻¹ − 2ᴿ + 1) / 2 divisions: 7 forwards are enough for 256
    tokens, 9 for 2048.
    """

    def __init__(self, coupler: Coupler, versions: Sequence[Inputs]) -> None:
        self.coupler, self.versions = coupler, versions
        self._done: dict[tuple[int, str], Tensor] = {}
        shape = versions[0][1].shape[:2]
        self.version_RBL = divisions(shape.numel()).view(-1, *shape).to(versions[0][1].device)

    def __len__(self) -> int:
        return len(self.version_RBL)

    def inputs(self, forward: int) -> Inputs:
        """Return the inputs of one forward, as copies with the same strides each time."""
        chosen = self.versions[0]
        for version in range(1, VERSIONS):
            chosen = with_tokens_moved(
                chosen, self.versions[version], BOTH, self.version_RBL[forward] == version
            )
        return chosen

    def leak(self, *modes: str) -> Leak | None:
        """Return a token whose outputs differ although its inputs do not; None without one.

        Several ``modes`` take turns: forward r runs in the r-th.
        """
        outputs_RBLD = torch.stack([self._output(r, modes[r % len(modes)]) for r in range(len(self))])
        for version in range(VERSIONS):
            has_RBL = self.version_RBL == version
            first_BL = has_RBL.int().argmax(0)
            expected_BLD = outputs_RBLD.take_along_dim(first_BL[None, ..., None], 0)[0]
            differs_RBL = has_RBL & (outputs_RBLD != expected_BLD).any(-1)
            if differs_RBL.any():
                forward, sequence, position = differs_RBL.nonzero()[0].tolist()
                first = int(first_BL[sequence, position])
                return Leak((first, forward), sequence * first_BL.shape[1] + position)
        return None

    @torch.no_grad()
    def _output(self, forward: int, mode: str) -> Tensor:
        if (forward, mode) not in self._done:
            self.coupler.train(mode == "train")
            self._done[forward, mode] = call(self.coupler, self.inputs(forward))
        return self._done[forward, mode]

    def explain(self, leak: Leak, mode: str) -> str:
        """Name one token that the token of ``leak``, found in ``mode``, sees."""
        before, after = (self.inputs(forward) for forward in leak.forwards)
        return halve(self.coupler.train(mode == "train"), before, after, leak.token)


def divisions(tokens: int) -> Tensor:
    """Return the version (R, N) of each token in each forward: a different division for each token.

    R is the smallest number of forwards with enough divisions. The divisions used are evenly spaced among
    all divisions.
    """
    forwards = next(r for r in itertools.count(VERSIONS) if (3 ** (r - 1) - 2**r + 1) // 2 >= tokens)
    found = [
        (0, *rest) for rest in itertools.product(range(VERSIONS), repeat=forwards - 1) if _in_order(rest)
    ]
    return torch.tensor([found[token * len(found) // tokens] for token in range(tokens)]).T


def _in_order(rest: tuple[int, ...]) -> bool:
    """Return whether versions 1 and 2 both occur, 1 first, so that each division comes only once."""
    return 2 in rest and 1 in rest[: rest.index(2)]


# --- which token sees which: slow and exact, and only run after a leak was found ---------------------


def explain(coupler: Coupler, inputs: Inputs, moved: Inputs) -> str:
    """Name one token that sees another one, of the worst kind found, and the kind of the leak."""
    length = inputs[1].shape[1]
    for part in sorted({min(length, size) for size in (*EXPLAINED_LENGTHS, length)})[:2]:
        few, few_moved = _part(inputs, part), _part(moved, part)
        found = [dependence(coupler, few, few_moved, which) for which in BOTH]
        if any(bool(sees.any()) for sees in found):
            return _describe(found, part)
    return "outputs move with the inputs of other tokens, in a pattern that no single pair shows"


def _part(inputs: Inputs, length: int) -> Inputs:
    return inputs[0][:EXPLAINED_SEQUENCES, :length], inputs[1][:EXPLAINED_SEQUENCES, :length]


def dependence(coupler: Coupler, inputs: Inputs, moved: Inputs, which: int) -> Tensor:
    """Return booleans (N, N): whether output s moves with input t ≠ s, or has a gradient there."""
    B, L = inputs[1].shape[:2]
    one_each = torch.eye(B * L, dtype=torch.bool, device=inputs[1].device).view(-1, B, L)
    with torch.no_grad():
        base = call(coupler, with_tokens_moved(inputs, moved, [], one_each[0]))
        columns = [
            call(coupler, with_tokens_moved(inputs, moved, [which], mask)) != base for mask in one_each
        ]
    sees = torch.stack([column.any(-1).flatten() for column in columns], dim=1)

    leaves = [x.detach().clone().requires_grad_(True) for x in inputs]
    weighted = call(coupler, (leaves[0], leaves[1])) * moved[1]
    for s, output in enumerate(weighted.flatten(0, 1)):
        (gradient,) = torch.autograd.grad(output.sum(), leaves[which], retain_graph=True, allow_unused=True)
        if gradient is not None:
            sees[s] |= (gradient != 0).reshape(B * L, -1).any(1)
    return sees.fill_diagonal_(False)


@torch.no_grad()
def halve(coupler: Coupler, inputs: Inputs, moved: Inputs, s: int) -> str:
    """Name one token that output ``s`` sees, in ⌈log₂ N⌉ + 2 forwards.

    Output s differs between ``inputs`` and ``moved``, although token s is the same in both. The function
    halves the set of tokens that differ, and keeps a half that moves output s, until one token is left.
    """

    def seen(tokens: Tensor, which: Iterable[int]) -> bool:
        changed = with_tokens_moved(inputs, moved, which, torch.isin(numbers_BL, tokens))
        return not torch.equal(call(coupler, changed).flatten(0, 1)[s], base_D)

    B, L = inputs[1].shape[:2]
    numbers_BL = torch.arange(B * L, device=inputs[1].device).view(B, L)
    base_D = call(coupler, inputs).flatten(0, 1)[s]
    tokens = (inputs[1] != moved[1]).any(-1).flatten().nonzero().flatten()
    while len(tokens) > 1:
        half, rest = tokens.chunk(2)
        if seen(half, BOTH):
            tokens = half
        else:
            inputs, tokens = with_tokens_moved(inputs, moved, BOTH, torch.isin(numbers_BL, half)), rest
    source = SOURCES[0 if seen(tokens, [0]) else 1]
    return _pair(s, int(tokens[0]), source, L)


def _describe(found: list[Tensor], length: int) -> str:
    """Describe the dependences (N, N), one matrix for each of ``SOURCES``, in words."""
    kinds: dict[str, str] = {}
    for source, sees in zip(SOURCES, found, strict=True):
        for s, t in sees.nonzero().tolist():
            kinds.setdefault(_kind(s, t, length), _pair(s, t, source, length))
    for worst in ("its future", "another sequence"):
        if worst in kinds:
            return kinds[worst]
    return f"causal but not token-isolated: it mixes a token's own past; refused. {kinds['its past']}"


def _pair(s: int, t: int, source: str, length: int) -> str:
    seer, seen = (f"token {token % length} of sequence {token // length}" for token in (s, t))
    return f"{seer} sees the {source} of {seen} ({_kind(s, t, length)})"


def _kind(s: int, t: int, length: int) -> str:
    if s // length != t // length:
        return "another sequence"
    return "its future" if t > s else "its past"
