"""Runs transformers' `ProcessorTesterMixin` on the processor: `make test-transformers`."""

import unittest

from transformers_tests.test_processing_common import ProcessorTesterMixin

from samclip_hf import SamClipProcessor, miniature


class SamClipProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = SamClipProcessor
    model_id = miniature.checkpoint()
