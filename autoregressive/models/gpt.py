"""GPT: a Llama-style transformer that predicts the next code of an image.

The released weights depend on the rotary table: code i has the rotary row of its own grid
position.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoregressive.models.conditioning import (
    ClassEmbedding,
    Condition,
    ConditionLike,
    GuidanceEmbedding,
    TextEmbedding,
    as_condition,
    ragged_order,
)
from autoregressive.models.config import PRESETS, GPTConfig
from autoregressive.models.learned_positions import LearnedPositions
from autoregressive.models.lora import add_lora, freeze_base, merge_lora
from autoregressive.models.parallel_regions import RegionTokens
from autoregressive.models.rope import identity_table, rotary_table
from autoregressive.models.transformer import (
    AdaptiveLinear,
    Attend,
    Block,
    causal_attention,
    modulated,
    norm_layer,
    with_one,
)
from core.config import InputError, config_text
from core.training.initialization import Constant, Normal, initialize
from core.weights import save_model


class GPT(nn.Module):
    """Predicts each code of an image from the codes before it and the condition."""

    rotary_bits: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        if config.condition == "text":
            self.cls_embedding = TextEmbedding(config.text_dim, config.max_text_tokens, config.dim)
        else:
            new_classes = config.lora.new_classes if config.lora else 0
            self.cls_embedding = ClassEmbedding(config.num_classes, config.dim, new_classes)
        self.t_embedder = GuidanceEmbedding(config.dim) if config.guidance_input else None
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.target_position = (
            nn.Embedding(config.num_codes, config.dim) if config.target_position else None
        )
        regions = config.parallel_regions
        self.spe_tok_embeddings = (
            RegionTokens(config.grid, regions, config.dim) if regions else None
        )
        rar = config.family == "rar"
        self.learned = LearnedPositions(config.num_codes, config.dim) if rar else None
        self.tok_dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = norm_layer(config, config.dim, weighted=not rar)
        self.norm_ada_lin = None if config.adaln == "none" else AdaptiveLinear(config.dim, 2)
        self.shared_ada_lin = AdaptiveLinear(config.dim, 6) if config.adaln == "shared" else None
        # In the family rar, hidden states end with a one, and the last column is the bias.
        self.output = nn.Linear(config.dim + rar, config.vocab_size, bias=False)
        if config.lora:
            add_lora(self.layers, config.lora)
            freeze_base(self)
        self.build_rotary()
        if not self.output.weight.is_meta:
            # The seed comes from torch's own generator, so that torch.manual_seed decides it.
            initialize(self, int(torch.randint(2**62, (), device="cpu")))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "GPT":  # noqa: ANN401 - any config field
        """A new model with random weights, e.g. from_preset("GPT-B", grid=(24, 24)).

        Raises InputError for an unknown name, TypeError for an unknown field.
        """
        if name not in PRESETS:
            raise InputError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
        shape = dict(zip(("num_layers", "num_heads", "dim"), PRESETS[name], strict=True))
        return cls(GPTConfig(**{**shape, **overrides}))

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,  # noqa: ANN401
    ) -> "GPT":
        """Load a released file, a folder of ours or a Hub repository, in eval mode.

            gpt = GPT.from_pretrained("llamagen_l_384", device="cuda", dtype=torch.bfloat16)

        device, dtype: default CPU and float32. Other options and what is raised: see
        models.pretrained.load_gpt.
        """
        from autoregressive.models.pretrained import load_gpt

        return load_gpt(path_or_hub_id, **options).gpt.to(device=device, dtype=dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.yaml and model.safetensors to a folder, for from_pretrained.

        gpt.save_pretrained("weights/gpt_b")
        """
        whole = self.merged()
        save_model(whole, config_text(whole.config), Path(folder))

    def merged(self) -> "GPT":
        """This model with its LoRA added to the weights; itself if it has none.

        The weights that LoRA does not change are shared.
        """
        if self.config.lora is None:
            return self
        tensors = merge_lora(self.state_dict(), self.config.lora)
        with torch.device("meta"):
            whole = GPT(dataclasses.replace(self.config, lora=None))
        whole.load_state_dict(tensors, assign=True)
        whole.build_rotary()
        return whole.train(self.training)

    def generate(self, condition: ConditionLike, **options: Any) -> torch.Tensor:  # noqa: ANN401
        """Sample the codes of one image per condition -> (batch, height, width) int64.

            codes = gpt.generate(torch.tensor([207]), cfg_scale=4.0, seed=0)

        options: those of autoregressive.generate, which this calls without gradients.
        """
        from autoregressive.inference.generate import generate

        with torch.no_grad():  # not inference_mode: the engine keeps its buffers for later calls
            return generate(self, condition, **options)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.output.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.output.weight.dtype

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks in order, without the wrappers that parallelism adds."""
        return [module for module in self.layers.modules() if isinstance(module, Block)]

    def build_rotary(self) -> None:
        """Compute the rotary table; call it again after building the model on the meta device."""
        config = self.config
        if self.learned is not None:
            table = identity_table(config.num_condition + config.num_codes, config.head_dim)
        else:
            table = rotary_table(
                config.grid,
                config.head_dim,
                config.rope_base,
                config.num_condition,
                config.rope_condition,
            )
        # Kept as integer bits, because model.to(bfloat16) would round a float buffer. Computed on
        # the CPU, so that every device has the same bits.
        bits = table.view(torch.int32).to(self.device)
        self.register_buffer("rotary_bits", bits, persistent=False)

    def initial_distribution(self, name: str) -> Constant | Normal:
        """How a tensor of the state dict is initialised; see core.initialization."""
        if name.endswith("norm.weight"):
            return Constant(1.0)
        zero = ("output.weight", "t_embedder.mlp.2.weight", "target_position.weight")
        if name in zero or name.endswith((".bias", ".lora_b", ".new_classes")):
            # A zero head: the first loss is ln(vocab_size).
            return Constant(0.0)
        if name.endswith(".lora_a"):
            return Normal(1 / math.sqrt(self.config.dim))
        if name == "cls_embedding.uncond_embedding":
            return Normal(1 / math.sqrt(self.config.text_dim))
        if name.endswith("ada_lin.1.weight") and self.learned is not None:
            return Constant(0.0)
        if name.endswith("ada_lin.1.weight"):
            # IBQ: the rows of the gains, if any, are small, and the others half of the rest's.
            gain_rows = 0 if name.startswith("norm_") else 2 * self.config.dim
            return Normal(0.01, gain_rows, 2 * self.config.adaln_gain)
        if name.endswith("ada_lin.table"):  # VAR
            return Normal(0.5 / math.sqrt(self.config.dim), 2, 2 * self.config.adaln_gain)
        return Normal(0.02)

    def hidden_matrices(self) -> dict[str, list[int]]:
        """The matrices of the blocks by name, with the rows of those stacked in each (q, k, v)."""
        config = self.config
        packed = [heads * config.head_dim for heads in (config.num_heads, config.kv_heads)]
        names = {
            "attention.wqkv": [*packed, packed[1]],
            "attention.wo": [config.dim],
            "feed_forward.w1": [config.ffn_dim],
            "feed_forward.w3": [config.ffn_dim],
            "feed_forward.w2": [config.dim],
        }
        if self.learned is not None:
            del names["feed_forward.w3"]
        return {
            f"layers.{i}.{name}.weight": rows
            for i in range(config.num_layers)
            for name, rows in names.items()
        }

    @property
    def adaptive(self) -> nn.ModuleList:
        """Of each block and of the last norm, what maps the condition to scales, shifts and gains.

        Empty without adaln.
        """
        shared = [] if self.shared_ada_lin is None else [self.shared_ada_lin]
        parts = [nn.Sequential(*shared, b.ada_lin) for b in self.blocks if b.ada_lin is not None]
        return nn.ModuleList(parts if self.norm_ada_lin is None else [*parts, self.norm_ada_lin])

    @property
    def rotary(self) -> torch.Tensor:
        """The rotary table (num_condition + codes, head_dim // 2, 2), always float32."""
        return self.rotary_bits.view(torch.float32)

    def forward(
        self,
        codes: torch.Tensor,
        condition: ConditionLike,
        drop_condition: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Teacher forcing: codes (batch, N) int64 -> logits (batch, N, vocab) float32.

        condition: labels (batch,) int64, (features (batch, T, text_dim), lengths (batch,) int64),
            or a Condition.
        drop_condition: (batch,) bool, rows that get the null condition instead; default none.
        positions: (batch or 1, N) int64, the grid position of each code; default raster order.
        guidance: (batch,) float32 in (0, 1], for a model with guidance_input; None leaves it out.
        Raises InputError for codes of another shape or dtype than the grid's.
        """
        is_integer = codes.dtype in (torch.int32, torch.int64)
        if codes.ndim != 2 or not is_integer or codes.shape[1] > self.config.num_codes:
            raise InputError(
                f"codes {tuple(codes.shape)} {codes.dtype}: expected (batch, N) int64, N at most "
                f"{self.config.num_codes}"
            )
        condition = as_condition(condition)
        if len(condition) != len(codes):
            raise InputError(f"{len(condition)} conditions for codes of {len(codes)} images")
        hidden = self.hidden(codes, condition, drop_condition, positions, guidance)
        return self.output(hidden).float()

    def hidden(
        self,
        codes: torch.Tensor,
        condition: ConditionLike,
        drop_condition: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The input of the output head, (batch, N, dim) in the dtype of computation.

        Entry i predicts codes[:, i]. Arguments as for `forward`.
        """
        inputs = self.tok_embeddings(codes[:, :-1])
        return self.hidden_of(inputs, condition, drop_condition, positions, guidance)

    def hidden_of(
        self,
        inputs: torch.Tensor,
        condition: ConditionLike,
        drop_condition: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        taps: dict[int, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `hidden`, from the vectors of the codes: inputs (batch, N - 1, dim).

        taps: Its keys are blocks' indices; the values become these blocks' outputs (batch, N,
            dim): entry i predicts code i, and its input is code i - 1.

        With parallel_regions, inputs and entries are in raster order all the same; the input of
        entry i is then another code than i - 1. Raises InputError for less than a whole image, or
        positions.
        """
        condition, device = as_condition(condition), inputs.device
        batch, num_codes = inputs.shape[0], inputs.shape[1] + 1
        if drop_condition is None:
            drop_condition = torch.zeros(batch, dtype=torch.bool, device=device)
        regions = self.spe_tok_embeddings
        if regions is not None and (positions is not None or num_codes < self.config.num_codes):
            raise InputError("a model with parallel_regions takes whole images in raster order")
        if positions is None:
            positions = torch.arange(num_codes, device=device)[None]
        prefix = self.prefix(condition, drop_condition, guidance)
        adaptive = None if self.norm_ada_lin is None else prefix
        if self.learned is not None:
            places = torch.arange(num_codes + 1, device=device)
            adaptive = self.learned.conditions(prefix, places)
            prefix = self.learned.prefix(prefix)
            inputs = self.learned.place(inputs, positions[:, :-1])
        # Rows of the rotary table: condition tokens use the last ones before the grid's.
        num_prefix, num_condition = prefix.shape[1], self.config.num_condition
        first = torch.arange(num_condition - num_prefix, num_condition, device=device)
        rows = num_condition + positions[:, :-1]
        if regions is not None:
            inputs, rows = regions(inputs), regions.rotary_rows(num_condition, device)[None]
        x = torch.cat([prefix, inputs], dim=1)
        rows = torch.cat([first.expand(len(positions), -1), rows], dim=1)
        lengths = self.cls_embedding.lengths(condition)
        if lengths is None:
            x = self._add_targets(x, positions, num_prefix - 1)
            attend = causal_attention if regions is None else regions.attend(num_prefix, device)
            hidden = self._blocks(x, self.rotary[rows], adaptive, taps, attend)
            if taps is not None:
                taps.update({i: tap[:, num_prefix - 1 :] for i, tap in taps.items()})
            hidden = hidden[:, num_prefix - 1 :]
        else:
            order = ragged_order(lengths, num_prefix, num_codes - 1)
            x = x.gather(1, order[..., None].expand_as(x))
            last = (lengths[:, None] - 1 + torch.arange(num_codes, device=device))[..., None]
            last = last.expand(-1, -1, x.shape[-1])
            x = self._add_targets(x, positions, last)
            rotary = self.rotary[rows.expand(batch, -1).gather(1, order)]
            attend = causal_attention
            if regions is not None:
                attend = regions.attend(num_prefix, device, order, lengths)
            hidden = self._blocks(x, rotary, taps=taps, attend=attend)
            if taps is not None:
                taps.update({i: tap.gather(1, last) for i, tap in taps.items()})
            hidden = hidden.gather(1, last)
        if regions is None:
            return hidden
        if taps is not None:
            taps.update({i: regions.in_raster_order(tap) for i, tap in taps.items()})
        return regions.in_raster_order(hidden)

    def _add_targets(
        self, x: torch.Tensor, positions: torch.Tensor, places: int | torch.Tensor
    ) -> torch.Tensor:
        """Add to each input the vector of the grid position that it predicts, if the model does.

        places: where the input that predicts the first code is, or of all of them an index like x.
        """
        if self.target_position is None:
            return x
        targets = self.target_position(positions).to(x.dtype)
        if isinstance(places, int):
            return torch.cat([x[:, :places], x[:, places:] + targets], dim=1)
        return x.scatter_add(1, places, targets.expand(len(x), -1, -1))

    def prefix(
        self, condition: Condition, drop: torch.Tensor, guidance: torch.Tensor | None
    ) -> torch.Tensor:
        """The condition tokens (batch, C, dim); drop (batch,) bool marks null conditions.

        Raises InputError for a guidance that this model does not take.
        """
        tokens = self.cls_embedding(condition, drop)
        if guidance is None:
            return tokens
        if self.t_embedder is None:
            raise InputError("guidance: this model does not take it as an input (guidance_input)")
        return tokens + self.t_embedder(guidance)

    def _blocks(
        self,
        x: torch.Tensor,
        rotary: torch.Tensor,
        condition: torch.Tensor | None = None,
        taps: dict[int, torch.Tensor] | None = None,
        attend: Attend = causal_attention,
    ) -> torch.Tensor:
        x = self.tok_dropout(x)
        given = condition if self.shared_ada_lin is None else self.shared_ada_lin(condition)
        for i, block in enumerate(self.layers):
            x = block(x, rotary, attend) if given is None else block(x, rotary, attend, given)
            if taps is not None and i in taps:
                taps[i] = x
        x = self.norm(x)
        if self.norm_ada_lin is None:
            return x
        x = modulated(x, self.norm_ada_lin(condition))
        return x if self.learned is None else with_one(x)
