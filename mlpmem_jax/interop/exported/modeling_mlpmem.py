"""A decoder with an MLP Memory (arXiv 2508.01832), for `transformers` 5 and later.

The memory maps one hidden state of the decoder, and the last tokens where it was trained with them,
to a second next-token distribution. The model returns the logarithm of the interpolation of both
as `logits`: log(λ·p_MEM + (1 − λ)·p_LM). This file stands alone:

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)

Suffixes: B sequences, L tokens, D width of the decoder, M recent tokens (the newest first), X what
the memory reads, E width of the memory, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

_UINT32 = 0xFFFFFFFF


class MlpMemConfig(PretrainedConfig):
    """The configuration of a decoder (`text_config`) and of its memory (`mlp_memory`)."""

    model_type = "mlpmem"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        mlp_memory: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if not isinstance(text_config, PretrainedConfig):
            about = dict(text_config or {"model_type": "gpt2"})
            text_config = AutoConfig.for_model(about.pop("model_type"), **about)
        self.text_config = text_config
        self.mlp_memory = dict(mlp_memory or {})
        super().__init__(**{**others, "tie_word_embeddings": text_config.tie_word_embeddings})


class _Norm(nn.Module):
    """LayerNorm or RMSNorm, computed in float32."""

    def __init__(self, width: int, *, centred: bool, bias: bool, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self._centred, self._epsilon = centred, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        if self._centred:
            y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self._epsilon) * self.weight.float()
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype)


class _Conv1D(nn.Module):
    """A linear layer whose matrix is stored as [in, out], as in GPT-2."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.T, self.bias)


class _Gpt2Ffn(nn.Module):
    """GELU in its tanh form."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.c_fc = _Conv1D(width, hidden, bias=bias)
        self.c_proj = _Conv1D(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class _LlamaFfn(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=bias)
        self.up_proj = nn.Linear(width, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nn.Module):
    """A residual feed-forward block; names as in the official release."""

    def __init__(self, norm: str, norm_module: nn.Module, ffn: nn.Module) -> None:
        super().__init__()
        self.add_module(norm, norm_module)
        self.mlp = ffn
        self._norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(getattr(self, self._norm)(x))


class Memory(nn.Module):
    """The memory. It mixes no tokens."""

    def __init__(self, about: dict[str, Any], vocab_size: int) -> None:
        """Makes a memory.

        Args:
            about: `mlp_memory` of `config.json`.
        """
        super().__init__()
        self.about = about
        width, inputs = about["width"], about["input_width"]
        is_gelu, biases = about["block"] == "gelu", about["biases"]

        def norm() -> nn.Module:
            epsilon = about["norm_epsilon"]
            return _Norm(width, centred=is_gelu, bias=biases == "all", epsilon=epsilon)

        if about["input_norm"] == "standardize":
            self.input_mean = nn.Parameter(torch.zeros(inputs))
            self.input_inverse_std = nn.Parameter(torch.ones(inputs))
        elif about["input_norm"] == "rms":
            epsilon = about["norm_epsilon"]
            self.input_norm = _Norm(inputs, centred=False, bias=False, epsilon=epsilon)
        if inputs != width:
            bias = about["projection_bias"] == "learned"
            self.embedding_transform = nn.Linear(inputs, width, bias=bias)
        if about["recent_tokens"] and about["recent_table"] == "own":
            self.recent = nn.Embedding(vocab_size, about["recent_width"])
        if about["ngram_orders"]:
            rows = len(about["ngram_orders"]) * about["ngram_rows"]
            self.ngrams = nn.Embedding(rows, about["ngram_width"])
        ffn: Callable[..., nn.Module] = _Gpt2Ffn if is_gelu else _LlamaFfn
        blocks = nn.ModuleList(
            _Block(
                "ln_1" if is_gelu else "input_layernorm",
                norm(),
                ffn(width, about["ffn_width"], bias=biases != "none"),
            )
            for _ in range(about["num_layers"])
        )
        # Names of the official release, so that a prefix is all that tells the two apart.
        self._blocks, self._final = ("h", "ln_f") if is_gelu else ("layers", "norm")
        self.add_module(self._blocks, blocks)
        self.add_module(self._final, norm())
        if about["head"] == "untied":
            self.lm_head = nn.Linear(width, vocab_size, bias=False)
        if about["gate"] == "learned":
            self.gate = nn.Linear(inputs, 1)

    @property
    def num_read_tokens(self) -> int:
        """M."""
        return max([self.about["recent_tokens"], *self.about["ngram_orders"]])

    def inputs(
        self, state_BLD: torch.Tensor, recent_BLM: torch.Tensor | None, table_VD: torch.Tensor
    ) -> torch.Tensor:
        """Returns the normalised inputs, float32: the state, and embeddings of the last tokens."""
        about, read = self.about, [state_BLD.float()]
        if recent_BLM is not None and about["recent_tokens"]:
            table = self.recent.weight if about["recent_table"] == "own" else table_VD
            read.append(_rows(table, recent_BLM[..., : about["recent_tokens"]]))
        if recent_BLM is not None and about["ngram_orders"]:
            rows = about["ngram_rows"]
            index = [
                place * rows + hashed(recent_BLM[..., :order], rows)
                for place, order in enumerate(about["ngram_orders"])
            ]
            read.append(_rows(self.ngrams.weight, torch.stack(index, dim=-1)))
        x_BLX = torch.cat(read, dim=-1)
        if about["input_norm"] == "standardize":
            return (x_BLX - self.input_mean.float()) * self.input_inverse_std.float()
        return self.input_norm(x_BLX) if about["input_norm"] == "rms" else x_BLX

    def interpolation(self, input_BLX: torch.Tensor) -> torch.Tensor:
        """Returns λ, float32 [B, L] or one number."""
        fixed = self.about["interpolation"]
        if fixed is not None:
            return torch.tensor(float(fixed), device=input_BLX.device)
        floor = self.about["gate_floor"]
        logit_BL = input_BLX @ self.gate.weight[0].float() + self.gate.bias.float()
        return floor + (1 - 2 * floor) * torch.sigmoid(logit_BL)

    def forward(self, input_BLX: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
        """Returns the memory's logits, float32 [B, L, V]."""
        head_VE = self.lm_head.weight if self.about["head"] == "untied" else head_VD
        x_BLE = input_BLX.to(head_VE.dtype)
        if hasattr(self, "embedding_transform"):
            x_BLE = self.embedding_transform(x_BLE)
        for block in getattr(self, self._blocks):
            x_BLE = block(x_BLE)
        x_BLE = getattr(self, self._final)(x_BLE) / self.about["temperature"]
        return F.linear(x_BLE, head_VE).float()


def _rows(table: torch.Tensor, index_BLN: torch.Tensor) -> torch.Tensor:
    """Returns rows of a table side by side, float32 [B, L, N W]."""
    return F.embedding(index_BLN, table).float().flatten(-2)


def hashed(token_BLN: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Hashes n-grams, the newest token first, to rows of a table (FNV-1a, then mixed).

    In 64 bits what was trained in unsigned 32: products are cut to their last 32 bits.
    """
    hash_BL = torch.full_like(token_BLN[..., 0], 2166136261)
    for place in range(token_BLN.shape[-1]):
        hash_BL = _times(hash_BL ^ (token_BLN[..., place] & _UINT32), 16777619)
    hash_BL = _times(hash_BL ^ (hash_BL >> 15), 2246822507)
    return (hash_BL ^ (hash_BL >> 13)) % num_rows


def _times(number: torch.Tensor, factor: int) -> torch.Tensor:
    """Returns a product modulo 2^32; its halves stay below 2^63."""
    high = ((number * (factor >> 16)) & 0xFFFF) << 16
    return (high + number * (factor & 0xFFFF)) & _UINT32


def interpolated(memory: torch.Tensor, decoder: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns log(λ·p_MEM + (1 − λ)·p_LM), exact at 0 and 1.

    Args:
        memory: log p_MEM.
        decoder: log p_LM.
        weight: λ, broadcast against both.
    """
    tiny = torch.finfo(torch.float32).tiny
    inside = weight.clamp(tiny, 1 - 2**-24)
    mixed = torch.logaddexp(inside.log() + memory, torch.log1p(-inside) + decoder)
    return torch.where(weight <= 0, decoder, torch.where(weight >= 1, memory, mixed))


class MlpMemForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder and its memory; parameters of the decoder have the names of its own family."""

    config_class = MlpMemConfig
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True

    def __init__(self, config: MlpMemConfig) -> None:
        super().__init__(config)
        decoder = AutoModel.from_config(config.text_config)
        self._decoder = decoder.base_model_prefix  # "model" or "transformer"
        setattr(self, self._decoder, decoder)
        width, vocab_size = config.text_config.hidden_size, config.text_config.vocab_size
        self.lm_head = nn.Linear(width, vocab_size, bias=False)
        self.memory = Memory(config.mlp_memory, vocab_size)
        embeddings = next(name for name in ("embed_tokens", "wte") if hasattr(decoder, name))
        tied = {"lm_head.weight": f"{self._decoder}.{embeddings}.weight"}
        self._tied_weights_keys = tied if config.tie_word_embeddings else {}
        self._no_split_modules = [*(decoder._no_split_modules or []), "_Block"]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the decoder's embeddings."""
        return getattr(self, self._decoder).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's embeddings."""
        getattr(self, self._decoder).set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the decoder's head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the decoder's head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        context_ids: torch.Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Returns log-probabilities of the next token as `logits`, float32 [B, L, V].

        Args:
            input_ids: int64 [B, L].
            attention_mask: 0 at padding.
            position_ids: As the decoder takes them.
            labels: Tokens whose loss is wanted, -100 elsewhere.
            logits_to_keep: How many of the last places are wanted, or which; 0: all.
            context_ids: All tokens so far, those of `input_ids` the last; only where a memory
                that reads tokens goes on from a cache. `generate` passes them.
            others: What the decoder takes besides: a cache, `use_cache`, …
        """
        decoder = getattr(self, self._decoder)
        recent_BLM = self._recent(input_ids, attention_mask, context_ids, others)
        with self._state_of(decoder) as seen:
            outputs = decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{**others, "return_dict": True},
            )
        kept: Any = logits_to_keep
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep or None, None)
        logprob_BLV = F.log_softmax(self.lm_head(outputs.last_hidden_state[:, kept]).float(), -1)
        input_BLX = self.memory.inputs(
            seen[0][:, kept],
            None if recent_BLM is None else recent_BLM[:, kept],
            self.get_input_embeddings().weight,
        )
        memory_BLV = F.log_softmax(self.memory(input_BLX, self.lm_head.weight), -1)
        weight = self.memory.interpolation(input_BLX)[..., None]
        logits = interpolated(memory_BLV, logprob_BLV, weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, logits.shape[-1])
        fields = CausalLMOutputWithPast.__dataclass_fields__
        passed = {key: value for key, value in outputs.items() if key in fields}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **passed)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        """As of any model, with all tokens so far for a memory that reads them."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if self.memory.num_read_tokens:
            inputs["context_ids"] = self._unpadded(input_ids, kwargs.get("attention_mask"))
        return inputs

    @contextmanager
    def _state_of(self, decoder: nn.Module) -> Iterator[list[torch.Tensor]]:
        """Lets the decoder leave the state that the memory reads: [[B, L, D]]."""
        about, seen = self.config.mlp_memory, []
        block = (decoder.h if hasattr(decoder, "h") else decoder.layers)[about["layer"] - 1]

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append(inputs[0])

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        if about["site"] == "ffn_input":
            handle = block.mlp.register_forward_pre_hook(before)
        else:
            handle = block.register_forward_hook(after)
        try:
            yield seen
        finally:
            handle.remove()

    def _recent(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        context_ids: torch.Tensor | None,
        others: dict[str, Any],
    ) -> torch.Tensor | None:
        """Returns the recent tokens of all places, [B, L, M]; separators before a document."""
        num, separator = self.memory.num_read_tokens, self.config.mlp_memory["separator_id"]
        if not num:
            return None
        if input_ids is None:
            raise ValueError("this memory reads tokens: pass input_ids, not inputs_embeds")
        if context_ids is None:
            cache = others.get("cache", others.get("past_key_values"))
            if num > 1 and cache is not None and cache.get_seq_length():
                raise ValueError(
                    f"this memory reads the last {num} tokens: pass context_ids, all tokens so far "
                    "with those of input_ids at the end, beside the cache"
                )
            context_ids = self._unpadded(input_ids, attention_mask)
        stream_BT = F.pad(context_ids, (num - 1, 0), value=separator)
        token_BLM = stream_BT.unfold(1, num, 1).flip(-1)[:, -input_ids.shape[1] :]
        separators_BLM = token_BLM == separator
        ended_BLM = separators_BLM.cumsum(-1) - separators_BLM.long() > 0
        return token_BLM.masked_fill(ended_BLM, separator)

    def _unpadded(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns tokens with separators for padding."""
        if attention_mask is None or attention_mask.shape != input_ids.shape:
            return input_ids
        separator = self.config.mlp_memory["separator_id"]
        return input_ids.masked_fill(attention_mask == 0, separator)
