"""The golden vectors of the reference, as models, inputs and expected values of this package."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from modeling_stts import Molmo2SttsConfig, Molmo2SttsModel


FOLDER = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
NUM_PATCHES, NUM_WINDOWS = 729, 81

# Reference names, without the prefix `vision_backbone.`, and ours, without the prefix `model.`.
RENAMING = (
    (r".*temporal_token_scorer\.patch_token_pooler\.w(.)", r"vision_tower.scorer.window_pooler.\1_proj"),
    (r".*temporal_token_scorer\.mlp\.w", r"vision_tower.scorer.mlp.fc"),
    (r"image_vit\.transformer\.resblocks\.(\d+)\.attention\.w(.)", r"vision_tower.layers.\1.self_attn.\2_proj"),
    (r"image_vit\.transformer\.resblocks\.(\d+)\.feed_forward\.w", r"vision_tower.layers.\1.mlp.fc"),
    (r"image_vit\.transformer\.resblocks\.(\d+)\.attention_norm", r"vision_tower.layers.\1.layer_norm1"),
    (r"image_vit\.transformer\.resblocks\.(\d+)\.ffn_norm", r"vision_tower.layers.\1.layer_norm2"),
    (r"image_vit\.", r"vision_tower."),
    (r"image_pooling_2d\.w(.)", r"multi_modal_projector.image_pooling_2d.\1_proj"),
    (r"image_projector\.w1", r"multi_modal_projector.image_projector.gate_proj"),
    (r"image_projector\.w2", r"multi_modal_projector.image_projector.down_proj"),
    (r"image_projector\.w3", r"multi_modal_projector.image_projector.up_proj"),
)  # fmt: skip


def rename(name: str) -> str:
    for pattern, replacement in RENAMING:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass
class GoldenCase:
    """
    One file. `videos` holds (row, first frame in the row, number of frames) of each video; frame and token indices
    lead from the videos, one after the other, into the file's flattened tensors.
    """

    tensors: dict[str, torch.Tensor]
    config: dict
    videos: list[tuple[int, int, int]]

    @property
    def frame_idx(self) -> list[int]:
        frames_in_row = self.tensors["inputs/images"].shape[1]
        return [row * frames_in_row + first + i for row, first, frames in self.videos for i in range(frames)]

    def later_frames(self) -> list[int]:
        """Indices, among the frames of all videos, of those that are not their video's first."""
        ends = torch.tensor([frames for _, _, frames in self.videos]).cumsum(0).tolist()
        starts = {0, *ends}
        return [frame for frame in range(ends[-1]) if frame not in starts]

    def inputs(self) -> dict[str, torch.Tensor]:
        poolings, pixels, offset = [], [], 0
        for row, first, frames in self.videos:
            pixels.append(self.tensors["inputs/images"][row, first : first + frames])
            poolings.append(
                self._pooling_of_row(row)[self._tokens(row, first, frames)] + (offset - first) * NUM_PATCHES
            )
            offset += frames
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_token_pooling": torch.cat(poolings),
            "video_grids": torch.tensor([[frames, 9, 9] for _, _, frames in self.videos]),
        }

    def kept_rows(self, valid_token: torch.Tensor) -> torch.Tensor:
        """Bool mask over the rows of `image_to_return`: those that belong to videos."""
        of_video = torch.zeros_like(valid_token)
        for row, first, frames in self.videos:
            of_video[row] |= self._tokens(row, first, frames)
        return of_video[valid_token]

    def _pooling_of_row(self, row: int) -> torch.Tensor:
        return self.tensors["inputs/pooled_patches_idx"][row]

    def _tokens(self, row: int, first: int, frames: int) -> torch.Tensor:
        frame = self._pooling_of_row(row).amax(-1) // NUM_PATCHES
        is_token = (self._pooling_of_row(row) >= 0).any(-1)
        return is_token & (frame >= first) & (frame < first + frames)


def load_case(name: str) -> GoldenCase:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        meta = json.loads(file.metadata()["meta"])
    videos = []
    for row, items in enumerate(meta["rows"]):
        first = 0
        for kind, frames in items:
            if kind == "video":
                videos.append((row, first, frames))
            first += frames
    return GoldenCase(tensors, meta["config"], videos)


def build_model(case: GoldenCase, **stts) -> Molmo2SttsModel:
    """The reference's ViT and connector with its weights, and an unused language model."""
    config = case.config
    shape = {name: config[name] for name in ("hidden_size", "head_dim")}
    shape |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), config["num_heads"])
    model = Molmo2SttsModel(
        Molmo2SttsConfig(
            vision_config={
                **shape,
                "intermediate_size": config["mlp_dim"],
                "num_hidden_layers": config["num_layers"],
                "image_size": [27 * config["patch_size"]] * 2,
                "patch_size": config["patch_size"],
            },
            adapter_config={
                **shape,
                "vision_feature_layer": config["vit_layers"],
                "intermediate_size": config["adapter_intermediate_size"],
                "text_hidden_size": config["text_hidden_size"],
            },
            text_config={
                "hidden_size": config["text_hidden_size"],
                "num_hidden_layers": 1,
                "vocab_size": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            stts_config={"prune_ratio": config["ratio"], "score_after_layer": config["prune_at"], **stts},
        )
    )
    weights = {
        rename(key.removeprefix("weights/")): t for key, t in case.tensors.items() if key.startswith("weights/")
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or not all(name.startswith("language_model.") for name in missing):
        raise ValueError(f"golden weights do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval()
