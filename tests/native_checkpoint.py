"""A checkpoint as the reference's training writes it: its names, its config.yaml, scaled down."""

import math

import torch
import yaml

from hub_upload.tiny import tiny_config
from modeling_stts import Molmo2SttsConfig, Molmo2SttsForConditionalGeneration


NUM_DECLARED_LAYERS, NUM_USED_LAYERS = 27, 25
SCORER = "vision_backbone.image_vit.transformer.temporal_token_scorer."


def reference_config(**text):
    """The configuration that the checkpoint must be converted to, with fields of its language model."""
    fields = tiny_config(prune_ratio=0.3, refill=True, bias_floor=math.log(0.2), prune_from_frame=1).to_dict()
    fields["vision_config"]["num_hidden_layers"] = NUM_USED_LAYERS
    fields["text_config"].update({"rope_scaling_layers": None, **text})
    # In the reference the connector is as wide as the language model's MLP.
    width = fields["text_config"]["intermediate_size"]
    fields["adapter_config"].update(vision_feature_layer=[24, 18], intermediate_size=width)
    fields["adapter_config"]["text_hidden_size"] = fields["text_config"]["hidden_size"]
    return Molmo2SttsConfig(**fields)


def reference_model(**text):
    model = Molmo2SttsForConditionalGeneration(reference_config(**text)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def native_config(**vit):
    """The content of config.yaml, with the reference's field names."""
    return {
        "run_name": "stts",
        "model": {
            "model_name": "molmo2",
            "llm": {
                "d_model": 32,
                "n_heads": 4,
                "n_kv_heads": 2,
                "head_dim": 8,
                "mlp_hidden_size": 128,
                "mlp_ratio": 4,
                "activation_type": "swiglu",
                "n_layers": 2,
                "vocab_size": 250,
                "embedding_size": 259,
                "additional_vocab_size": 10,
                "qkv_bias": False,
                "attention_layer_norm": True,
                "attention_layer_norm_type": "qwen3",
                "layer_norm_eps": 1e-6,
                "norm_after": False,
                "initializer_range": 0.02,
                "rope_type": "default",
                "rope_theta": 1000000,
                "max_sequence_length": 4096,
                "max_position_embeddings": None,
                "weight_tying": False,
            },
            "vision_backbone": {
                "image_pooling_2d": "attention_meanq",
                "image_projector": "mlp",
                "pooling_attention_mask": True,
                "vit_layers": [-3, -9],
                "vit": {
                    "image_model_type": "siglip",
                    "image_default_input_size": [54, 54],
                    "image_patch_size": 2,
                    "image_emb_dim": 32,
                    "image_num_heads": 4,
                    "image_num_key_value_heads": 4,
                    "image_head_dim": 8,
                    "image_num_layers": NUM_DECLARED_LAYERS,
                    "image_mlp_dim": 48,
                    "image_mlp_activations": "gelu_pytorch_tanh",
                    "image_norm_eps": 1e-6,
                    "image_num_pos": 729,
                    "initializer_range": 0.02,
                    "prune": True,
                    "prune_method": "scorer",
                    "pruning_in_scorer": True,
                    "merge": False,
                    "topk": 0.3,
                    "prune_at": 3,
                    "sim_reg_loss_coefficient": 0.5,
                    "rescale_bias_min": 0.2,
                    "prune_from_frame": 1,
                    **vit,
                },
            },
            "mm_preprocessor": {
                "image": {"max_crops": 3, "pooling_h": 2, "pooling_w": 2, "use_single_crop_start_token": True},
                "video": {
                    "time_mode": "per-frame-compact",
                    "max_frames": 6,
                    "max_fps": [2],
                    "pooling_h": 3,
                    "pooling_w": 3,
                    "use_frame_special_tokens": True,
                },
            },
        },
    }


def native_weights(model, num_layers=NUM_USED_LAYERS):
    """A model's weights by the reference's names: fused, and with two tables of embeddings."""
    ours, vit = model.state_dict(), "vision_backbone.image_vit."
    weights = {}

    def take(source, target, kinds=("weight",)):
        for kind in kinds:
            weights[f"{target}.{kind}"] = ours[f"model.{source}.{kind}"]

    def fuse(sources, target):
        weights[f"{target}.weight"] = torch.cat([ours[f"model.{source}.weight"] for source in sources])

    both = ("weight", "bias")
    table = ours["model.language_model.embed_tokens.weight"]
    num_base = model.config.text_config.vocab_size
    weights["transformer.wte.embedding"] = table[:num_base].clone()
    weights["transformer.wte.new_embedding"] = table[num_base:].clone()
    for i in range(model.config.text_config.num_hidden_layers):
        layer, block = f"language_model.layers.{i}", f"transformer.blocks.{i}"
        fuse([f"{layer}.self_attn.{name}_proj" for name in "qkv"], f"{block}.att_proj")
        fuse([f"{layer}.mlp.up_proj", f"{layer}.mlp.gate_proj"], f"{block}.ff_proj")
        take(f"{layer}.self_attn.o_proj", f"{block}.attn_out")
        take(f"{layer}.self_attn.q_norm", f"{block}.q_norm")
        take(f"{layer}.self_attn.k_norm", f"{block}.k_norm")
        take(f"{layer}.mlp.down_proj", f"{block}.ff_out")
        take(f"{layer}.input_layernorm", f"{block}.attn_norm")
        take(f"{layer}.post_attention_layernorm", f"{block}.ff_norm")
    take("language_model.norm", "transformer.ln_f")
    weights["transformer.ff_out.weight"] = ours["lm_head.weight"]
    weights[vit + "positional_embedding"] = ours["model.vision_tower.positional_embedding"]
    take("vision_tower.patch_embedding", vit + "patch_embedding", both)
    for i in range(num_layers):
        # Layers that are never used get the weights of the last one.
        layer = f"vision_tower.layers.{min(i, NUM_USED_LAYERS - 1)}"
        block = f"{vit}transformer.resblocks.{i}"
        for name in "qkvo":
            take(f"{layer}.self_attn.{name}_proj", f"{block}.attention.w{name}", both)
        take(f"{layer}.mlp.fc1", f"{block}.feed_forward.w1", both)
        take(f"{layer}.mlp.fc2", f"{block}.feed_forward.w2", both)
        take(f"{layer}.layer_norm1", f"{block}.attention_norm", both)
        take(f"{layer}.layer_norm2", f"{block}.ffn_norm", both)
    for name in "qkvo":
        pooler = "multi_modal_projector.image_pooling_2d"
        take(f"{pooler}.{name}_proj", f"vision_backbone.image_pooling_2d.w{name}", both)
        take(f"vision_tower.scorer.window_pooler.{name}_proj", f"{SCORER}patch_token_pooler.w{name}", both)
    for i, name in enumerate(("gate_proj", "down_proj", "up_proj")):
        take(f"multi_modal_projector.image_projector.{name}", f"vision_backbone.image_projector.w{i + 1}")
        take(f"vision_tower.scorer.mlp.fc{i + 1}", f"{SCORER}mlp.w{i + 1}", both)
    return weights


def save_native(folder, model, config=None, num_layers=NUM_USED_LAYERS):
    """Writes config.yaml and model.pt."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config or native_config()))
    torch.save(native_weights(model, num_layers), folder / "model.pt")
    return folder
