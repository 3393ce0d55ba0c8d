"""STTS for video language models. Importing the package registers its classes with the Auto classes."""

from pathlib import Path

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoVideoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_molmo2_stts import Molmo2SttsConfig
from .configuration_stts import SttsConfig
from .modeling_molmo2_stts import Molmo2SttsForConditionalGeneration, Molmo2SttsModel
from .pipeline_stts import VideoTextToTextPipeline
from .processing_molmo2_stts import Molmo2SttsProcessor
from .stts_release import code_hash
from .video_processing_molmo2_stts import Molmo2SttsVideoProcessor


AutoConfig.register("molmo2_stts", Molmo2SttsConfig)
AutoModel.register(Molmo2SttsConfig, Molmo2SttsModel)
AutoModelForImageTextToText.register(Molmo2SttsConfig, Molmo2SttsForConditionalGeneration)
AutoModelForMultimodalLM.register(Molmo2SttsConfig, Molmo2SttsForConditionalGeneration)
AutoProcessor.register(Molmo2SttsConfig, Molmo2SttsProcessor)
AutoVideoProcessor.register(Molmo2SttsConfig, Molmo2SttsVideoProcessor)
PIPELINE_REGISTRY.register_pipeline(
    "video-text-to-text",
    pipeline_class=VideoTextToTextPipeline,
    pt_model=AutoModelForImageTextToText,
    type="multimodal",
)
Molmo2SttsConfig.pipeline_is_registered = True
Molmo2SttsConfig.installed_code_hash = code_hash(Path(__file__).parent)

__all__ = [
    "Molmo2SttsConfig",
    "Molmo2SttsForConditionalGeneration",
    "Molmo2SttsModel",
    "Molmo2SttsProcessor",
    "Molmo2SttsVideoProcessor",
    "SttsConfig",
    "VideoTextToTextPipeline",
]
