import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, SamImageProcessor

from samclip_hf import SamClipImageProcessor, SamClipImageProcessorPil
from samclip_hf.image_processing_samclip import LABELS_PER_CHUNK, resize_content
from samclip_hf.modeling_samclip import SamClipSegmentationOutput

SIZES = {
    "size": {"longest_edge": 64},
    "pad_size": {"height": 64, "width": 64},
    "mask_size": {"longest_edge": 32},
    "mask_pad_size": {"height": 32, "width": 32},
}


def random_image(width, height, seed=0):
    # Smooth, as photographs are: the two backends' resampling differs on noise.
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_pixels_are_sams():
    images = [random_image(100, 50), random_image(30, 90, seed=1)]
    expected = SamImageProcessor(**SIZES)(images, return_tensors="pt")
    actual = SamClipImageProcessor(**SIZES)(images, return_tensors="pt")
    for name in ("pixel_values", "original_sizes", "reshaped_input_sizes"):
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)


def test_backends_agree_to_a_few_grey_levels():
    images = [random_image(100, 50), random_image(30, 90, seed=1)]
    torchvision = SamClipImageProcessor(**SIZES)(images, return_tensors="pt")
    pil = SamClipImageProcessorPil(**SIZES)(images, return_tensors="pt")
    assert pil["reshaped_input_sizes"].tolist() == torchvision["reshaped_input_sizes"].tolist()
    difference = (torchvision["pixel_values"] - pil["pixel_values"]).abs()
    assert difference.max() < 3 / 255 / 0.22  # three grey levels under SAM's smallest standard deviation


@pytest.mark.parametrize("processor_class", [SamClipImageProcessor, SamClipImageProcessorPil])
def test_a_size_for_one_call_pads_to_it(processor_class):
    processor = processor_class(**SIZES)
    inputs = processor(random_image(100, 50), size={"longest_edge": 48}, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert inputs["reshaped_input_sizes"].tolist() == [[24, 48]]
    assert not inputs["pixel_values"][0, :, 24:].any()
    assert processor(random_image(100, 50), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("processor_class", [SamClipImageProcessor, SamClipImageProcessorPil])
def test_saves_and_loads(processor_class, tmp_path):
    processor_class(**SIZES).save_pretrained(tmp_path)
    backend = "pil" if processor_class is SamClipImageProcessorPil else "torchvision"
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is processor_class
    assert loaded.size["longest_edge"] == 64 and loaded.pad_size["height"] == 64


class TestSemanticSegmentation:
    def outputs(self, logits, content_sizes):
        return SamClipSegmentationOutput(logits=logits, content_sizes=torch.tensor(content_sizes))

    def test_equals_resize_crop_resize_argmax_without_padding(self):
        logits = torch.randn(1, 5, 8, 8)
        resized = torch.nn.functional.interpolate(logits, size=(20, 28), mode="bilinear", align_corners=False)
        maps = SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
            self.outputs(logits, [[8.0, 8.0]]), [(20, 28)]
        )
        assert maps[0].equal(resized[0].argmax(dim=0))

    def test_many_labels_in_chunks_give_the_same(self):
        logits = torch.randn(2, 3 * LABELS_PER_CHUNK + 1, 4, 4)
        maps = SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
            self.outputs(logits, [[4.0, 4.0], [4.0, 4.0]])
        )
        assert torch.stack(maps).equal(logits.argmax(dim=1))

    def test_padding_is_cut_and_does_not_bleed_in(self):
        logits = torch.zeros(1, 2, 4, 4)
        logits[0, 1, :, 3] = 100.0  # only in the padding, right of a picture three cells wide
        maps = SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
            self.outputs(logits, [[4.0, 2.0]]), [(40, 20)]
        )
        assert maps[0].shape == (40, 20) and not maps[0].any()

    def test_wrong_number_of_sizes_is_refused(self):
        with pytest.raises(ValueError, match="2 target_sizes for 1 images"):
            SamClipImageProcessor(**SIZES).post_process_semantic_segmentation(
                self.outputs(torch.zeros(1, 2, 4, 4), [[4.0, 4.0]]), [(4, 4), (4, 4)]
            )

    def test_fractions_of_cells_are_kept(self):
        ramp = torch.arange(8.0).expand(1, 8, 8).contiguous()
        resized = resize_content(ramp, (8, 5.5), (8, 11))[0, 0]
        expected = (torch.arange(11) + 0.5) * 0.5 - 0.5
        torch.testing.assert_close(resized, expected.clamp_min(0))
