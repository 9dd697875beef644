"""The generator: a decoder-only transformer over the condition and the blocks of a clip.

Shapes: B batch, S condition tokens, L tokens of the clip, D width, N heads, d bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kit.generator.condition import ConditionConfig, build_condition
from kit.generator.linear import Linear, product
from kit.generator.mask import View, attention_views
from kit.generator.rope import ALIGN, positions, rotary_table, rotate
from kit.machine import in_its_type, onto, without_autocast
from kit.recompute import recomputed
from kit.scales import ScaleSchedule
from kit.values import check_choice, check_whole_number, from_values


@dataclass(frozen=True)
class GeneratorConfig:
    """Architecture of a generator.

    Args:
        layers, width, heads: size of the transformer.
        bits, scales: d and K of the tokenizer; smaller clips have fewer scales.
        window: number of previous frames that attention reaches; None: all.
        inherit: which blocks read the finished sum of the previous frame: the `first` block of a frame, in place of a sum of
            its own (the paper); `all` blocks, beside the sum of their own frame; or `none`.
        history: what attention sees of previous frames: the blocks of all their `scales` (the paper), or one block per frame
            with its `full` sum, see `ScaleSchedule.with_history`.
        align: positions of coarse grids, see `rope.positions`.
        condition: see `ConditionConfig`.
    Raises:
        ValueError: for a value out of range, or a width that does not suit the heads.
    """

    layers: int
    width: int
    heads: int
    bits: int
    scales: int
    window: int | None = None
    align: str = "grid"
    inherit: str = "first"
    history: str = "scales"
    condition: ConditionConfig = ConditionConfig()

    def __post_init__(self):
        for key in ("layers", "width", "heads", "bits", "scales"):
            check_whole_number(f"generator.{key}", getattr(self, key), 1)
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ValueError(f"width / heads must be a multiple of 8 for the rotary axes, got {self.width} / {self.heads}")
        for key, choices in (("align", ALIGN), ("inherit", ("first", "all", "none")), ("history", ("scales", "full"))):
            check_choice(key, getattr(self, key), choices)
        check_whole_number("window", self.window, 0, optional=True)

    @property
    def inputs(self) -> int:
        """Channels of an input token: d, or 2 d if all blocks inherit."""
        return self.bits * (2 if self.inherit == "all" else 1)

    @property
    def reads(self) -> dict[str, str]:
        """Arguments of `sequence.training_sequence` that depend on this configuration."""
        return {"inherit": self.inherit, "history": self.history}

    def as_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> GeneratorConfig:
        """Builds it from the values of `as_dict`. Raises ValueError for an unknown key or an invalid value."""
        condition = from_values(ConditionConfig, values["condition"], "condition")
        return from_values(cls, {**values, "condition": condition}, "generator")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Computes scaled dot-product attention over (B, N, tokens, head_dim); mask is True where a query may see a key.

    Uses torch's fused kernel, except for training on a CPU: there the kernel with its backward pass is slower than the plain
    formula for short clips (benchmarks/attention.py measures it at the `tiny` generator's shapes), and memory is not scarce.
    """
    if q.device.type != "cpu" or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores + scores.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    with torch.autocast("cpu", enabled=False):  # it would convert the scores, the largest tensor, to float32
        return scores.softmax(dim=-1) @ v


def attend_views(q: Tensor, k: Tensor, v: Tensor, views: Sequence[View]) -> Tensor:
    """Computes attention view by view, as `attend`; the views' queries are together all queries, in order."""
    parts = [attend(q[:, :, view.queries], k[:, :, view.keys], v[:, :, view.keys], view.mask) for view in views]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the input's type, so that mixed precision uses the fused kernel.

    Its epsilon is the same in every precision; torch's default depends on the input's type.
    """

    def __init__(self, width: int):
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        with in_its_type(x):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Multi-head attention with normalised, rotated queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.query_norm, self.key_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], views: Sequence[View], update_cache=None) -> Tensor:
        """Returns (B, tokens, D) for x of that shape.

        Args:
            rotary: from `rope.rotary_table`, for these tokens. views: which queries see which keys.
            update_cache: maps new keys and values, each (B, N, tokens, D / N), to all visible ones; None: the new ones.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.query_norm(q), rotary), rotate(self.key_norm(k), rotary)
        if update_cache is not None:
            k, v = update_cache(k, v)
        return self.out(attend_views(q, k, v, views).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = Linear(width, hidden)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, 16 D^2 parameters: 24 layers of width 1536 have 906 M (the paper's L: 926 M)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = RMSNorm(width), SwiGLU(width, 4 * width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], views: Sequence[View], update_cache=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, views, update_cache)
        return x + self.mlp(self.mlp_norm(x))


class Generator(nn.Module):
    """Predicts the logits of every bit of every block from the condition and all earlier blocks (VideoAR eq. 5)."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        D = config.width
        self.condition = build_condition(config.condition, D)
        self.project = Linear(config.inputs, D)
        self.scale_embedding = nn.Embedding(config.scales + (config.history == "full"), D)
        self.start = nn.Parameter(torch.zeros(D))
        self.layers = nn.ModuleList(Layer(D, config.heads) for _ in range(config.layers))
        self.norm = RMSNorm(D)
        self.head = Linear(D, config.bits)
        self.recompute = False  # whether the backward pass computes the layers' activations again instead of storing them
        self._initialise()

    def _initialise(self):
        """Initialises all weights but the condition's, which initialises itself."""
        for module in (self.scale_embedding, *self.layers.modules()):
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for layer in self.layers:  # the residual stream keeps its size with depth
            for linear in (layer.attention.out, layer.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / (2 * len(self.layers)) ** 0.5)
        nn.init.normal_(self.project.weight, std=self.config.inputs**-0.5)
        nn.init.normal_(self.start, std=0.02)
        nn.init.zeros_(self.head.weight)

    def embed(self, inputs: Tensor, scale: Tensor, first: int = 0) -> Tensor:
        """Embeds the inputs of blocks as tokens.

        Args:
            inputs: (B, tokens, d), or 2 d if all blocks inherit: what the blocks read (`quantizer.block_input`).
            scale: (tokens,) index of each token's scale embedding, from `scales_of`.
            first: how many leading tokens belong to block (0, 0), which reads the learned start instead.
        Returns:
            (B, tokens, D)
        """
        x = self.project(inputs.to(self.project.weight.dtype) * self.config.bits**0.5) + self.scale_embedding(scale)
        if first:
            x = torch.cat([x[:, :first] + self.start, x[:, first:]], dim=1)
        return x

    def layout(self, schedule: ScaleSchedule) -> ScaleSchedule:
        """Returns the blocks of this generator's sequence: the schedule's, and with `history: full` history blocks."""
        return schedule.layout(self.config.history)

    def scales_of(self, layout: ScaleSchedule) -> Tensor:
        """Returns the index of each token's scale embedding in a layout, (L,): k, but for history blocks the last index,
        however many scales the clip has."""
        k = layout.scale_of_tokens
        return k if layout.history_k is None else torch.where(k == layout.history_k, self.config.scales, k)

    def rotary(self, layout: ScaleSchedule) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine for the condition and the whole layout, (S + L, D / N / 2) each, on the model's device."""
        where = onto(positions(layout, self.condition.length, self.config.align), self.start.device)
        return rotary_table(where, self.config.width // self.config.heads)

    def logits(self, x: Tensor) -> Tensor:
        """Maps hidden states (B, tokens, D) to logits (B, tokens, d), computed in float32 in every precision.

        Rounded to bfloat16, logits have errors that guidance, which extrapolates their differences, would multiply.
        """
        with without_autocast(x.device):
            return product(self.norm(x).float(), self.head.weight.float())

    def forward(
        self, inputs: Tensor, schedule: ScaleSchedule, condition: Tensor, kept: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Computes the logits of a whole clip at once, as in training.

        Args:
            inputs: from `sequence.training_sequence`.
            condition: (B, S, D) from `self.condition`.
            kept: (B, F) bool, the Random Frame Mask. rotary: in place of `self.rotary`'s, for other positions.
        Returns:
            logits (B, L, d); a positive logit predicts a True bit.
        """
        device, S, L, layout = inputs.device, condition.shape[1], inputs.shape[1], self.layout(schedule)
        scale = onto(self.scales_of(layout)[:L], device)
        x = torch.cat([condition, self.embed(inputs, scale, first=layout.blocks[0].stop)], dim=1)
        rotary = tuple(table[: S + L] for table in rotary or self.rotary(layout))
        views = attention_views(layout, S, L, self.config.window, kept, device)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = recomputed(layer, x, rotary, views)
            else:
                x = layer(x, rotary, views)
        x = x[:, S:]
        if layout is not schedule:  # history blocks predict nothing
            x = torch.cat(
                [x[:, layout.frame(f)][:, : schedule.tokens_per_frame] for f in range(schedule.latent_frames)], dim=1
            )
        return self.logits(x)
