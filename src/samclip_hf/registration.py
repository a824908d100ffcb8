"""
Registers SAM-CLIP with transformers: Auto classes, pipelines, and the tables of names that stock pipelines read.

Everything in this package that changes transformers is called by `register`. Importing `samclip_hf` calls it.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForMaskGeneration,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
)

# Not from `transformers`: without torchvision, 5.17 exports a placeholder that raises an error on use, 5.24 does not
# (https://github.com/huggingface/transformers/issues/48607). Import it from there when 5.17 is not supported any more.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

# Not exported by `transformers`. Checked on 5.17.0 and 5.24.0. Delete both when pipelines look up registered classes.
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_samclip import SamClipConfig, SamClipVisionConfig
from .image_processing_samclip import SamClipImageProcessor, SamClipImageProcessorPil
from .modeling_samclip import SamClipBackbone, SamClipModel, SamClipVisionModel
from .pipeline_samclip import SamClipImageSegmentationPipeline
from .processing_samclip import SamClipProcessor
from .segmentation_samclip import SamClipForImageSegmentation, SamClipForObjectDetection
from .stock_pipelines import extend_stock_pipelines

MODELS = {
    AutoModel: SamClipModel,
    AutoModelForMaskGeneration: SamClipModel,
    AutoModelForZeroShotImageClassification: SamClipModel,
    AutoModelForImageSegmentation: SamClipForImageSegmentation,
    AutoModelForSemanticSegmentation: SamClipForImageSegmentation,
    AutoModelForZeroShotObjectDetection: SamClipForObjectDetection,
}
TASK = "zero-shot-image-segmentation"


def register() -> None:
    """Registers all classes. Can be called more than once; later calls change nothing and log nothing."""
    AutoConfig.register("samclip", SamClipConfig, exist_ok=True)
    AutoConfig.register("samclip_vision_model", SamClipVisionConfig, exist_ok=True)
    for auto_class, model_class in MODELS.items():
        auto_class.register(SamClipConfig, model_class, exist_ok=True)
    AutoModel.register(SamClipVisionConfig, SamClipVisionModel, exist_ok=True)
    AutoBackbone.register(SamClipVisionConfig, SamClipBackbone, exist_ok=True)
    for config_class in (SamClipConfig, SamClipVisionConfig):
        AutoImageProcessor.register(
            config_class,
            image_processor_classes={"torchvision": SamClipImageProcessor, "pil": SamClipImageProcessorPil},
            exist_ok=True,
        )
    AutoProcessor.register(SamClipConfig, SamClipProcessor, exist_ok=True)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():  # registering a task again logs a warning
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=SamClipImageSegmentationPipeline,
            pt_model=AutoModelForImageSegmentation,
            type="image",
        )
    # Stock pipelines look up the model's class name in these tables, not in the registered classes. Without an entry,
    # they log an error that the model is not supported, although they can run it.
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["samclip"] = "SamClipForImageSegmentation"
    MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES["samclip"] = "SamClipForObjectDetection"
    extend_stock_pipelines()
