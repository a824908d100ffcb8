"""Runs transformers' `ImageProcessingTestMixin` on both image processors: `make test-transformers`."""

import unittest

from transformers import SamImageProcessor, SamImageProcessorPil
from transformers_tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from samclip_hf import SamClipImageProcessor, SamClipImageProcessorPil


class SamClipImageProcessingTester(ImageProcessingTester):
    batch_size, num_channels, min_resolution, max_resolution = 7, 3, 30, 400

    def __init__(self):
        """Does not call the mixin's constructor, which looks up a model of transformers."""

    def prepare_image_processor_dict(self):
        return {
            "size": {"longest_edge": 20},
            "pad_size": {"height": 20, "width": 20},
            "mask_size": {"longest_edge": 12},
            "mask_pad_size": {"height": 12, "width": 12},
        }

    def expected_output_image_shape(self, images):
        return self.num_channels, 20, 20


class SamClipImageProcessingTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processing_classes = {"torchvision": SamClipImageProcessor, "pil": SamClipImageProcessorPil}
    image_processor_dict = SamClipImageProcessingTester().prepare_image_processor_dict()
    test_cast_dtype = True

    def setUp(self):
        self.image_processor_tester = SamClipImageProcessingTester()

    def test_valid_kwargs_set(self):
        """Both classes take SAM's arguments and `do_reduce_labels`."""
        for own, of_sam in (
            (SamClipImageProcessor, SamImageProcessor),
            (SamClipImageProcessorPil, SamImageProcessorPil),
        ):
            names = {*of_sam.valid_kwargs.__annotations__, "do_reduce_labels"}
            self.assertEqual(set(own.valid_kwargs.__annotations__), names)

    def test_post_process_test_mixin_inheritance(self):
        """Skipped: it requires the post-processing of `SemanticSegmenterOutput`; SAM-CLIP's output has segments."""
