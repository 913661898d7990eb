"""Tiny models of any architecture of transformers, with random weights, and inputs that they take.

Every size in a configuration, those of nested ones included, is shrunk by its name; what a configuration derives from others it
derives again. Where the class rejects the sizes, or the model does not run, fewer of them are shrunk.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = r"(num|n|encoder|decoder|hidden|text|vision|audio)_?.*layers?$|n_layer$|^depth$|num_blocks|num_stages_layers|^layers$"
# Sizes of configurations by the name of the setting; the first match counts.
RULES: list[tuple[re.Pattern[str], int]] = [(re.compile(pattern), size) for pattern, size in [
    (r"max_position|n_positions|max_seq|n_ctx|context_length|max_source|max_target|max_len", 128),
    (r"(key_value|kv|attn)_heads$|^num_key_value_heads|n_head_kv|num_kv", 2),
    (r"linear_num_(key|value)_heads|ssm_heads|mamba_n_heads", 4),
    (r"heads(_per_layer)?$|n_head$|_heads_", 4),
    (r"num_experts_per_tok|moe_topk?$|^moe_k$|num_selected|experts_per|top_?k$|n_group$|topk_group|n_shared|num_shared", 1),
    (r"experts?$|num_local_experts|routed_experts|experts_number", 2),
    (r"first_k_dense|num_dense_layers|moe_layer_start", 1),
    (r"q_lora_rank|kv_lora_rank|lora_rank|_rank$|_lora_dim", 16),
    (r"qk_rope_head_dim|rope_head_dim|rotary_dim$", 4),
    (r"index_topk", 12),
    (r"head_dim|d_kv$|dim_head|head_size|qk_head|kv_channels|attention_head_size|query_pre_attn_scalar|global_head_dim", 8),
    (LAYERS, 2),
    (r"(moe|expert|shared).*(intermediate|ffn|hidden)", 16),
    (r"intermediate|ffn|mlp_dim|d_ff$|n_inner|inner_dim|hidden_dim$|feedforward|dim_feed", 48),
    (r"hidden_size$|d_model|n_embd|embed_dim|embedding_size|embed_size|^dim$|^width$|projection_dim|word_embed|_width$|n_embed|"
     r"hidden_channels|output_dim|out_hidden_size|embedding_dim|cross_attention_dim|lru_width|proj_dim|emb_dim|_hidden_dim|"
     r"hidden_size_per_layer_input|text_dim|d_embed|encoder_dim|conv_dim$|vision_dim|mm_embed", 32),
    (r"vocab_size|vocab_size_per_layer_input|num_embeddings|n_words", 64),
    (r"sliding_window|local_attention$|attention_window|attention_chunk_size|window_size$", 8),
    (r"image_size|img_size|input_resolution|crop_size", 32),
    (r"^patch_size$|vision_patch_size", 8),
    (r"num_frames|tubelet", 2),
    (r"num_mel_bins|feature_size|n_mels|input_feat_per_channel", 16),
    (r"relative_attention_num_buckets|num_buckets|position_buckets", 16),
    (r"mamba_d_state|state_size|ssm_state", 8),
    (r"num_codebooks", 2),
]]  # fmt: skip
FLOATS = [
    (re.compile(r"layer_?scale|lambda_init"), 1.0),
    (re.compile(r"initializer_range|init_std"), 0.3),
    (re.compile(r"drop"), 0.0),
]
MAX_PARAMETERS = 60_000_000
NOTHING = r"(?!)"


class Attempt(NamedTuple):
    """A way to shrink a configuration."""

    left_out: str = NOTHING  # a pattern of names that keep their defaults
    derives: bool = True  # what the constructor has no value for by default is left to it
    own_keys: bool = False  # every head has keys of its own
    layers: int = 2


# In the order in which they are tried; hybrids need several layers to have one of attention.
ATTEMPTS = [
    Attempt(), Attempt(own_keys=True), Attempt(derives=False), Attempt(derives=False, own_keys=True),
    Attempt("head_dim", derives=False), Attempt("head_dim", derives=False, own_keys=True), Attempt(layers=9),
    Attempt(derives=False, layers=9), Attempt("head_dim|heads", derives=False),
    Attempt("hidden_size|heads|dim|width|d_model|intermediate|embd", derives=False),
]  # fmt: skip
# Ids up to here are words; those of special tokens are taken from the end of the vocabulary.
WORDS, VOCABULARY = 36, 64
# Settings without which a configuration describes no model.
NEEDED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "dots1": {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 2},
    "chameleon": {"vocabulary_map": {"<image>": 60, **{f"IMGIMG{'ABCDEFGHIJ'[n % 10]}{n}Z": n for n in range(4, 8)}}},
    "emu3": {"vocabulary_map": {"<image>": 60}},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hunyuan_vl_text": {"head_dim": 8},
    "informer": {"prediction_length": 8, "context_length": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "step3p5": {"sliding_window": 8},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "xmod": {"default_language": "en_XX"},
}
TOKENS = torch.randint(3, WORDS, (2, 24), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, 24, dtype=torch.long)
REAL[1, :7] = 0
FIRST_MAPPINGS = [
    f"MODEL_FOR_{task}_MAPPING_NAMES"
    for task in ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ")
] + ["MODEL_MAPPING_NAMES"]


# ---- classes ------------------------------------------------------------------------------------------------------------
def class_of(name: str) -> Any:
    """The model class of a model type: a language model where there is one, else the bare model. Raises LookupError."""
    others = sorted(x for x in dir(modeling_auto) if x.startswith("MODEL_") and x.endswith("_MAPPING_NAMES"))
    for mapping in dict.fromkeys(FIRST_MAPPINGS + others):
        class_name = getattr(modeling_auto, mapping).get(name)
        if class_name is not None:
            return getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])
    config_class = CONFIG_MAPPING[name]
    folder = config_class.__module__.rpartition(".configuration_")
    module = importlib.import_module(f"{folder[0]}.modeling_{folder[2]}")
    parts = [
        x for x in vars(module).values()
        if inspect.isclass(x) and issubclass(x, PreTrainedModel) and not x.__name__.endswith("PreTrainedModel")
        and x.__module__ == module.__name__ and getattr(x, "config_class", None) is config_class
    ]  # fmt: skip
    if not parts:
        raise LookupError("no model class has this configuration")
    return min(parts, key=lambda x: len(x.__name__))


# ---- configurations -----------------------------------------------------------------------------------------------------
def shrunk(config: PreTrainedConfig, attempt: Attempt, ids: Iterator[int]) -> dict[str, Any]:
    """Settings of a small model of this architecture that differ from those of `config`; ids for its special tokens."""
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        is_derived = attempt.derives and getattr(type(config), name, None) is None and type(value) is not dict
        if isinstance(value, PreTrainedConfig):
            small[name] = shrunk(value, attempt, ids) | ({"model_type": value.model_type} if value.model_type else {})
        elif name[0] != "_" and type(value) is not bool and not is_derived and not re.search(attempt.left_out, name):
            small[name] = _small(name, value, ids)
            if attempt.layers > 2 and small[name] == 2 and re.search(LAYERS, name):
                small[name] = min(attempt.layers, value)
    changed = {name: value for name, value in small.items() if value != vars(config)[name]}
    return changed | {"use_cache": False} | NEEDED.get(config.model_type, {})


def _small(name: str, value: Any, ids: Iterator[int]) -> Any:
    """The value of one setting in a small model."""
    if isinstance(value, int):
        if re.search(r"_token_(id|index)$|_id$", name):
            return value if 0 <= value <= 2 else next(ids)
        size = next((size for rule, size in RULES if rule.search(name)), value)
        return min(size, value) if value > 0 else value
    if isinstance(value, float):
        return next((size for rule, size in FLOATS if rule.search(name)), value)
    if name == "rope_parameters" and isinstance(value, dict) and "rope_theta" in value:  # not one for each type of layer
        quarter = round(4 * value.get("partial_rotary_factor", 1.0))  # of the half of a head_dim of 8 that is rotated
        return value | {"mrope_section": [quarter - quarter // 2, quarter // 2 - quarter // 4, quarter // 4]}
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return type(value)(_short_list(name, list(value)))
    return value


def _short_list(name: str, values: list[int]) -> list[int]:
    """A list of sizes, one for each stage of a model, or of layer numbers."""
    if re.search(r"ind(ex|ic)|idx|[^f]_layers?$|interval", name):
        return sorted({min(value, 1) for value in values})
    if "depth" in name:
        return [1] * len(values)
    if "heads" in name:
        return [min(value, 2) for value in values]
    if re.search(r"hidden_sizes|embed_dims?|dims$|channels|widths", name):
        return [min(value, 32) for value in values]
    if re.search(r"section", name):  # of rotary frequencies: head_dim / 2 = 4 in all
        return ([2, 1, 1] + [0] * len(values))[: len(values)]
    return values


def configurations(config_class: Any, rejections: list[Exception] | None = None) -> Iterator[Any]:
    """Small configurations, most shrunk first; those that the class rejects are left out, their errors in `rejections`."""
    for attempt in ATTEMPTS:
        ids = iter(range(VOCABULARY - 1, WORDS, -1))
        try:
            default = config_class(**NEEDED.get(config_class.model_type, {}))
            small = shrunk(default, attempt, ids)
            if attempt.own_keys and "num_key_value_heads" in small:
                small["num_key_value_heads"] = small.get("num_attention_heads", small["num_key_value_heads"])
            yield config_class(**small)
        except Exception as error:
            if rejections is not None:
                rejections.append(error)


def uses_interface(model_class: Any) -> bool:
    """Whether the file of the class looks attention up in AttentionInterface."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(importlib.import_module(model_class.__module__))


def build(model_class: Any, config: Any) -> Any:
    """A small model whose weights let attention matter. Raises ValueError where it stays large."""
    with torch.device("meta"):
        count = sum(weights.numel() for weights in model_class(config).parameters())
    if count > MAX_PARAMETERS:
        raise ValueError(f"does not shrink: {count:,} weights")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if not weights.is_floating_point() or not weights.numel():
                continue
            if weights.dim() > 1:
                weights.normal_(std=1.5 * weights[0].numel() ** -0.5)
            elif "sink" in name or not bool(weights.any()):  # sinks, biases and gates that begin as 0
                weights.normal_(std=0.3)
    return model


# ---- inputs -------------------------------------------------------------------------------------------------------------
def inputs(model: Any) -> Iterator[dict[str, Any]]:
    """Inputs of the model's kind, likely ones first; none that its `forward` does not name."""
    parameters = inspect.signature(model.forward).parameters
    required = [
        x.name for x in parameters.values()
        if x.default is x.empty and x.kind not in (x.VAR_POSITIONAL, x.VAR_KEYWORD)
    ]  # fmt: skip
    known = _known_inputs(model.config)
    decoder = {"decoder_input_ids": TOKENS[:, :9]} if "decoder_input_ids" in parameters else {}
    always = {"bbox": known["bbox"]} if "bbox" in parameters else {}
    for candidate in _candidates(model, known):
        given = {name: x for name, x in (candidate | decoder | always).items() if name in parameters}
        given |= {name: known[name] for name in required if name in known and name not in given}
        if any(name in candidate for name in given) and all(name in given for name in required):
            yield given
    if missing := [name for name in required if name not in known]:
        raise LookupError(f"needs inputs of another kind: {', '.join(missing)}")


def _candidates(model: Any, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    text = {"input_ids": TOKENS, "attention_mask": REAL}
    image = {"pixel_values": known["pixel_values"]}
    main = getattr(model, "main_input_name", "input_ids")
    if getattr(model.config, "is_encoder_decoder", False) and main == "input_ids":
        yield text
    if main == "pixel_values":
        yield image
        yield {"pixel_values": known["pixel_values"][:, None].repeat(1, 2, 1, 1, 1)}
    if main in ("input_features", "input_values", "audio_values"):
        sound = known["input_features"]
        yield {main: sound}
        yield {main: sound.transpose(1, 2).contiguous()}
        yield {main: known["input_values"]}
        yield {main: known["input_values"][:, None]}
    yield text
    yield {"input_ids": TOKENS}
    yield text | image
    yield {"inputs_embeds": known["inputs_embeds"], "attention_mask": REAL}
    yield {"inputs_embeds": known["inputs_embeds"]}
    yield {"hidden_states": known["inputs_embeds"]}
    yield {"hidden_states": known["patches"], "pixel_values": known["patches"], "grid_thw": known["grid_thw"]}
    yield image
    yield {"input_features": known["input_features"]}
    yield {"input_values": known["input_values"]}


def _known_inputs(config: Any) -> dict[str, Any]:
    """Inputs by the name of the argument."""
    draw = torch.Generator().manual_seed(0)
    size = _size(config, 32, "image_size", "img_size")
    channels = _size(config, 3, "num_channels", "in_channels", "in_chans")
    mels = _size(config, 16, "num_mel_bins", "n_mels", "feature_size", "input_feat_per_channel")
    frames = 2 * _size(config, 64, "max_source_positions")
    width = _size(config, 32, "hidden_size", "d_model", "embed_dim", "hidden_dim", "dim", "width")
    other = _size(config, width, "encoder_hidden_size", "cross_attention_dim", "cross_attention_hidden_size")
    patch = _size(config, 8, "patch_size") ** 2 * channels * _size(config, 1, "temporal_patch_size")
    states = torch.randn(2, 24, width, generator=draw)
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {
        "input_ids": TOKENS,
        "attention_mask": REAL,
        "pixel_values": torch.randn(2, channels, size, size, generator=draw),
        "input_features": torch.randn(2, mels, frames, generator=draw),
        "input_features_mask": torch.ones(2, frames, dtype=torch.long),
        "input_values": torch.randn(2, 4000, generator=draw),
        "inputs_embeds": states,
        "hidden_states": states,
        "query_embeds": torch.randn(2, 24, width, generator=draw),
        "encoder_hidden_states": torch.randn(2, 24, other, generator=draw),
        "bbox": torch.randint(0, 8, (2, 24, 1), generator=draw).expand(-1, -1, 4).contiguous(),
        "grid_thw": grid,
        "image_grid_thw": grid,
        "patches": torch.randn(32, patch, generator=draw),
    }


def _size(config: Any, default: int, *names: str) -> int:
    """The first size of one of these names, here or in nested configurations."""
    for name in names:
        for value in _sizes_named(config, name):
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int):
                return value
    return default


def _sizes_named(config: Any, name: str) -> Iterator[Any]:
    if vars(config).get(name) is not None:
        yield vars(config)[name]
    for sub in vars(config).values():
        if isinstance(sub, PreTrainedConfig):
            yield from _sizes_named(sub, name)
