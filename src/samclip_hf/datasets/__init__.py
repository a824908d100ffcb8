"""Readers of training streams and evaluation sets. They need the extra `train`."""

from .captions import open_captions
from .classification import open_classification
from .objects import open_objects
from .samples import (
    IGNORE_INDEX,
    CaptionedImage,
    DataSet,
    ImageWithObjects,
    LabeledImage,
    Sample,
    SegmentedImage,
)
from .segmentation import open_coco_segmentation, open_segmentation
from .streams import DataError, SkippedSampleError, Stream, open_stream
from .vocabularies import Vocabulary, load_vocabulary

__all__ = [
    "IGNORE_INDEX",
    "CaptionedImage",
    "DataError",
    "DataSet",
    "ImageWithObjects",
    "LabeledImage",
    "Sample",
    "SegmentedImage",
    "SkippedSampleError",
    "Stream",
    "Vocabulary",
    "load_vocabulary",
    "open_captions",
    "open_classification",
    "open_coco_segmentation",
    "open_objects",
    "open_segmentation",
    "open_stream",
]
