"""Comparison of farlight with the own attention of every text architecture of the installed transformers.

    python scripts/compare_architectures.py [model_type …]

Models are tiny, with random weights; the batch is padded on the left. Prints one line for each: `same` (relative difference of
the outputs below 2e-5), `refused` with the reason, `DIFFERENT`, or why it was not compared (its configuration does not shrink,
or none of its attention uses AttentionInterface). Exits with 1 when one differs. Takes some minutes for all.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

import farlight as fl
from farlight.hf.layers import attention_modules

# Small values for the size settings of configurations; each configuration takes the names it has.
SMALL: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "hidden_dim": 48,
    "ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 2, "num_local_experts": 2, "n_routed_experts": 2,
    "num_experts_per_tok": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "index_topk": 12,
    "index_n_heads": 4, "index_head_dim": 8, "vocab_size": 64, "max_position_embeddings": 128, "n_positions": 128,
    "initializer_range": 0.3, "sliding_window": 5, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
}  # fmt: skip
TOKENS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))
REAL = torch.ones(2, 24, dtype=torch.long)
REAL[1, :7] = 0


def build(model_class: Any, config_class: type) -> Any:
    """A small random model. Raises where the configuration rejects the small sizes or the model stays large."""
    sizes = {name: size for name, size in SMALL.items() if getattr(config_class(), name, None) is not None}
    for left_out in ("", "head_dim", "num_key_value_heads"):
        try:
            config = config_class(**{name: size for name, size in sizes.items() if name != left_out})
            break
        except Exception as error:
            last_error = error
    else:
        raise last_error
    with torch.device("meta"):
        if sum(weights.numel() for weights in model_class(config).parameters()) > 30_000_000:
            raise ValueError("does not shrink")
    torch.manual_seed(0)
    model = model_class(config).eval()
    for name, weights in model.named_parameters():
        if "sink" in name:
            torch.nn.init.normal_(weights)
    return model


def run(model: Any) -> Tensor:
    """The first output in float32, rows of real tokens only where it has one row for each token."""
    with torch.no_grad():
        out: Tensor = model(input_ids=TOKENS, attention_mask=REAL)[0].float()
    return out[REAL.bool()] if out.shape[:2] == REAL.shape else out


def compare(name: str) -> tuple[str, str]:
    """(verdict, detail) for one architecture."""
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name) or MODEL_MAPPING_NAMES[name]
    try:
        model = build(getattr(transformers, class_name if isinstance(class_name, str) else class_name[0]), CONFIG_MAPPING[name])
        if not attention_modules(model):
            return "not pluggable", ""
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            model.set_attn_implementation("eager")
        reference, expected = model.config._attn_implementation, run(model)
    except Exception as error:
        return "not tried", f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    calls: list[Any] = []
    try:
        with fl.hf.use_pattern(model, None, observer=calls.append):
            difference = float((run(model) - expected).abs().max() / expected.abs().max())
    except fl.UnsupportedError as error:
        return "refused", str(error)[:100]
    verdict = "same" if difference < 2e-5 and calls else "DIFFERENT"
    return verdict, f"{difference:.1e} from {reference}, {len(calls)} layers"


def main() -> int:
    """The exit status: 1 when an architecture differs."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    verdicts: Counter[str] = Counter()
    for name in sys.argv[1:] or sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_MAPPING_NAMES}):
        verdict, detail = compare(name)
        verdicts[verdict] += 1
        print(f"{name:28} {verdict:14} {detail}", flush=True)
    print(f"transformers {transformers.__version__}: {', '.join(f'{n} {v}' for v, n in verdicts.most_common())}")
    return int(verdicts["DIFFERENT"] > 0)


if __name__ == "__main__":
    sys.exit(main())
