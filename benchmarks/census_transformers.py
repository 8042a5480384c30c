"""The census's models of transformers: every class for classification, with a configuration of tiny sizes."""

import inspect
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.census_zoo import BATCH, CLASSES, LIMIT, Member, Subject, cross_entropy, layers_in

TASKS = re.compile(r"For(Sequence|Token|Image|Audio|AudioFrame|Video)Classification")

TRANSFORMERS = (
    "score", "classifier", "classification_head", "classifiers", "cls", "head", "logits_proj", "sequence_summary.summary",
    "fc", "output_projection", "lin", "proj", "dist_head", "cls_classifier", "distillation_classifier",
)  # fmt: skip
"""Attributes with the classifier in transformers' models."""

TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "n_layer_total", "num_hidden_groups", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "num_frames": 4,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
    "max_source_positions": 50,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "pooler_hidden_size": 32,
    "image_size": 64,
    "crop_size": 64,
    "frames_per_clip": 4,
}
FEWER = {name: TINY[name] for name in TINY if TINY[name] == 2 or name == "vocab_size"}
"""Used where the tiny sizes are inconsistent: only fewer layers."""

OWN: dict[str, dict[str, Any]] = {
    "GPTNeo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "GPTJ": {"rotary_dim": 8},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen3_5": {"layer_types": ["linear_attention", "full_attention"], "depth": 2, "out_hidden_size": 32},
    "Reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": (4, 4),
        "axial_pos_embds_dim": (16, 16),
        "num_buckets": 2,
        "is_decoder": False,
    },
    "Perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "num_self_attends_per_block": 1,
        "num_blocks": 1,
        "num_self_attention_heads": 1,
        "num_cross_attention_heads": 1,
    },
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "initializer_range": 0.2},
    "Xmod": {"default_language": "en_XX"},
    "Zamba": {
        "layer_types": ["mamba", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "use_mamba_kernels": False,
        "n_mamba_heads": 2,
    },
    "Zamba2": {"layer_types": ["mamba", "hybrid"], "use_mamba_kernels": False, "hybrid_layer_ids": [1]},
    "T5": {"decoder_start_token_id": 0},
}
"""Further sizes that a family needs."""

SPECIAL = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 4, "cls_token_id": 5}


def transformers_members() -> list[Member]:
    """Every class that classifies."""
    import transformers

    names = [name for name in dir(transformers) if TASKS.search(name)]
    names = [name for name in names if not name.startswith(("Auto", "DataCollator"))]
    return [Member("transformers", name, name) for name in names]


def tiny_config(kind: Any, wanted: dict[str, Any]) -> Any:
    """A configuration of a class, and of its parts, with those of the wanted values that it has."""
    import transformers

    known = inspect.signature(kind.__init__).parameters
    values = {name: value for name, value in wanted.items() if name in known}
    aliases = getattr(kind, "attribute_map", {})
    values |= {aliases[name]: value for name, value in wanted.items() if aliases.get(name) in known}
    values |= {name: value for name, value in SPECIAL.items() if name in known and "vocab_size" in values}
    parts = getattr(kind, "sub_configs", {})
    usual = kind() if parts else None
    for name in parts:
        if isinstance(part := getattr(usual, name, None), transformers.PreTrainedConfig):
            values[name] = tiny_config(type(part), wanted)
    return kind(**values)


def transformers_subject(name: str) -> Iterator[Subject]:
    """A transformers model in ever larger sizes, from the tiniest on."""
    import transformers

    kind = getattr(transformers, name)
    token = re.search("For(Token|AudioFrame)", name)
    own = next((sizes for family, sizes in sorted(OWN.items(), reverse=True) if name.startswith(family)), {})
    for wanted in (TINY, FEWER, {}):
        try:
            config = tiny_config(kind.config_class, {**wanted, **own})
            if own.get("decoder_start_token_id") is not None:
                config.decoder_start_token_id = own["decoder_start_token_id"]
            config.num_labels = CLASSES
            config.problem_type = None
            with torch.device("meta"):
                size = sum(p.numel() for p in kind(config).parameters())
        except Exception as error:  # noqa: BLE001 - the errors for sizes that do not fit differ between models
            _failures.append(f"{type(error).__name__}: {error}")
            continue
        if size > LIMIT:
            _failures.append(f"{size:,} parameters are too many")
            continue
        model = kind(config)
        for inputs in _inputs(kind, config):
            called = {**inputs}
            parameters = inspect.signature(kind.forward).parameters

            def logits(model: nn.Module = model, inputs: dict[str, Any] = called) -> Tensor:
                out = model(**inputs)
                return out.logits if hasattr(out, "logits") else out[0]

            def loss(model: nn.Module = model, inputs: dict[str, Any] = called, known: Any = parameters) -> Tensor:
                with torch.no_grad():
                    shape = logits(model, inputs).shape
                if "labels" not in known or "AudioFrame" in name:
                    return cross_entropy(logits(model, inputs))
                labels = torch.arange(shape[:-1].numel()).view(shape[:-1]) % CLASSES
                if token and len(shape) == 3:
                    labels[:, -2:] = -100
                return model(**inputs, labels=labels).loss

            heads = sorted({path for part in TRANSFORMERS for path in layers_in(model, part)})
            word = "transformers' " + " | ".join(TRANSFORMERS)
            yield Subject(model, loss, logits, heads or layers_in(model, ""), word, _shapes(inputs))


_failures: list[str] = []


def build_failures() -> str:
    """The errors of the sizes that failed, each once."""
    return " | ".join(dict.fromkeys(_failures))


def _shapes(inputs: dict[str, Any]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items() if isinstance(x, Tensor))


def _inputs(kind: Any, config: Any) -> Iterable[dict[str, Any]]:
    """Inputs to try, chosen by the name of the model's main input."""
    main = kind.main_input_name
    parameters = inspect.signature(kind.forward).parameters
    text = config.get_text_config()
    vocab = getattr(text, "vocab_size", None) or 128
    known = set(parameters)
    if "pixel_values_videos" in known and "input_ids" not in known:
        side = getattr(config, "crop_size", None) or getattr(config, "image_size", 64)
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", 4)
        yield {"pixel_values_videos": torch.randn(BATCH, frames, 3, side, side)}
    elif "input_ids" in known:
        ids = torch.randint(10, min(vocab, 120), (BATCH, 16))
        ids[:, -1] = getattr(text, "eos_token_id", None) or 3
        if isinstance(ids[0, -1].item(), list):
            ids[:, -1] = 3
        inputs: dict[str, Any] = {"input_ids": ids}
        if "bbox" in known:
            inputs["bbox"] = torch.randint(0, 50, (BATCH, 16, 4)).sort(-1).values
        yield inputs
        yield {**inputs, "attention_mask": torch.ones_like(ids)}
        if "pixel_values" in known:
            side = getattr(config, "image_size", None) or 224
            yield {**inputs, "pixel_values": torch.randn(BATCH, 3, side, side)}
        if "image" in known:
            yield {**inputs, "image": torch.randn(BATCH, 3, 224, 224)}
    elif "pixel_values" in known or main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        native = getattr(vision, "image_size", None)
        channels = getattr(vision, "num_channels", 3) or 3
        if "spatial_shapes" in known:  # an image is a row of patches
            pixels = channels * vision.patch_size**2
            yield {
                "pixel_values": torch.randn(BATCH, 16, pixels),
                "spatial_shapes": torch.full((BATCH, 2), 4),
                "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
            }
        for side in [native] if isinstance(native, int) else [64, 128, 224]:
            shape = (BATCH, channels, side, side)
            if "Video" in kind.__name__:
                shape = (BATCH, getattr(vision, "num_frames", 4), *shape[1:])
            yield {"pixel_values": torch.randn(shape)}
    elif "input_features" in known:
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_projection_input_dim", 80)
        time = 2 * getattr(config, "max_source_positions", 32)
        yield {"input_features": torch.randn(BATCH, bins, time)}
        yield {"input_features": torch.randn(BATCH, 64, bins)}
    elif "input_values" in known:
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
            yield {"input_values": torch.randn(BATCH, config.max_length, config.num_mel_bins)}
        yield {"input_values": torch.randn(BATCH, 8000)}
    elif "inputs" in known:
        if "Sequence" in kind.__name__:
            yield {
                "inputs": torch.randint(10, min(vocab, 120), (BATCH, getattr(config, "max_position_embeddings", 16)))
            }
        side = getattr(config, "image_size", 56)
        yield {"inputs": torch.randn(BATCH, 3, side, side)}
        yield {"inputs": torch.randn(BATCH, 3, 224, 224)}
    else:
        _failures.append(f"no input is known for {sorted(known)}")
