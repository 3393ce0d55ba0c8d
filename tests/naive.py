"""STTS written a second time, slowly and from the paper: one frame at a time, no packing, no window order.

Uses a model's weights and nothing else of this package. The tests compare the package with it.
"""

import math

import torch
from torch.nn import functional as F


def attend(query, key, value, num_heads, bias=None):
    """Attention of one frame: query (n, dim), key and value (m, dim), bias (m,) added to every query's logits."""
    heads = []
    for q, k, v in zip(*(states.chunk(num_heads, dim=-1) for states in (query, key, value))):
        logits = q @ k.T / math.sqrt(q.shape[-1])
        heads.append((logits if bias is None else logits + bias).softmax(-1) @ v)
    return torch.cat(heads, dim=-1)


def block(layer, hidden, num_heads, bias=None):
    """One ViT block on the patches of one frame, (n, dim)."""
    normed, attention = layer.layer_norm1(hidden), layer.self_attn
    attended = attend(*(p(normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj)), num_heads, bias)
    hidden = hidden + attention.o_proj(attended)
    return hidden + layer.mlp(layer.layer_norm2(hidden))


def window_patches():
    """Patches of each of the 9 x 9 windows in a 27 x 27 grid, row by row."""
    grid = torch.arange(729).view(27, 27)
    return [grid[3 * r : 3 * r + 3, 3 * c : 3 * c + 3].flatten() for r in range(9) for c in range(9)]


def score_video(scorer, frames, num_heads):
    """Scores of one video, whose frames are (729, dim) each."""
    previous, scores = torch.zeros(81, frames[0].shape[-1], dtype=frames[0].dtype), []
    for hidden in frames:
        pooler, pooled = scorer.window_pooler, []
        for patches in window_patches():
            window = hidden[patches]
            query = pooler.q_proj(window.mean(0, keepdim=True))
            pooled.append(pooler.o_proj(attend(query, pooler.k_proj(window), pooler.v_proj(window), num_heads))[0])
        pooled = torch.stack(pooled)
        state = torch.cat([previous, pooled], dim=-1)
        state = F.silu(scorer.mlp.fc2(F.silu(scorer.mlp.fc1(state))))
        scores.append(torch.sigmoid(scorer.mlp.fc3(state))[:, 0])
        previous = pooled
    return torch.stack(scores)


def key_bias(scores, floor=-2.0):
    """Bias of each patch, (frames, 729), from scores (frames, 81)."""
    bias = torch.zeros(len(scores), 729, dtype=scores.dtype)
    for f in range(1, len(scores)):
        for w, patches in enumerate(window_patches()):
            row = scores[f, w // 9 * 9 : w // 9 * 9 + 9]
            low = math.exp(floor)
            rescaled = low + (scores[f, w] - row.min()) * (1 - low) / (row.max() - row.min() + 1e-6)
            bias[f, patches] = rescaled.log()
    return bias


def keep_windows(scores, count):
    """The keep_mask of one video as a list of lists."""
    ranked = sorted((scores[f][w].item(), f, w) for f in range(1, len(scores)) for w in range(81))
    keep = [[True] * 81 for _ in scores]
    for _, f, w in ranked[:count]:
        keep[f][w] = False
    return torch.tensor(keep)


def video_features(model, pixel_values, count):
    """Kept features, scores and keep_mask of one video: pixel_values (frames, 729, pixels), `count` windows go."""
    vit, connector, config = model.vision_tower, model.multi_modal_projector, model.config
    heads, first = config.vision_config.num_attention_heads, config.stts_config.score_after_layer
    frames = [vit.patch_embedding(frame) + vit.positional_embedding for frame in pixel_values]
    outputs = []
    for layer in vit.layers[: first + 1]:
        frames = [block(layer, hidden, heads) for hidden in frames]
        outputs.append(frames)
    scores = score_video(vit.scorer, frames, heads)
    frames = [block(vit.layers[first + 1], hidden, heads, bias) for hidden, bias in zip(frames, key_bias(scores))]
    outputs.append(frames)
    keep = keep_windows(scores, count)
    kept = [
        torch.cat([p for p, flag in zip(window_patches(), row) if flag] or [torch.empty(0).long()]) for row in keep
    ]
    frames = [hidden[patches] for hidden, patches in zip(frames, kept)]
    for layer in vit.layers[first + 2 :]:
        frames = [block(layer, hidden, heads) for hidden in frames]
        outputs.append(frames)
    features = []
    for layer in config.adapter_config.vision_feature_layer:
        of_layer = outputs[layer % len(vit.layers)]
        if layer % len(vit.layers) <= first + 1:
            of_layer = [hidden[patches] for hidden, patches in zip(of_layer, kept)]
        features.append(torch.cat(of_layer).unflatten(0, (-1, 9)))
    pool, tokens = connector.image_pooling_2d, []
    for window in torch.cat(features, dim=-1):
        query = pool.q_proj(window.mean(0, keepdim=True))
        tokens.append(pool.o_proj(attend(query, pool.k_proj(window), pool.v_proj(window), heads)))
    return connector.image_projector(torch.cat(tokens)), scores, keep


def temporal_loss(scores, frames):
    """Loss of one video from its scores (frames, 81) and the hidden states (729, dim) they were computed from."""
    errors = []
    for f in range(1, len(frames)):
        for w, patches in enumerate(window_patches()):
            cosine = F.cosine_similarity(frames[f][patches].flatten(), frames[f - 1][patches].flatten(), dim=0)
            errors.append((scores[f, w] - (1 - cosine)) ** 2)
    return torch.stack(errors).mean()


def attention_in_segments(query, key, value, lengths):
    """Attention within each segment of a flat sequence, (1, heads, total, head_dim)."""
    parts = zip(*(states.split(lengths, dim=2) for states in (query, key, value)))
    return torch.cat([(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v for q, k, v in parts], dim=2)


def language_logits(native, tokens, features, placeholder, positions):
    """
    Logits of one cut prompt by the native language model: features are added to the placeholders' embeddings, vision
    tokens see each other both ways, text is causal.
    """
    model, ids = native.model, torch.tensor([tokens])
    embeddings = model.get_input_embeddings()(ids)
    is_vision = ids[0] == placeholder
    embeddings = embeddings.index_put((torch.zeros(len(features)).long(), is_vision.nonzero()[:, 0]), features, True)
    index = torch.arange(len(tokens))
    visible = (index[:, None] >= index) | (is_vision[:, None] & is_vision)
    mask = torch.zeros(visible.shape, dtype=embeddings.dtype).masked_fill(~visible, -1e30)[None, None]
    hidden = model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=torch.tensor([positions])
    )
    return native.lm_head(hidden.last_hidden_state)[0]


def training_losses(model, tokens, labels, pixel_values, count):
    """
    Losses of one prompt with one video, of which `count` windows go: the sum of the language loss over the labels, and
    the temporal loss.
    """
    vit, config, placeholder = model.model.vision_tower, model.config, model.config.video_token_id
    features, scores, keep = video_features(model.model, pixel_values, count)
    flags = iter(keep.flatten().tolist())
    kept = [i for i, token in enumerate(tokens) if token != placeholder or next(flags)]
    logits = language_logits(model, [tokens[i] for i in kept], features, placeholder, kept)
    losses = [
        F.cross_entropy(logits[place - 1], torch.tensor(labels[i]))
        for place, i in enumerate(kept)
        if place > 0 and labels[i] != -100
    ]
    frames = [vit.patch_embedding(frame) + vit.positional_embedding for frame in pixel_values]
    for layer in vit.layers[: config.stts_config.score_after_layer + 1]:
        frames = [block(layer, hidden, config.vision_config.num_attention_heads) for hidden in frames]
    return sum(losses), temporal_loss(scores, frames)
