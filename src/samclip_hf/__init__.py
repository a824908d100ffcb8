"""SAM-CLIP as a Hugging Face model: importing this package registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForMaskGeneration,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
)
from transformers.pipelines import PIPELINE_REGISTRY

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

AutoConfig.register("samclip", SamClipConfig, exist_ok=True)
AutoConfig.register("samclip_vision_model", SamClipVisionConfig, exist_ok=True)
AutoModel.register(SamClipConfig, SamClipModel, exist_ok=True)
AutoModel.register(SamClipVisionConfig, SamClipVisionModel, exist_ok=True)
AutoModelForMaskGeneration.register(SamClipConfig, SamClipModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(SamClipConfig, SamClipModel, exist_ok=True)
AutoModelForImageSegmentation.register(SamClipConfig, SamClipForImageSegmentation, exist_ok=True)
AutoModelForSemanticSegmentation.register(SamClipConfig, SamClipForImageSegmentation, exist_ok=True)
AutoModelForZeroShotObjectDetection.register(SamClipConfig, SamClipForObjectDetection, exist_ok=True)
for config_class in (SamClipConfig, SamClipVisionConfig):
    AutoImageProcessor.register(
        config_class,
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

# Stock pipelines look for names here, not for registrations, and otherwise log an error that the model is not
# supported before they run it all the same.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["samclip"] = "SamClipForImageSegmentation"
MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES["samclip"] = "SamClipForObjectDetection"

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
