"""Tiny models of every family with random weights, made by transformers: what ortlm is measured against.

``save`` writes such a model as the Hugging Face folder that a user would have, and returns the torch model.
Sizes respect what ONNX Runtime's GroupQueryAttention wants: head_dim a multiple of 16 and half of the rotated
channels a multiple of 8.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import (
    ApertusConfig,
    ArceeConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Ernie4_5Config,
    Exaone4Config,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GemmaConfig,
    Glm4Config,
    GlmConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    HeliumConfig,
    HunYuanDenseV1Config,
    InternLM3Config,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    MixtralConfig,
    NemotronConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PhimoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Config = transformers.PreTrainedConfig

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
# 7 special tokens, 256 bytes and 10 merges make 273 ids; the rest is padding, as in most real models.
VOCAB = 288
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)


def sizes(**changes: Any) -> dict[str, Any]:
    """Return the config values that most rows share, with ``changes``."""
    base: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return base | changes


def longrope(pairs: int) -> dict[str, Any]:
    """Return LongRoPE keys for ``pairs`` frequencies whose two tables differ everywhere."""
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
        "long_factor": [1.5 + 0.9 * i for i in range(pairs)],
    }


def phi3_longrope() -> Config:
    return Phi3Config(**sizes(original_max_position_embeddings=64, rope_parameters=longrope(8)))


def llama3() -> Config:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(
        **sizes(head_dim=32, rms_norm_eps=1e-5, rope_parameters=rope, tie_word_embeddings=True)
    )


def gemma3() -> Config:
    return Gemma3TextConfig(
        **sizes(num_hidden_layers=4, head_dim=32, query_pre_attn_scalar=24, sliding_window=8),
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )


def phimoe() -> Config:
    rope = longrope(8) | {
        "rope_theta": 1e4,
        "original_max_position_embeddings": 64,
        "short_mscale": 1.2,
        "long_mscale": 1.3,
    }
    return PhimoeConfig(
        **sizes(num_local_experts=4, rope_parameters=rope, attention_bias=True, lm_head_bias=True)
    )


def gpt_oss() -> Config:
    rope = {
        "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 64, "rope_theta": 1e4,
    }  # fmt: skip
    return GptOssConfig(
        **sizes(
            num_local_experts=4, num_experts_per_tok=2, head_dim=32, sliding_window=8, rope_parameters=rope,
            swiglu_limit=1.5,
        )
    )  # fmt: skip


def yarn(**more: Any) -> dict[str, Any]:
    """Return YaRN keys that extend 64 tokens eight times."""
    return {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4, **more
    }  # fmt: skip


def olmo3() -> Config:
    rope = {"full_attention": yarn(), "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}}
    return Olmo3Config(**sizes(num_hidden_layers=4, sliding_window=8, rope_parameters=rope))


def ministral3() -> Config:
    rope = yarn(original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.5)
    return Ministral3Config(**sizes(head_dim=32, rope_parameters=rope))


def hunyuan() -> Config:
    return HunYuanDenseV1Config(
        **sizes(
            head_dim=32,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
        )
    )


def granite4(layers: int, **changes: Any) -> Config:
    multipliers = {"embedding_multiplier": 6.0, "logits_scaling": 4.0, "residual_multiplier": 0.4}
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 32}
    kinds = ["full_attention"] * layers
    base = {"layer_types": kinds, "num_hidden_layers": layers, "tie_word_embeddings": True}
    return GraniteMoeHybridConfig(**sizes(**base | multipliers | mamba | changes))


def qwen3_5(heads: int = 4) -> Config:
    return Qwen3_5TextConfig(
        **sizes(
            num_hidden_layers=4,
            head_dim=64,
            linear_num_key_heads=2,
            linear_num_value_heads=heads,
            linear_key_head_dim=16,
            linear_value_head_dim=24,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        )
    )


def several(kind: type[Config], **more: Any) -> Config:
    """Return a Qwen3.5 of ``kind`` with experts."""
    experts = {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    }  # fmt: skip
    dense = {k: v for k, v in qwen3_5().to_dict().items() if k not in ("model_type", "layer_types")}
    return kind(**dense, **experts, **more)


def lfm2() -> Config:
    return Lfm2Config(
        **sizes(
            num_hidden_layers=4,
            block_multiple_of=16,
            layer_types=["conv", "full_attention"] * 2,
            conv_bias=True,
        )
    )


# What comes out of attention is small, because it is an average; a plain MLP knows the last token only, and
# where it outweighs attention, generation runs into one token that repeats itself.
GAINS = {
    "in_proj_qkv": 1.0, "in_proj_z": 0.7, "in_proj_qkvz": 0.7, "o_proj": 3.0, "dense": 4.0, "fc2": 0.5,
    "c_proj": 0.5, "modality_router": 60.0, "prediction_coefs": 0.3, "correction_coefs": 0.5,
}  # fmt: skip
# What is squared grows fast.
SQUARED = {"up_proj": 0.7, "down_proj": 0.5}


def gemma4_e() -> Config:
    """Return what E2B has: per-layer embeddings, shared keys and values, wider MLPs."""
    return Gemma4TextConfig(
        **sizes(
            num_hidden_layers=6,
            layer_types=["sliding_attention", "full_attention"] * 3,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
            head_dim=16,
            num_key_value_heads=1,
            sliding_window=8,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCAB,
            final_logit_softcapping=6.0,
        ),
        global_head_dim=32,
    )


def gemma3n() -> Config:
    """Return AltUp, LAuReL, sparse and dense layers, and per-layer embeddings that lack some tokens."""
    return Gemma3nTextConfig(
        **sizes(
            num_hidden_layers=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"] + ["full_attention"] * 2,
            num_kv_shared_layers=2,
            intermediate_size=[128, 128, 128, 64, 128],
            activation_sparsity_pattern=[0.9, 0.0, 0.5, 0.0, 0.95],
            head_dim=16,
            sliding_window=8,
            hidden_size_per_layer_input=32,
            vocab_size_per_layer_input=VOCAB - 32,
            laurel_rank=16,
        ),
    )


# A row whose name ends in "-old" is saved with the config keys of transformers 4.
FAMILIES: dict[str, Callable[[], Config]] = {
    "phi3": lambda: Phi3Config(**sizes(num_key_value_heads=4)),
    "phi3-window": lambda: Phi3Config(**sizes(sliding_window=8)),
    "phi3-longrope": phi3_longrope,
    "phi3-longrope-old": phi3_longrope,
    "phi4-mini": lambda: Phi3Config(
        **sizes(
            hidden_size=128,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            original_max_position_embeddings=64,
            rope_parameters=longrope(24) | {"partial_rotary_factor": 0.75},
            sliding_window=262144,
        )
    ),
    "phi-1.5": lambda: PhiConfig(**sizes(hidden_size=128, num_key_value_heads=4)),
    "phi-2": lambda: PhiConfig(
        **sizes(
            hidden_size=160,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4},
        )
    ),
    "llama": lambda: LlamaConfig(**sizes(head_dim=16)),
    "llama3": llama3,
    "llama3-old": llama3,
    "llama-linear": lambda: LlamaConfig(**sizes(rope_parameters={"rope_type": "linear", "factor": 4.0})),
    "llama-yarn": lambda: LlamaConfig(
        **sizes(
            head_dim=32,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            },
        )
    ),
    "llama-bias": lambda: LlamaConfig(**sizes(attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralConfig(**sizes(sliding_window=8)),
    "mistral-nemo": lambda: MistralConfig(
        **sizes(head_dim=32, sliding_window=None, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    ),
    "gemma": lambda: GemmaConfig(**sizes(head_dim=32, num_key_value_heads=1)),
    "gemma2": lambda: Gemma2Config(
        **sizes(
            num_hidden_layers=3,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=8,
            attn_logit_softcapping=4.0,
            final_logit_softcapping=6.0,
        )
    ),
    "gemma3": gemma3,
    "gemma3-old": gemma3,
    "gemma4": lambda: Gemma4TextConfig(
        **sizes(
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            head_dim=16,
            sliding_window=8,
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            final_logit_softcapping=6.0,
        ),
        global_head_dim=32,
        num_global_key_value_heads=1,
    ),
    "gemma4-e": gemma4_e,
    "gemma4-moe": lambda: Gemma4TextConfig(
        **sizes(
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            head_dim=16,
            sliding_window=8,
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            final_logit_softcapping=6.0,
            enable_moe_block=True,
            num_experts=8,
            top_k_experts=3,
            moe_intermediate_size=32,
        ),
        global_head_dim=32,
        num_global_key_value_heads=1,
    ),
    "gemma3n": gemma3n,
    "qwen2": lambda: Qwen2Config(**sizes()),
    "qwen2-tied": lambda: Qwen2Config(
        **sizes(
            num_hidden_layers=3,
            tie_word_embeddings=True,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
        )
    ),
    "qwen3": lambda: Qwen3Config(**sizes(head_dim=32, tie_word_embeddings=True)),
    "smollm3": lambda: SmolLM3Config(**sizes(num_hidden_layers=4)),
    "granite": lambda: GraniteConfig(
        **sizes(
            embedding_multiplier=6.0,
            logits_scaling=4.0,
            residual_multiplier=0.4,
            attention_multiplier=0.4,
            tie_word_embeddings=True,
        )
    ),
    "olmo2": lambda: Olmo2Config(**sizes(rope_parameters={"rope_type": "default", "rope_theta": 5e5})),
    "olmo3": olmo3,
    "olmo3-old": olmo3,
    "ministral3": ministral3,
    "ministral3-window": lambda: Ministral3Config(**sizes(head_dim=16, sliding_window=8)),
    "cohere": lambda: CohereConfig(**sizes(logit_scale=0.25, use_qk_norm=True)),
    "cohere-bias": lambda: CohereConfig(**sizes(logit_scale=0.25, attention_bias=True)),
    "cohere2": lambda: Cohere2Config(**sizes(num_hidden_layers=4, logit_scale=0.25, sliding_window=8)),
    "starcoder2": lambda: Starcoder2Config(**sizes(sliding_window=8)),
    "stablelm": lambda: StableLmConfig(**sizes(hidden_size=128, num_attention_heads=2, use_qkv_bias=True)),
    "stablelm-parallel": lambda: StableLmConfig(**sizes(hidden_size=256, use_parallel_residual=True)),
    "stablelm-heads": lambda: StableLmConfig(
        **sizes(hidden_size=256, use_parallel_residual=True, qk_layernorm=True)
    ),
    "nemotron": lambda: NemotronConfig(**sizes(hidden_size=128)),
    "glm": lambda: GlmConfig(**sizes(head_dim=32)),
    "glm4": lambda: Glm4Config(**sizes(head_dim=32)),
    "exaone4": lambda: Exaone4Config(**sizes(num_hidden_layers=4, sliding_window=8)),
    "exaone4-full": lambda: Exaone4Config(**sizes(sliding_window=None, layer_types=["full_attention"] * 2)),
    "seed-oss": lambda: SeedOssConfig(**sizes(head_dim=32)),
    "arcee": lambda: ArceeConfig(**sizes(rope_parameters=yarn())),
    "helium": lambda: HeliumConfig(**sizes(head_dim=16)),
    "ernie4.5": lambda: Ernie4_5Config(**sizes(head_dim=32)),
    "hunyuan": hunyuan,
    "internlm3": lambda: InternLM3Config(**sizes(head_dim=16, attention_bias=True, mlp_bias=True)),
    "apertus": lambda: ApertusConfig(**sizes()),
    "granite4": lambda: granite4(
        3, num_local_experts=0, shared_intermediate_size=96, attention_multiplier=0.4
    ),
    "granite4-moe": lambda: granite4(
        2,
        num_local_experts=4,
        shared_intermediate_size=32,
        position_embedding_type="rope",
        attention_multiplier=0.4,
    ),
    "mixtral": lambda: MixtralConfig(**sizes(num_local_experts=4)),
    "mixtral-window": lambda: MixtralConfig(
        **sizes(num_local_experts=6, num_experts_per_tok=3, sliding_window=8)
    ),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **sizes(
            num_hidden_layers=3,
            mlp_only_layers=[1],
            num_experts=6,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=64,
        )
    ),
    "qwen2-moe-window": lambda: Qwen2MoeConfig(
        **sizes(
            num_hidden_layers=4,
            decoder_sparse_step=2,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=32,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
        )
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **sizes(
            head_dim=32, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=32, norm_topk_prob=True
        )
    ),
    "qwen3-moe-plain": lambda: Qwen3MoeConfig(
        **sizes(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "olmoe": lambda: OlmoeConfig(**sizes(num_experts=8, num_experts_per_tok=3)),
    "granitemoe": lambda: GraniteMoeConfig(
        **sizes(
            num_local_experts=4,
            embedding_multiplier=6.0,
            logits_scaling=4.0,
            residual_multiplier=0.4,
            attention_multiplier=0.4,
            tie_word_embeddings=True,
        )
    ),
    "gpt-oss": gpt_oss,
    "phimoe": phimoe,
    "phimoe-old": phimoe,
    "lfm2": lfm2,
    "qwen3.5": qwen3_5,
    "qwen3.5-moe": lambda: several(Qwen3_5MoeTextConfig),
    "qwen3-next-moe": lambda: several(Qwen3NextConfig, mlp_only_layers=[1]),
    "qwen3-next-moe-sum": lambda: several(Qwen3NextConfig, norm_topk_prob=False, decoder_sparse_step=2),
    "lfm2-moe": lambda: Lfm2MoeConfig(
        **sizes(
            num_hidden_layers=4,
            layer_types=["conv", "full_attention"] * 2,
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            routed_scaling_factor=1.5,
        )
    ),
    "granite4-h": lambda: granite4(
        4,
        num_local_experts=0,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        shared_intermediate_size=96,
        attention_multiplier=0.4,
        mamba_n_groups=2,
        mamba_d_state=16,
    ),
}


class PhimoeRotary(torch.nn.Module):
    """The rotation of Phi-3.5-MoE as its publisher's code has it: long factors beyond the original length.

    transformers 5 uses the short ones at any length.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.rope = config.rope_parameters
        self.dims = config.hidden_size // config.num_attention_heads
        self.original_inv_freq = self.frequencies("short_factor")
        self.inv_freq = self.original_inv_freq
        self.attention_scaling = self.rope["short_mscale"]

    def frequencies(self, table: str) -> torch.Tensor:
        powers = self.rope["rope_theta"] ** (torch.arange(0, self.dims, 2).float() / self.dims)
        return 1.0 / (torch.tensor(self.rope[table]) * powers)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        long = int(position_ids.max()) + 1 > self.rope["original_max_position_embeddings"]
        angles = position_ids[..., None].float() * self.frequencies("long_factor" if long else "short_factor")
        both = torch.cat((angles, angles), dim=-1)
        scale = self.rope["long_mscale" if long else "short_mscale"]
        return both.cos() * scale, both.sin() * scale


# Rows that are mixtures of experts.
MIXTURES = tuple(name for name in FAMILIES if "moe" in name or name.startswith(("mixtral", "gpt-oss")))
# Families with layers whose states have one size.
RECURRENT = (
    "lfm2", "lfm2-moe", "qwen3.5", "qwen3.5-moe", "qwen3-next-moe", "qwen3-next-moe-sum", "granite4-h",
)  # fmt: skip
# Rows that onnxruntime-genai cannot run, and why.
NOT_OFFICIAL: dict[str, str] = {}


def correct_rotation(model: Any) -> None:
    """Give a Phi-3.5-MoE the rotation that it was published with."""
    config = model.config
    if isinstance(config, PhimoeConfig) and config.rope_parameters["rope_type"] == "longrope":
        model.model.rotary_emb = PhimoeRotary(config)


def save(name: str, folder: str | Path, *, seed: int = 0) -> Any:
    """Write the model of row ``name`` into ``folder`` as float32 safetensors with config and tokenizer.

    Returns the torch model in eval mode with eager attention; its generation never stops at an eos token.
    """
    folder = Path(folder)
    config = FAMILIES[name]()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomize(model, seed=seed)
    correct_rotation(model)
    model.generation_config.eos_token_id = [SPECIAL.index("</s>"), SPECIAL.index("<|end|>")]
    model.save_pretrained(folder)
    if name.endswith("-old"):
        path = folder / "config.json"
        path.write_text(json.dumps(old_keys(json.loads(path.read_text())), indent=2))
    save_tokenizer(folder)
    model.generation_config.eos_token_id = None
    return model


def randomize(model: Any, *, seed: int) -> None:
    """Fill every parameter so that no part is a no-op, attention is not uniform and logits are spread.

    Scores and logits get a standard deviation of about 2 to 3; no norm weight is one, no bias is zero, and
    what layers add outweighs the embedding, or a tied model would only repeat its last token.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = type(model).__name__
    centered = ("Gemma", "Nemotron", "Qwen3_5", "Qwen3Next")
    centered_on_zero = kind.startswith(centered) and not kind.startswith(("Gemma3n", "Gemma4"))
    embed = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    width = math.sqrt(embed.shape[1])
    config = model.config
    embed_std = 0.4 / (width if kind.startswith("Gemma") else getattr(config, "embedding_multiplier", 1.0))
    logit_std = 3.0 * getattr(config, "logits_scaling", 1.0) / getattr(config, "logit_scale", 1.0)
    final_norm = logit_std / (embed_std * width) if head is embed else 1.0
    with torch.no_grad():
        for name, scale in model.named_buffers():
            if name.endswith("layer_scalar"):
                scale.fill_(0.9)
            elif name.endswith("expert_bias"):
                scale.copy_(0.2 * torch.randn(scale.shape, generator=generator))
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight is embed:
                weight.copy_(embed_std * noise)
            elif weight is head:
                weight.copy_(logit_std / width * noise)
            elif weight.ndim >= 2 and not name.endswith("bias"):
                # Of experts too, which are one tensor here.
                gains = GAINS | (SQUARED if config.model_type == "apertus" else {})
                if config.model_type == "granitemoehybrid":
                    gains = gains | {"in_proj": 0.8}
                if config.model_type in ("qwen3_5_moe_text", "qwen3_next"):
                    # Choices that rounding does not change.
                    gains = gains | {"gate": 20.0, "experts": 0.4}
                if kind.startswith("Gemma4"):
                    gains = gains | {"proj": 30.0}  # the router's, which reads an eighth of a norm
                gain = gains.get(name.split(".")[-2], 1.5)
                weight.copy_(gain / math.sqrt(weight.shape[-1]) * noise)
            elif name.endswith("bias"):
                weight.copy_(0.2 * noise)
            elif name.endswith(("A_log", "linear_attn.norm.weight")):
                # Of the first, a tenth is forgotten with each token.
                weight.copy_((-2.0 if name.endswith("A_log") else 1.0) + 0.2 * noise)
            else:
                mean = final_norm if name in ("model.norm.weight", "model.final_layernorm.weight") else 1.0
                if kind.startswith(("Gemma3n", "Gemma4")) and "q_norm" in name:
                    mean = 0.5  # its scores are not divided
                weight.copy_(mean * (1.0 + 0.2 * noise) - (1.0 if centered_on_zero else 0.0))


def old_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the keys of transformers 4: ``rope_theta``, ``rope_scaling``, ``torch_dtype``."""
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    old["torch_dtype"] = config.get("dtype", "float32")
    kinds = config.get("layer_types") or []
    if config["model_type"] == "lfm2":
        old["full_attn_idxs"] = [i for i, kind in enumerate(kinds) if kind != "conv"]
        old["block_ff_dim"] = old.pop("intermediate_size")
        old["tie_embedding"] = old.pop("tie_word_embeddings")
    rope = config["rope_parameters"]
    if config["model_type"] in ("olmo3", "granitemoehybrid", "lfm2_moe", "gemma3n_text"):
        old["layer_types"] = config["layer_types"]
    if config["model_type"] == "olmo3":
        rope = rope["full_attention"]
    elif "full_attention" in rope:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        if config["model_type"] != "gemma3n_text":
            old["sliding_window_pattern"] = config["layer_types"].index("full_attention") + 1
        rope = rope["full_attention"]
    rope = dict(rope)
    kind = rope.pop("rope_type", "default")
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if kind == "longrope":
        old["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
        # Phi-3-mini-128k and Phi-3-vision spell the type this way.
        old["rope_scaling"] = rope | {"type": "su"}
    else:
        old["rope_scaling"] = None if kind == "default" else rope | {"rope_type": kind}
    return old


def tokenizer() -> tokenizers.Tokenizer:
    """Return a byte-level BPE with a few merges, special tokens first, that begins texts with ``<s>``."""
    vocab = {token: i for i, token in enumerate(SPECIAL)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[byte] = len(vocab)
    merges = [
        ("Ġ", "t"),
        ("h", "e"),
        ("Ġt", "he"),
        ("i", "n"),
        ("Ġ", "a"),
        ("o", "n"),
        ("r", "e"),
        ("e", "r"),
    ]
    merges += [("in", "g"), ("l", "l")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    result = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    result.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    result.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return result


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` with a chat template."""
    tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
