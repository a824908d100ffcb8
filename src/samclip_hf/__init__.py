"""SAM-CLIP as a Hugging Face model: importing this package registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForMaskGeneration,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from . import miniature
from .configuration_samclip import SamClipConfig, SamClipHeadConfig
from .image_processing_samclip import SamClipImageProcessor, SamClipImageProcessorPil
from .modeling_samclip import (
    SamClipForImageSegmentation,
    SamClipModel,
    SamClipPreTrainedModel,
    SamClipVocabulary,
)
from .pipeline_samclip import SamClipImageSegmentationPipeline
from .processing_samclip import SamClipProcessor

AutoConfig.register("samclip", SamClipConfig, exist_ok=True)
AutoModel.register(SamClipConfig, SamClipModel, exist_ok=True)
AutoModelForMaskGeneration.register(SamClipConfig, SamClipModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(SamClipConfig, SamClipModel, exist_ok=True)
AutoModelForImageSegmentation.register(SamClipConfig, SamClipForImageSegmentation, exist_ok=True)
AutoModelForSemanticSegmentation.register(SamClipConfig, SamClipForImageSegmentation, exist_ok=True)
AutoImageProcessor.register(
    SamClipConfig,
    image_processor_classes={"torchvision": SamClipImageProcessor, "pil": SamClipImageProcessorPil},
    exist_ok=True,
)
AutoProcessor.register(SamClipConfig, SamClipProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "zero-shot-image-segmentation",
    pipeline_class=SamClipImageSegmentationPipeline,
    pt_model=AutoModelForImageSegmentation,
    type="image",
)

# The stock image-segmentation pipeline looks for names here, not for registrations, and otherwise logs an error that
# the model is not supported before it runs it all the same.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["samclip"] = "SamClipForImageSegmentation"

__all__ = [
    "SamClipConfig",
    "SamClipForImageSegmentation",
    "SamClipHeadConfig",
    "SamClipImageProcessor",
    "SamClipImageProcessorPil",
    "SamClipImageSegmentationPipeline",
    "SamClipModel",
    "SamClipPreTrainedModel",
    "SamClipProcessor",
    "SamClipVocabulary",
    "miniature",
]
