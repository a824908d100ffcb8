"""The shipped miniature SAM-CLIP, as its users load it, does what the README says of it, on a sample of the scenes."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from samclip_hf import SamClipModel, SamClipProcessor, SamClipVisionModel, miniature
from samclip_hf.evaluation import SemanticSegmentation
from samclip_hf.miniature.scenes import CLASS_NAMES, evaluation_scene
from samclip_hf.miniature_lab.report import (
    NearestColour,
    beside_teachers,
    draw,
    load_student,
    load_teachers,
    markdown,
    measure,
    world_tasks,
)

SHARE = 0.3  # of the scenes


@pytest.fixture(scope="module")
def teachers():
    return load_teachers()


@pytest.fixture(scope="module")
def student():
    return load_student(miniature.checkpoint())


@pytest.fixture(scope="module")
def compute_metrics(teachers, student):
    tasks = world_tasks(share=SHARE)
    sam, clip = teachers
    return beside_teachers(measure(student, tasks), measure(sam, tasks) | measure(clip, tasks))


def test_auto_classes_load_it():
    model = AutoModel.from_pretrained(miniature.checkpoint())
    processor = AutoProcessor.from_pretrained(miniature.checkpoint())
    assert type(model) is SamClipModel and type(processor) is SamClipProcessor
    scene = evaluation_scene(seed=5, index=13)
    inputs = processor(
        Image.fromarray(scene.image), text=[f"a {name}" for name in CLASS_NAMES], input_points=[[[[64, 64]]]]
    )
    with torch.inference_mode():
        outputs = model(**inputs)
    assert outputs.logits_per_image.shape == (1, len(CLASS_NAMES))
    assert processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"])[
        0
    ].shape == (1, 3, 128, 128)


def test_stock_pipeline_labels_masks_without_a_complaint(student, complaints):
    image = Image.fromarray(evaluation_scene(seed=5, index=13).image).resize((200, 150))
    segmenter = pipeline("image-segmentation", model=miniature.checkpoint())
    by_subtask = {task: segmenter(image, subtask=task) for task in ("semantic", "instance", "panoptic")}
    by_subtask[None] = segmenter(image)
    assert not complaints.records
    for segments in by_subtask.values():
        assert {segment["label"] for segment in segments} <= {"background", *CLASS_NAMES}
        assert all(segment["mask"].size == (200, 150) for segment in segments)
        assert np.sum([np.asarray(segment["mask"]) > 0 for segment in segments], axis=0).max() == 1  # no overlap
    assert np.sum([np.asarray(segment["mask"]) > 0 for segment in by_subtask["semantic"]]) == 200 * 150
    # The object itself, whose name is sure enough for the pipeline's threshold of 0.9.
    assert [segment["label"] for segment in by_subtask[None]] == [CLASS_NAMES[13]]


def test_stock_zero_shot_classification_agrees_with_the_direct_call(student):
    image = Image.fromarray(evaluation_scene(seed=5, index=13).image)
    classify = pipeline("zero-shot-image-classification", model=miniature.checkpoint())
    scores = classify(image, candidate_labels=list(CLASS_NAMES[:5]), hypothesis_template="a {}")
    inputs = student.processor(image, text=[f"a {name}" for name in CLASS_NAMES[:5]])
    with torch.inference_mode():
        model = SamClipModel.from_pretrained(miniature.checkpoint())
        expected = model(**inputs).logits_per_image.softmax(dim=-1)[0]
    by_label = {score["label"]: score["score"] for score in scores}
    torch.testing.assert_close(torch.tensor([by_label[name] for name in CLASS_NAMES[:5]]), expected)


def test_stock_zero_shot_detection_boxes_the_segments_of_a_name(complaints):
    image = Image.fromarray(evaluation_scene(seed=5, index=13).image).resize((200, 150))
    detect = pipeline("zero-shot-object-detection", model=miniature.checkpoint())
    boxes = detect(image, candidate_labels=[CLASS_NAMES[13], CLASS_NAMES[20]])
    sentences = detect(image, candidate_labels=[f"a {CLASS_NAMES[13]}", f"a {CLASS_NAMES[20]}"])
    segments = pipeline("image-segmentation", model=miniature.checkpoint())(image, overlap_mask_area_threshold=0)
    assert not complaints.records
    # A name of the vocabulary has the probability that it has there, and so has the sentence that stands for it there.
    assert [box["label"] for box in boxes] == [CLASS_NAMES[13]]
    assert [box["label"] for box in sentences] == [f"a {CLASS_NAMES[13]}"]
    assert boxes[0]["score"] == pytest.approx(segments[0]["score"], abs=1e-4)
    assert sentences[0]["score"] == pytest.approx(segments[0]["score"], abs=0.02)
    rows, columns = np.nonzero(np.asarray(segments[0]["mask"]))
    box = [boxes[0]["box"][side] for side in ("xmin", "ymin", "xmax", "ymax")]
    assert box == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1)


@pytest.mark.parametrize("auto_class", [AutoModel, SamClipVisionModel])
def test_stock_feature_extraction_agrees_with_the_direct_call(student, complaints, auto_class):
    image = Image.fromarray(evaluation_scene(seed=5, index=13).image).resize((200, 150))
    model = auto_class.from_pretrained(miniature.checkpoint())
    extract = pipeline("image-feature-extraction", model=model, image_processor=miniature.checkpoint())
    with torch.inference_mode():
        outputs = model(**student.processor.image_processor(image, return_tensors="pt"))
    if auto_class is AutoModel:  # SAM-CLIP as a whole gives the image in text space
        assert torch.equal(extract(image, return_tensors=True), outputs.image_embeds)
    else:
        assert torch.equal(extract(image, return_tensors=True), outputs.last_hidden_state)
        assert torch.equal(extract(image, return_tensors=True, pool=True), outputs.pooler_output)
    assert not complaints.records


def test_sam_survived(figures):
    for prompt in ("point_miou", "box_miou"):
        assert figures[prompt]["student"] >= 0.98 * figures[prompt]["teacher"]


def test_clip_was_learnt(figures):
    for group, share in (("zero_shot_top1", 0.95), ("zero_shot_top1_heldout", 0.9)):
        assert figures[group]["student"] >= share * figures[group]["teacher"]


def test_text_segmentation_emerged_and_composing_the_heads_helps(figures):
    by_text = figures["semantic_miou"]
    assert by_text["clip_head"] >= by_text["teacher_patches"] + 0.03
    assert by_text["both_heads"] >= by_text["clip_head"] + 0.05
    assert by_text["both_heads"] >= 0.55  # 0.60 on all 200 scenes


def test_picture_and_table_are_drawn(teachers, student, figures, tmp_path):
    draw(teachers[1], student, tmp_path / "figure.png", num_scenes=2)
    assert Image.open(tmp_path / "figure.png").width > 1000
    patches, both_heads = (figures["semantic_miou"][key] for key in ("teacher_patches", "both_heads"))
    expected = f"| mIoU by text, both heads | {patches:.3f} (patches) | {both_heads:.3f} |"
    assert expected in markdown({"demo": figures})


def test_raw_colour_does_not_solve_the_world(student, figures):
    semantic = world_tasks(share=SHARE)["semantic:miniature@128"]
    assert isinstance(semantic, SemanticSegmentation)
    reached = measure(student, {"colour": NearestColour(semantic.data)})["colour", "mean_iou"]
    assert 0 < reached < 0.1 < figures["semantic_miou"]["clip_head"]
