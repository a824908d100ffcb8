"""SAM-CLIP as a Hugging Face model. Importing this package registers it with the Auto classes of transformers."""

from importlib.metadata import version

from . import miniature
from .configuration_samclip import SamClipConfig, SamClipHeadConfig, SamClipVisionConfig
from .image_processing_samclip import SamClipImageProcessor, SamClipImageProcessorPil
from .modeling_samclip import SamClipBackbone, SamClipModel, SamClipPreTrainedModel, SamClipVisionModel
from .pipeline_samclip import SamClipImageSegmentationPipeline, SamClipMaskGenerationPipeline
from .processing_samclip import SamClipProcessor
from .registration import register
from .segmentation_samclip import SamClipForImageSegmentation, SamClipForObjectDetection, SamClipVocabulary

__version__ = version("samclip-hf")
register()

__all__ = [
    "SamClipBackbone",
    "SamClipConfig",
    "SamClipForImageSegmentation",
    "SamClipForObjectDetection",
    "SamClipHeadConfig",
    "SamClipImageProcessor",
    "SamClipImageProcessorPil",
    "SamClipImageSegmentationPipeline",
    "SamClipMaskGenerationPipeline",
    "SamClipModel",
    "SamClipPreTrainedModel",
    "SamClipProcessor",
    "SamClipVisionConfig",
    "SamClipVisionModel",
    "SamClipVocabulary",
    "miniature",
]
