"""The GPT as a model of vLLM: one request carries both streams of classifier-free guidance.

Each token has two hidden states: the conditional one and the unconditional (null) one. Linear
layers see them as two rows; attention sees them as twice as many heads, so that vLLM's paged cache
holds the keys and values of both. They are mixed before the output head, which is linear:
hidden = null + scale * (conditional - null). A model that takes guidance as an input has one hidden
state per token.

Shapes: T tokens of the batch, S streams (2, or 1), H heads, D width of a head.
"""

# vLLM has its own environment: pyright does not see it.
# pyright: reportMissingImports=false

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn import functional as F
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from autoregressive.models.config import GPTConfig
from autoregressive.models.rope import rotary_table, rotate
from autoregressive.serving.vllm_guidance import Guidance, guidance_for
from autoregressive.serving.vllm_plugin import gpt_config
from autoregressive.serving.vllm_requests import prompt_width
from autoregressive.serving.vllm_weights import load_tensors


def num_streams(config: GPTConfig) -> int:
    """Hidden states of a token: the conditional and the null one, or one that holds guidance."""
    return 1 if config.guidance_input else 2


class StreamAttention(nn.Module):
    """Causal attention of the streams; the first half of two has the conditional one's heads."""

    def __init__(self, config: GPTConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if config.num_heads % ranks or config.kv_heads % ranks:
            raise ValueError(
                f"{config.num_heads} heads and {config.kv_heads} key-value heads cannot be split "
                f"over {ranks} GPUs: choose a tensor parallel size that divides both"
            )
        quantization, self.streams = vllm_config.quant_config, num_streams(config)
        self.heads, self.kv_heads = config.num_heads // ranks, config.kv_heads // ranks
        self.head_dim = config.head_dim
        # Attention kernels know few head sizes; GPT-3B's 100 is padded with zeros.
        self.padding = vllm_config.model_config.hf_config.head_dim - config.head_dim
        self.wqkv = QKVParallelLinear(
            config.dim,
            config.head_dim,
            config.num_heads,
            config.kv_heads,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.wqkv",
        )
        self.wo = RowParallelLinear(
            config.dim, config.dim, bias=False, quant_config=quantization, prefix=f"{prefix}.wo"
        )
        self.has_qk_norm = getattr(config, "qk_norm", False)
        if self.has_qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.attend = Attention(
            self.streams * self.heads,
            self.head_dim + self.padding,
            self.head_dim**-0.5,
            num_kv_heads=self.streams * self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            prefix=f"{prefix}.attend",
        )

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """x (T * S, dim), rotary (T, D // 2, 2) -> (T * S, dim)."""
        packed, _ = self.wqkv(x)
        packed = packed.view(-1, self.streams, self.heads + 2 * self.kv_heads, self.head_dim)
        parts = packed.split([self.heads, self.kv_heads, self.kv_heads], dim=2)
        queries, keys, values = (part.flatten(1, 2) for part in parts)  # (T, S * H, D)
        if self.has_qk_norm:
            queries, keys = self.q_norm(queries.contiguous()), self.k_norm(keys.contiguous())
        queries, keys = rotate(queries, rotary), rotate(keys, rotary)
        attended = self.attend(self._pad(queries), self._pad(keys), self._pad(values))
        attended = attended.view(-1, self.heads, self.head_dim + self.padding)
        return self.wo(attended[..., : self.head_dim].flatten(1))[0]

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        """(T, S * H, D) -> (T, S * H * padded D)."""
        return (F.pad(x, (0, self.padding)) if self.padding else x).flatten(1)


class FeedForward(nn.Module):
    """SwiGLU as in the GPT's own block, with w1 and w3 in one product."""

    def __init__(self, config: GPTConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quantization = vllm_config.quant_config
        self.w13 = MergedColumnParallelLinear(
            config.dim,
            [config.ffn_dim, config.ffn_dim],
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.w13",
        )
        self.w2 = RowParallelLinear(
            config.ffn_dim, config.dim, bias=False, quant_config=quantization, prefix=f"{prefix}.w2"
        )
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T * S, dim) -> (T * S, dim)."""
        return self.w2(self.activation(self.w13(x)[0]))[0]


class Block(nn.Module):
    """Pre-norm attention and FFN, each added to the residual stream."""

    def __init__(self, config: GPTConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = StreamAttention(config, vllm_config, f"{prefix}.attention")
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config, vllm_config, f"{prefix}.feed_forward")

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        """x (T * S, dim) -> the same."""
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.feed_forward(self.ffn_norm(x))


@support_torch_compile(dynamic_arg_dims={"x": 0, "positions": 0})
class Transformer(nn.Module):
    """The blocks between embedding and head: the part that vLLM compiles and captures."""

    rotary: torch.Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = gpt_config(vllm_config.model_config.hf_config)
        self.dim, self.streams = config.dim, num_streams(config)
        self.layers = nn.ModuleList(
            Block(config, vllm_config, f"{prefix}.layers.{layer}")
            for layer in range(config.num_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps)
        with torch.device("cpu"):  # the same bits as in training, whatever the device
            table = rotary_table(
                config.grid,
                config.head_dim,
                config.rope_base,
                config.num_condition,
                config.rope_condition,
            )
        # float32 although the loader's default dtype may be bfloat16.
        table = table.to(device=vllm_config.device_config.device, dtype=torch.float32)
        self.register_buffer("rotary", table, persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """x (T, S * dim), positions (T,) in the condition and then the grid -> (T, S * dim)."""
        # A request that draws more codes than an image has must not end the engine.
        rotary = self.rotary[positions.clamp(max=len(self.rotary) - 1)]
        x = x.view(-1, self.dim)
        for block in self.layers:
            x = block(x, rotary)
        return self.norm(x).view(-1, self.streams * self.dim)


class LlamaGenModel(nn.Module):
    """What class and text models share: the transformer, its head, guidance and loading."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = gpt_config(vllm_config.model_config.hf_config)
        self.num_tokens = vllm_config.model_config.hf_config.vocab_size
        self.streams = num_streams(config)
        # The V2 runner sets it when it makes the model's state (vllm_state.py).
        self.guidance: Guidance | None = guidance_for(vllm_config)
        needs_guidance = self.streams == 2 and not vllm_config.use_v2_model_runner
        if self.guidance is None and needs_guidance:
            raise ValueError(
                "guidance is not loaded: start vLLM with "
                "--logits-processors autoregressive.serving.vllm_guidance:Guidance"
            )
        self.embedding = VocabParallelEmbedding(self.num_tokens, config.dim)
        self.transformer = Transformer(
            vllm_config=vllm_config, prefix=f"{prefix}.transformer".lstrip(".")
        )
        self.output = ParallelLMHead(config.vocab_size, config.dim, prefix="output")
        self.head = LogitsProcessor(config.vocab_size)

    def get_model_state_cls(self) -> type:
        """The state that keeps guidance in the V2 runner; the V1 runner does not ask."""
        from autoregressive.serving.vllm_state import GuidanceState

        return GuidanceState

    def known_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Last defence: without a tokenizer vLLM checks no id, and one error ends the engine."""
        return input_ids.clamp(0, self.num_tokens - 1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Guide, then apply the head: (rows, S * dim) -> (rows, tokens); None off the first rank.

        Columns behind the codes are -inf: vLLM sizes its sampling buffers by all tokens.
        """
        if self.streams == 2:
            assert self.guidance is not None
            conditional, null = hidden_states.float().chunk(2, dim=-1)
            mixed = null + self.guidance.scales(len(hidden_states)) * (conditional - null)
            hidden_states = mixed.to(hidden_states.dtype)
        logits = self.head(self.output, hidden_states)
        if logits is None:
            return None
        return F.pad(logits, (0, self.num_tokens - self.config.vocab_size), value=float("-inf"))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors under the GPT's own names -> names of the parameters that were loaded."""
        return load_tensors(dict(self.named_parameters()), weights, self.config)


class LlamaGenClassModel(LlamaGenModel):
    """A prompt is one token, vocab_size + label, and then the codes that are already known."""

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (T,) -> both streams (T, S * dim); the null class is the last token."""
        input_ids = self.known_ids(input_ids)
        is_class = input_ids >= self.config.vocab_size
        null = torch.where(is_class, self.num_tokens - 1, input_ids)
        return self.embedding(torch.stack([input_ids, null], dim=1)).flatten(1)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Token ids and positions (T,) -> hidden states of both streams (T, S * dim)."""
        x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.transformer(x, positions)


class CaptionPlaces:
    """vLLM's hook for M-RoPE: each request has positions of its own; see LlamaGenTextModel."""

    config: GPTConfig
    embed_input_ids: Callable[[torch.Tensor], torch.Tensor]
    supports_mrope = True

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: object = None
    ) -> tuple[torch.Tensor, int]:
        """The caption's places (3, n), and what leads from a code's index to its position."""
        first = self.config.max_text_tokens - len(input_tokens)
        places = torch.arange(first, self.config.max_text_tokens).clamp(min=0)
        return places.expand(3, -1), first

    def embedded(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids or embeddings, positions (T,) or (3, T) -> embeddings, positions (T,)."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        # M-RoPE: three equal rows.
        return inputs_embeds, positions[0] if positions.ndim == 2 else positions


class LlamaGenTextModel(CaptionPlaces, LlamaGenModel):
    """A prompt is a caption's features (n, text_dim) without padding, as `prompt_embeds`.

    The reference pads captions on the left: token j of n stands at place max_text_tokens - n + j,
    which is also the row of the null caption that the null stream reads. vLLM's hook for M-RoPE
    gives each request its own positions, so a position here is that place.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = self.config
        self.width = prompt_width(config)
        # Small beside the blocks: every tensor parallel rank has a copy.
        self.fc1 = nn.Linear(config.text_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)
        self.null_features = nn.Parameter(torch.empty(config.max_text_tokens, config.text_dim))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Codes (T,) -> (T, width of a prompt's features), padded with zeros."""
        return F.pad(self.embedding(self.known_ids(input_ids)), (0, self.width - self.config.dim))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Token ids or embeddings, positions (T,) or (3, T) -> both streams (T, S * dim)."""
        config = self.config
        inputs_embeds, positions = self.embedded(input_ids, inputs_embeds, positions)
        # Codes pass the projection too and are dropped after it. It costs less than finding the
        # caption tokens, which would wait for the device.
        null = self.null_features[positions.clamp(0, config.max_text_tokens - 1)]
        features = torch.stack([inputs_embeds[:, : config.text_dim], null], dim=1)
        captions = self.fc2(F.gelu(self.fc1(features), approximate="tanh"))
        codes = inputs_embeds[:, None, : config.dim].expand_as(captions)
        in_caption = (positions < config.max_text_tokens)[:, None, None]
        return self.transformer(torch.where(in_caption, captions, codes).flatten(1), positions)


class LlamaGenOneStreamModel(CaptionPlaces, LlamaGenModel):
    """A model that takes guidance as an input (GFT), of classes or captions: one row per image.

    A prompt is the condition tokens (n, dim) as `prompt_embeds`, which the strength of guidance is
    part of; see vllm_requests.condition_prompt.
    """

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Codes (T,) -> (T, dim)."""
        return self.embedding(self.known_ids(input_ids))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: torch.Tensor | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Token ids or embeddings, positions (T,) or (3, T) -> hidden states (T, dim)."""
        return self.transformer(*self.embedded(input_ids, inputs_embeds, positions))
