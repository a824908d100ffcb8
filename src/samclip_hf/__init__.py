"""SAM-CLIP as a Hugging Face model. Importing this package registers it with transformers' Auto classes and pipelines."""

from importlib.metadata import version

from . import miniature
from .configuration_samclip import SamClipConfig, SamClipHeadConfig, SamClipVisionConfig
from .image_processing_samclip import SamClipImageProcessor, SamClipImageProcessorPil
from .modeling_samclip import (
    SamClipForImageSegmentation,
    SamClipForObjectDetection,
    SamClipModel,
    SamClipPreTrainedModel,
    SamClipVisionModel,
    SamClipVocabulary,
)
from .pipeline_samclip import SamClipImageSegmentationPipeline
from .processing_samclip import SamClipProcessor
from .registration import register

__version__ = version("samclip-hf")
register()

__all__ = [
    "SamClipConfig",
    "SamClipForImageSegmentation",
    "SamClipForObjectDetection",
    "SamClipHeadConfig",
    "SamClipImageProcessor",
    "SamClipImageProcessorPil",
    "SamClipImageSegmentationPipeline",
    "SamClipModel",
    "SamClipPreTrainedModel",
    "SamClipProcessor",
    "SamClipVisionConfig",
    "SamClipVisionModel",
    "SamClipVocabulary",
    "miniature",
]
