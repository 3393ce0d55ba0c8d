"""Configuration of Molmo2 with STTS pruning."""

# First, because it says what is wrong where transformers has no Molmo2.
from .stts_release import TRANSFORMERS_RANGE, VERSION  # isort: split


from huggingface_hub.dataclasses import strict
from transformers import Molmo2Config, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .configuration_stts import SttsConfig


AUTO_MAP = {
    "AutoConfig": "configuration_molmo2_stts.Molmo2SttsConfig",
    "AutoModel": "modeling_molmo2_stts.Molmo2SttsModel",
    "AutoModelForImageTextToText": "modeling_molmo2_stts.Molmo2SttsForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_molmo2_stts.Molmo2SttsForConditionalGeneration",
    "AutoProcessor": "processing_molmo2_stts.Molmo2SttsProcessor",
    "AutoVideoProcessor": "video_processing_molmo2_stts.Molmo2SttsVideoProcessor",
}
CUSTOM_PIPELINES = {
    "video-text-to-text": {
        "impl": "pipeline_stts.VideoTextToTextPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


@strict
class Molmo2SttsConfig(Molmo2Config):
    r"""
    Differences from `Molmo2Config`:
    - `stts_config` (`SttsConfig`, *optional*): how videos are pruned.
    - `stts_release` (`dict`): the version, the range of transformers and the code hash of the release that wrote the
      configuration. Whatever is given, it is that of the running code.
    - `auto_map` and `custom_pipelines` always name this package's own files, so that every saved configuration makes
      its folder loadable with `trust_remote_code=True`.
    """

    model_type = "molmo2_stts"
    _auto_class = "AutoConfig"
    keys_to_ignore_at_inference = [
        "past_key_values",
        "cache",
        "temporal_loss",
        "kept_token_idx",
        "image_hidden_states",
        "image_outputs",
    ]
    sub_configs_defaults = {**Molmo2Config.sub_configs_defaults, "stts_config": SubConfigSpec(config_class=SttsConfig)}

    # Set where the package registers its pipeline: `pipeline()` asks for `trust_remote_code` if it finds a custom one.
    pipeline_is_registered = False
    # Set there too: hub code runs from a cache that may hold a part of the files only, so it keeps the saved hash.
    installed_code_hash = None

    stts_config: dict | PreTrainedConfig | None = None
    stts_release: dict | None = None

    def __post_init__(self, **kwargs):
        # A Molmo2 checkpoint's own type would keep its weights from being renamed.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        pipelines = {} if self.pipeline_is_registered else CUSTOM_PIPELINES
        self.custom_pipelines = {task: dict(info) for task, info in pipelines.items()}
        self.stts_release = {
            "version": VERSION,
            "transformers": TRANSFORMERS_RANGE,
            "code_hash": self.installed_code_hash or (self.stts_release or {}).get("code_hash"),
        }
        self.check_values()

    def validate_architecture(self):
        # Runs before the configuration is saved, too.
        super().validate_architecture()
        self.check_values()

    def check_values(self) -> None:
        """
        Checks the fields of `stts_config`, and that they fit the ViT.

        Raises:
            ValueError: naming the value and the rule.
        """
        self.stts_config.check_values()
        self.stts_config.check_num_layers(self.vision_config.num_hidden_layers)
        if self.vision_config.attention_dropout != 0:
            raise ValueError(
                f"Pruned ViT blocks have no attention dropout, so `vision_config.attention_dropout` must be 0, got "
                f"{self.vision_config.attention_dropout}."
            )

    def to_dict(self):
        # `pipeline()` puts classes into the loaded `custom_pipelines`, and classes cannot be written as JSON.
        return {**super().to_dict(), "auto_map": dict(AUTO_MAP), "custom_pipelines": CUSTOM_PIPELINES}


__all__ = ["Molmo2SttsConfig"]
