"""Model adapters, evaluators of the paper's protocols, metrics and reports. They need the extra `train`."""

from .adapters import (
    ClipAdapter,
    ImageTextAdapter,
    ModelAdapter,
    PromptableAdapter,
    SamAdapter,
    SamClipAdapter,
    SamClipVisionAdapter,
    SiglipAdapter,
    UnmergedAdapter,
    adapter_class,
    load_adapter,
)
from .cascade_segmentation import CascadeSegmentation
from .classification import ZeroShotClassification
from .composed_segmentation import ComposedSegmentation
from .cost import Cost
from .evaluator import EvaluationResult, Evaluator, SampleEvaluator
from .head_probing import HeadProbing
from .instance_segmentation import ZeroShotInstanceSegmentation
from .linear_probing import LinearProbing
from .prompted_segmentation import PromptedSegmentation
from .report import Results, create_model_index, read_results, results_of_model, save_result_panel
from .retrieval import Retrieval
from .semantic_segmentation import LabelMapEvaluator, SemanticSegmentation

__all__ = [
    "CascadeSegmentation",
    "ClipAdapter",
    "ComposedSegmentation",
    "Cost",
    "EvaluationResult",
    "Evaluator",
    "HeadProbing",
    "ImageTextAdapter",
    "LabelMapEvaluator",
    "LinearProbing",
    "ModelAdapter",
    "PromptableAdapter",
    "PromptedSegmentation",
    "Results",
    "Retrieval",
    "SamAdapter",
    "SamClipAdapter",
    "SamClipVisionAdapter",
    "SampleEvaluator",
    "SemanticSegmentation",
    "SiglipAdapter",
    "UnmergedAdapter",
    "ZeroShotClassification",
    "ZeroShotInstanceSegmentation",
    "adapter_class",
    "create_model_index",
    "load_adapter",
    "read_results",
    "results_of_model",
    "save_result_panel",
]
