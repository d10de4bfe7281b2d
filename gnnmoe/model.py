"""The language model: embeddings, layers of experts and couplers, a tied head.

Shapes: B batch, L length, D width, E experts.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gnnmoe.batched_experts import BatchedExperts
from gnnmoe.config import Refused
from gnnmoe.head import IGNORED, PADDED_BIAS, TiedHead
from gnnmoe.initialization import init_weights
from gnnmoe.layer import GNNMoELayer
from gnnmoe.naming import unknown_name
from gnnmoe.seeds import RandomStreams

if TYPE_CHECKING:
    from gnnmoe.config import GNNMoEConfig


EXPERTS, PRECISIONS = ("loop", "batched"), ("fp32", "tf32", "bf16")


class GNNMoEModel(nn.Module):
    """A causal language model whose layers run E experts on every token and couple them.

    With a ``seed``, trunk, experts and coupler are drawn from the named streams ``init.trunk``,
    ``init.experts`` and ``init.coupler``: models that differ only in their coupler start from the
    same trunk and experts. Without one, the seed is drawn from torch's global generator.

    ``experts``: ``loop``, one block after the other, or ``batched``, all in a few large products; the
    same numbers, and the same state dict. ``precision``: ``bf16`` computes ``forward`` and ``token_nll``
    under autocast, with parameters, residual stream, loss and its softmax in float32; ``fp32`` and
    ``tf32`` are one here, since TF32 is a setting of the whole process
    (``torch.set_float32_matmul_precision``).

    Raises:
        Refused: an unknown name among them.
    """

    def __init__(
        self,
        config: GNNMoEConfig,
        seed: int | None = None,
        *,
        experts: str = "loop",
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        for kind, name, allowed in (("experts", experts, EXPERTS), ("precision", precision, PRECISIONS)):
            if name not in allowed:
                raise Refused(unknown_name(kind, name, allowed))
        self.config, self.precision = config, precision
        streams = RandomStreams(int(torch.randint(2**31, ())) if seed is None else seed)
        with streams("init.trunk"):
            self.token_embedding = nn.Embedding(config.padded_vocab_size, config.embed_dim)
            self.position_embedding = nn.Embedding(config.max_seq_length, config.embed_dim)
            self.output_norm = nn.LayerNorm(config.embed_dim)
            self.apply(init_weights)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.layers = nn.ModuleList(
            GNNMoELayer(config, streams, experts=experts) for _ in range(config.num_layers)
        )
        self.head = TiedHead(config.vocab_size, config.padded_vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        return_logits: bool = True,
    ) -> dict[str, Tensor | None]:
        """Return ``loss`` (mean nll in nats), ``logits`` (B, L, vocab_size), ``auxiliary_loss``.

        Args:
            input_ids: int64 (B, L), L at most ``max_seq_length``.
            attention_mask: (B, L), 1 for tokens and 0 for padding, which must be on the right;
                targets that are padding are not scored.
            labels: (B, L), the ids at the same positions as ``input_ids``, shifted in here.
            targets: (B, L), already shifted: ``targets[:, t]`` follows ``input_ids[:, t]``.
            return_logits: without them the full logits are never held; ``logits`` is None.

        ``loss`` is None without labels or targets; −100 is not scored. ``auxiliary_loss`` is the
        sum of the couplers' own losses (0 for most, and in eval mode), never part of ``loss``.

        Raises:
            ValueError: labels together with targets, a mask with padding elsewhere than on the
                right, or sequences longer than ``max_seq_length``.
        """
        targets = _shifted_targets(attention_mask, labels, targets)
        with self._autocast(input_ids.device):
            hidden_BLD, auxiliary = self._hidden(input_ids)
            embedding = self.token_embedding.weight
            loss = None
            if targets is not None:
                loss = self.head.loss(hidden_BLD.flatten(0, 1), embedding, targets.flatten())
            logits = self.head.logits(hidden_BLD, embedding) if return_logits else None
        return {"loss": loss, "logits": logits, "auxiliary_loss": auxiliary}

    @torch.no_grad()
    def token_nll(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the nll (B, L) in nats of each target, 0 where it is −100; no gradient."""
        with self._autocast(input_ids.device):
            hidden_BLD, _ = self._hidden(input_ids)
            embedding = self.token_embedding.weight
            nll_N = self.head.token_nll(hidden_BLD.flatten(0, 1), embedding, targets.flatten())
        return nll_N.view(targets.shape)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the context of the precision; where it is not bf16, one that a caller made is left alone."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _hidden(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        x_BLD = self._embed(input_ids)
        auxiliary = x_BLD.new_zeros(())
        for layer in self.layers:
            assert isinstance(layer, GNNMoELayer)
            x_BLD, losses = layer.forward_with_auxiliary(x_BLD)
            for value in losses.values():
                auxiliary = auxiliary + value
        return self.output_norm(x_BLD), auxiliary

    def _embed(self, input_ids: Tensor) -> Tensor:
        L = input_ids.shape[1]
        if self.config.max_seq_length < L:
            raise ValueError(f"input_ids has length {L}; max_seq_length is {self.config.max_seq_length}.")
        positions_LD = self.position_embedding.weight[:L]
        return self.dropout(self.token_embedding(input_ids) + positions_LD)

    @torch.no_grad()
    def set_output_bias(self, log_probabilities: Tensor) -> None:
        """Start the head's bias at ``log_probabilities`` (vocab_size,), such as the log unigram.

        Where there are fewer, the other words start without probability.
        """
        self.head.bias.fill_(PADDED_BIAS)
        self.head.bias[: len(log_probabilities)] = log_probabilities

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile ``forward`` by ``torch.compile``, which takes the arguments; a copy is not compiled.

        Torch's own would also compile the hooks that are on the model, anew for each new hook.
        """
        self.__dict__.pop("forward", None)
        self.forward = torch.compile(self.forward, *args, **kwargs)

    @property
    def is_compiled(self) -> bool:
        """Whether ``compile`` was called."""
        return "forward" in self.__dict__

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is compiled, which would go on computing with this model's parameters."""
        return {name: value for name, value in super().__getstate__().items() if name != "forward"}

    def matrices(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay acts on: matrices, and neither biases nor gains."""
        stacked = [module.vectors() for module in self.modules() if isinstance(module, BatchedExperts)]
        vectors = {id(parameter) for vectors in stacked for parameter in vectors}
        return [p for p in self.parameters() if p.ndim >= 2 and id(p) not in vectors]

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters by part: total, expert, coupler, other."""
        counts = {"expert": 0, "coupler": 0}
        for layer in self.layers:
            assert isinstance(layer, GNNMoELayer)
            counts["expert"] += sum(p.numel() for p in layer.experts.parameters())
            counts["coupler"] += sum(p.numel() for p in layer.coupler.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, **counts, "other": total - sum(counts.values())}

    def flops(self, batch: int, length: int) -> int | None:
        """Return the FLOPs of a forward with logits: 2 a multiply-add of a matrix product.

        None where a coupler does not say its own; ``torch.utils.flop_counter`` counts them then.
        """
        layers = [layer.flops(batch, length) for layer in self.layers if isinstance(layer, GNNMoELayer)]
        if any(flops is None for flops in layers):
            return None
        head = 2 * batch * length * self.config.embed_dim * self.config.vocab_size
        return head + sum(flops for flops in layers if flops is not None)

    @torch.no_grad()
    def analyze_expert_communication(self, input_ids: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
        """Return each layer's ``communication`` as ``{"layer_0": {...}, …}``.

        With ``input_ids`` (B, L) also its content-dependent parts, averaged over those tokens.
        """
        x_BLD = None if input_ids is None else self._embed(input_ids)
        found = {}
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, GNNMoELayer)
            outputs = None if x_BLD is None else layer.expert_outputs(x_BLD)
            found[f"layer_{number}"] = layer.coupler.communication(outputs, x_BLD)
            if x_BLD is not None and outputs is not None:
                x_BLD = x_BLD + layer.coupler(outputs, x_BLD)
        return found


def _shifted_targets(
    attention_mask: Tensor | None, labels: Tensor | None, targets: Tensor | None
) -> Tensor | None:
    if labels is not None and targets is not None:
        raise ValueError("give labels (shifted by the model) or targets (shifted already), not both.")
    if attention_mask is not None:
        kept = attention_mask.bool()
        if bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            raise ValueError(
                "attention_mask has padding before a token; only padding on the right is supported."
            )
        if labels is not None:
            labels = labels.masked_fill(~kept, IGNORED)
        if targets is not None:
            targets = targets.masked_fill(~kept, IGNORED)
    if labels is None:
        return targets
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
