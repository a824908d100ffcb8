"""
A Gradio app for SAM-CLIP: segmentation from points, a box and text, and automatic mask generation. The image encoder
runs once per image.

    python demo/app.py                # the shipped miniature
    python demo/app.py runs/stage3    # a folder or a repository on the Hub

The environment variable SAMCLIP_CHECKPOINT sets the default checkpoint.
"""

import argparse
import colorsys
import os
import tempfile
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import gradio as gr
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import AutoConfig

from samclip_cli import CommandError
from samclip_cli.models import check_model, mask_generation_options
from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.images import open_image
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render

EXAMPLE_SCENES = (42, 3, 50, 54, 57, 8)  # indices of scenes with seed 0, which cover all backgrounds
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # some of Pillow's other formats start external programs
Image.init()  # loads the plugins of all formats; `Image.open(formats=...)` does not
MAX_MEGAPIXELS = 50  # a small file can contain a very large image
MIN_DISPLAY_SIZE = 512  # pixels: smaller images are enlarged
MAX_SESSIONS = 200  # each stores the image embeddings of one image: 17 MB with ViT-B
POINTS_PER_BATCH = 64  # in automatic mask generation

FOREGROUND, BACKGROUND, BOX = "Foreground point", "Background point", "Box"
NEXT_STEPS = {
    FOREGROUND: "Click on the object in the image.",
    BACKGROUND: "Click outside the object in the image.",
    BOX: "Click on a corner of the box in the image.",
}
SECOND_CORNER = "Click on the opposite corner of the box in the image."
NO_IMAGE = "Choose an example or upload an image first."

# Gradio's default opacity of masks is fixed. It sets `active` and `inactive` while the pointer is on the legend.
CSS = """
.masks .mask:not(.active):not(.inactive) { opacity: var(--mask-opacity, 0.6) !important; }
.timers p { font-variant-numeric: tabular-nums; font-size: 0.9em; }
.timers > * { flex: 0 1 auto !important; width: auto !important; }
.timers { border-top: 1px solid var(--border-color-primary); padding-top: 6px; }
.gradio-container { max-width: 1280px !important; }
.masks .legend { gap: 3px; padding-top: 3px; }
.masks .legend-item { font-size: 0.8em; padding: 0 5px; }
#scenes .gallery { gap: 6px; }
#scenes :is(.gallery-item, img) { width: 54px; height: 54px; }
"""
SET_OPACITY = "value => document.documentElement.style.setProperty('--mask-opacity', value)"


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """
    An image and the outputs of the image encoder.

    Attributes:
        image (`PIL.Image.Image`): The displayed image.
        sizes (`dict[str, torch.Tensor]`): `original_sizes` and `reshaped_input_sizes`, from the processor.
        vision_embeds (`SamClipVisionEncoderOutput`): Outputs of the image encoder, on the model's device.
    """

    image: Image.Image
    sizes: dict
    vision_embeds: object

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.height, self.image.width


@dataclass(frozen=True)
class Prompts:
    """
    Prompts in pixels of the displayed image.

    Attributes:
        points (`tuple`): x and y of each point.
        labels (`tuple`): The label of each point: 1 for foreground, 0 for background.
        box (`tuple`, *optional*): x1, y1, x2, y2.
        corner (`tuple`, *optional*): First corner of a box whose second corner is not set yet.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    corner: tuple[float, float] | None = None

    def click(self, mode: str, x: float, y: float) -> "Prompts":
        """
        Returns the prompts after a click. `mode` is `FOREGROUND`, `BACKGROUND` or `BOX`. Raises `ValueError` with a
        message for the user for a box without area.
        """
        if mode != BOX:
            labels = (*self.labels, int(mode == FOREGROUND))
            return replace(self, points=(*self.points, (x, y)), labels=labels, corner=None)
        if self.corner is None:
            return replace(self, corner=(x, y))
        if x == self.corner[0] or y == self.corner[1]:
            raise ValueError(f"The box would have no area. {SECOND_CORNER}")
        left, right = sorted((self.corner[0], x))
        top, bottom = sorted((self.corner[1], y))
        return replace(self, box=(left, top, right, bottom), corner=None)

    def draw(self, image: Image.Image) -> Image.Image:
        """
        Returns a copy of the image with foreground points in green, background points in red, a yellow box, and a
        cross at the first corner of a box.
        """
        image = image.copy()
        draw, radius = ImageDraw.Draw(image), max(image.size) / 60
        for (x, y), label in zip(self.points, self.labels, strict=True):
            color = "lime" if label else "red"
            draw.circle((x, y), radius, fill=color, outline="white", width=max(1, round(radius / 3)))
        width = max(2, round(radius / 3))
        if self.box is not None:
            draw.rectangle(self.box, outline="yellow", width=width)
        if self.corner is not None:
            x, y = self.corner
            for color, length, line_width in (("black", 2 * radius + width, 3 * width), ("yellow", 2 * radius, width)):
                draw.line((x - length, y, x + length, y), fill=color, width=line_width)
                draw.line((x, y - length, x, y + length), fill=color, width=line_width)
        return image

    def next_step(self, mode: str) -> str:
        """Returns what to click on next."""
        return SECOND_CORNER if mode == BOX and self.corner is not None else NEXT_STEPS[mode]


def read_image(path: str | None, longest_edge: int) -> Image.Image:
    """
    Reads an image in RGB and resizes its longer side to `longest_edge` pixels. Raises `ValueError` with a message for
    the user if that fails.
    """
    if path is None or not os.path.getsize(path):
        raise ValueError("The file is empty.")
    try:
        image = open_image(path, max_pixels=MAX_MEGAPIXELS * 10**6, formats=FORMATS)
    except Image.DecompressionBombError:
        raise ValueError(f"The image is too large. The maximum is {MAX_MEGAPIXELS} megapixels.") from None
    except Exception as error:  # Pillow's decoders raise many types for invalid files
        raise ValueError(
            f"The file is not an image or is damaged. Supported formats: {', '.join(FORMATS)}."
        ) from error
    scale = longest_edge / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)


def parse_texts(labels: str, background: str, template: str) -> tuple[list[str], list[str]]:
    """
    Returns the labels and the background texts of the page's fields, which are separated by commas. Raises
    `ValueError` with a message for the user if the model cannot use them.
    """
    names, background_prompts = (
        [text.strip() for text in field.split(",") if text.strip()] for field in (labels, background)
    )
    if not names:
        raise ValueError('The field "Labels" is empty. Enter at least one label, such as "cat, sofa".')
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Enter each label once. Labels that are repeated: {', '.join(repeated)}.")
    if background_prompts and "background" in names:
        raise ValueError('Give the label "background" another name, or empty the field "Background texts".')
    if template.count("{}") != 1:
        raise ValueError(
            'The field "Prompt template" must contain {} once, in the place of the label, such as "a photo of a {}".'
        )
    return names, background_prompts


def overlay(image: Image.Image, masks: list[tuple[torch.Tensor, str, int]]) -> gr.AnnotatedImage:
    """
    Returns an image with masks and a legend.

    Args:
        image (`PIL.Image.Image`): The image.
        masks (`list[tuple[torch.Tensor, str, int]]`): Each mask `(height, width)`, its legend, and a number that
            determines its color.
    """
    hues = {text: colorsys.hsv_to_rgb(number * 0.618 % 1, 0.85, 1) for _, text, number in masks}
    colors = {text: "#" + "".join(f"{round(255 * part):02x}" for part in hue) for text, hue in hues.items()}
    annotations = [(mask.float().cpu().numpy(), text) for mask, text, _ in masks]
    return gr.AnnotatedImage((image, annotations), color_map=colors)


class Timer:
    """Context manager that measures the duration of its block. Its string is the duration in milliseconds."""

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.milliseconds = 1000 * (time.perf_counter() - self.start)

    def __str__(self):
        return f"**{self.milliseconds:.0f} ms**"


class App:
    """
    The callbacks of the page. They return the values of the components that `build` connects them to. The encoded
    image and the prompts are part of the user's session.

    Args:
        checkpoint (`str`): A folder or a repository on the Hub.

    Raises:
        ValueError: If the checkpoint is not a SAM-CLIP.
    """

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint
        self.is_miniature = checkpoint == miniature.checkpoint()
        self.mask_generation = mask_generation_options(checkpoint)
        model_type = AutoConfig.from_pretrained(checkpoint).model_type
        if model_type != "samclip":
            raise ValueError(f'{checkpoint} is a model of type "{model_type}", not a SAM-CLIP.')
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = SamClipForImageSegmentation.from_pretrained(checkpoint).to(device).eval()
        self.processor = SamClipProcessor.from_pretrained(checkpoint)
        self.tokenizer_lock = threading.Lock()  # callbacks run in threads, and tokenizers are not thread-safe
        self.longest_edge = max(MIN_DISPLAY_SIZE, self.processor.image_processor.size["longest_edge"])

        folder = Path(tempfile.mkdtemp(prefix="samclip-scenes-"))
        self.scenes: list[tuple[str, str]] = []  # path and labels
        for index in EXAMPLE_SCENES:
            scene = render(seed=0, index=index)
            path = str(folder / f"scene{index}.png")
            image = Image.fromarray(scene.image)
            image.resize((MIN_DISPLAY_SIZE, MIN_DISPLAY_SIZE), Image.Resampling.BICUBIC).save(path)
            self.scenes.append((path, ", ".join(CLASS_NAMES[number] for number in dict.fromkeys(scene.class_ids))))

    # Callbacks.

    @torch.inference_mode()
    def load(self, path: str | None, encoded: EncodedImage | None, prompts: Prompts):
        """Reads and encodes an image. If it cannot be read, shows a warning and keeps the previous one."""
        try:
            image = read_image(path, self.longest_edge)
        except ValueError as error:
            gr.Warning(str(error), title="The image was not loaded")
            return prompts.draw(encoded.image) if encoded else None, *[gr.skip()] * 7
        inputs = self.processor(images=image)
        with Timer() as timer:
            vision_embeds = self.model.vision_encoder(inputs.pop("pixel_values").to(self.model.device))
        return (
            image,
            EncodedImage(image, dict(inputs), vision_embeds),
            Prompts(),
            overlay(image, []),
            overlay(image, []),
            f"Image encoder {timer}, once per image",
            "",
            "",
        )

    def upload(self, file: dict | None, encoded: EncodedImage | None, prompts: Prompts):
        return self.load(file and file["path"], encoded, prompts)

    def choose(self, index: int, encoded: EncodedImage | None, prompts: Prompts):
        path, labels = self.scenes[index]
        return *self.load(path, encoded, prompts), labels

    def remove(self):
        """Removes the image, its prompts and all results."""
        return None, Prompts(), None, *[None] * 5, *[""] * 4

    def click(self, encoded: EncodedImage | None, prompts: Prompts, mode: str, event: gr.SelectData):
        if encoded is None:
            gr.Warning(NO_IMAGE)
            return gr.skip()
        try:
            prompts = prompts.click(mode, *event.index)
        except ValueError as error:
            gr.Warning(str(error), title="The box was not drawn")
            return gr.skip()
        return self.predict_mask(encoded, prompts)

    def clear(self, encoded: EncodedImage | None):
        return gr.skip() if encoded is None else self.predict_mask(encoded, Prompts())

    @torch.inference_mode()
    def predict_mask(self, encoded: EncodedImage, prompts: Prompts):
        """Predicts one mask from all points and the box. For a single point, it is the one of three masks with the
        highest predicted IoU."""
        masks, duration = [], ""
        if prompts.points or prompts.box:
            inputs = self.processor(
                images=encoded.image,
                input_points=[[prompts.points]] if prompts.points else None,
                input_labels=[[prompts.labels]] if prompts.points else None,
                input_boxes=[[prompts.box]] if prompts.box else None,
            )
            names = [name for name in ("input_points", "input_labels", "input_boxes") if name in inputs]
            with Timer() as timer:
                logits, iou_scores = self.model.predict_masks(
                    encoded.vision_embeds.last_hidden_state,
                    **{name: inputs[name].to(self.model.device) for name in names},
                    multimask_output=len(prompts.points) == 1 and prompts.box is None,
                )
            mask = self.processor.post_process_masks(logits.cpu(), **encoded.sizes)[0][0, iou_scores[0, 0].argmax()]
            masks = [(mask, f"predicted IoU {iou_scores.max():.2f}", 1)]
            duration = f"Points and box {timer}"
        return prompts.draw(encoded.image), prompts, overlay(encoded.image, masks), duration

    @torch.inference_mode()
    def segment(self, encoded: EncodedImage | None, labels: str, background: str, template: str, threshold: float):
        """
        Segments by text with the CLIP head and with both heads, and classifies the whole image. The last output is the
        request, for `segment_changes`. If the texts cannot be used, shows a warning and keeps the previous results.
        """
        if encoded is None:
            gr.Warning(NO_IMAGE)
            return gr.skip()
        request = (encoded, labels, background, template, threshold)
        try:
            names, background_prompts = parse_texts(labels, background, template)
            with self.tokenizer_lock, Timer() as text_tower:
                vocabulary = self.model.embed_vocabulary(
                    names, background_prompts, [template], self.processor.tokenizer
                )
        except ValueError as error:
            gr.Warning(str(error), title="The texts were not used")
            return *[gr.skip()] * 4, request
        id2label = vocabulary.id2label
        inputs = {
            "vision_embeds": encoded.vision_embeds,
            "reshaped_input_sizes": encoded.sizes["reshaped_input_sizes"],
        }

        with Timer() as clip_head:
            outputs = self.model(**inputs, vocabulary=vocabulary, both_heads=False)
        label_map = self.processor.post_process_semantic_segmentation(outputs, [encoded.size])[0]
        by_clip_head = [
            (label_map == label_id, id2label[label_id], label_id)
            for label_id in label_map.unique().tolist()
            if label_id != vocabulary.background_label_id
        ]

        with Timer() as both_heads:
            outputs = self.model(**inputs, vocabulary=vocabulary)
        segments = self.processor.post_process_panoptic_segmentation(
            outputs,
            threshold=threshold,
            overlap_mask_area_threshold=0,  # keep masks that are mostly hidden by others
            label_ids_to_fuse=set(id2label),
            target_sizes=[encoded.size],
        )[0]
        by_both_heads = [
            (
                segments["segmentation"] == segment["id"],
                f"{id2label[segment['label_id']]} {segment['score']:.2f}",
                segment["label_id"],
            )
            for segment in segments["segments_info"]
        ]

        with Timer() as classification:
            image_embeds = F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
            scores = self.model.classify(image_embeds, vocabulary)[0].softmax(dim=-1)
        return (
            overlay(encoded.image, by_clip_head),
            overlay(encoded.image, by_both_heads),
            {id2label[label_id]: score for label_id, score in enumerate(scores.tolist())},
            f"Text tower {text_tower}, CLIP head {clip_head}, both heads {both_heads}, "
            f"classification {classification}",
            request,
        )

    def segment_changes(self, request: tuple | None, *new_request):
        """Segments by text as `segment`, if there is an image and the inputs are not those of the last request."""
        return gr.skip() if new_request[0] is None or new_request == request else self.segment(*new_request)

    @torch.inference_mode()
    def segment_everything(self, encoded: EncodedImage | None):
        """Generates masks as `pipeline("mask-generation")` does, from the image embeddings of the session."""
        if encoded is None:
            gr.Warning(NO_IMAGE)
            return gr.skip()
        image_processor, device, options = self.processor.image_processor, self.model.device, self.mask_generation
        thresholds = {name: options[name] for name in ("pred_iou_thresh", "stability_score_thresh")}
        with Timer() as timer:
            crop_boxes, points, _, labels = image_processor.generate_crop_boxes(
                encoded.image,
                image_processor.size["longest_edge"],
                points_per_crop=options["points_per_crop"],
            )
            filtered = []
            for start in range(0, points.shape[1], POINTS_PER_BATCH):
                batch = slice(start, start + POINTS_PER_BATCH)
                logits, iou_scores = self.model.predict_masks(
                    encoded.vision_embeds.last_hidden_state,
                    points[:, batch].to(device, self.model.dtype),
                    labels[:, batch].to(device),
                )
                masks = image_processor.post_process_masks(logits, **encoded.sizes, binarize=False)
                filtered.append(
                    image_processor.filter_masks(masks[0], iou_scores[0], encoded.size, crop_boxes[0], **thresholds)
                )
            all_masks, all_scores, all_boxes = zip(*filtered, strict=True)
            masks, iou_scores, _, _ = image_processor.post_process_for_mask_generation(
                [mask for batch_masks in all_masks for mask in batch_masks],
                torch.cat(all_scores),
                torch.cat(all_boxes),
                options["crops_nms_thresh"],
            )
        scored = zip(masks, iou_scores.tolist(), strict=True)
        numbered = [(torch.as_tensor(mask), f"{n}: {score:.2f}", n) for n, (mask, score) in enumerate(scored, start=1)]
        return overlay(encoded.image, numbered), f"Everything {timer}, {len(numbered)} masks"

    # The page.

    def describe(self) -> str:
        """Returns a line about the checkpoint."""
        size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        if not self.is_miniature:
            return f"Checkpoint: **{self.checkpoint}**, {size:.0f} million parameters."
        return (
            f"Checkpoint: **the shipped miniature**, {size:.0f} million parameters, trained on procedural scenes, "
            "not on photographs. For another one: `python demo/app.py FOLDER_OR_NAME`."
        )

    def build(self) -> gr.Blocks:
        """Returns the page."""
        image_options = {"height": 290, "format": "jpeg"}  # WebP, Gradio's default, takes ten times as long to write
        mask_options = image_options | {"elem_classes": "masks"}
        with gr.Blocks(title="SAM-CLIP", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(f"### SAM-CLIP: segmentation from points, a box and text\n{self.describe()}")
            encoded = gr.State(None, time_to_live=3600)
            prompts = gr.State(Prompts())
            text_request = gr.State(None, time_to_live=3600)
            with gr.Row():
                input_image = gr.Image(
                    label="Image: click to add points or a box",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    elem_id="input_image",
                    **image_options,
                )
                by_prompts = gr.AnnotatedImage(label="Points and box", elem_id="by_prompts", **mask_options)
                everything = gr.AnnotatedImage(label="Everything", elem_id="everything", **mask_options)
            with gr.Row():
                with gr.Column(scale=3):
                    mode = gr.Radio([FOREGROUND, BACKGROUND, BOX], value=FOREGROUND, show_label=False, elem_id="mode")
                    next_step = gr.Markdown(Prompts().next_step(FOREGROUND), elem_id="next_step")
                with gr.Column(min_width=150, scale=1):
                    clear = gr.Button("Clear points and box", size="sm", elem_id="clear")
                    segment_everything = gr.Button("Segment everything", size="sm", elem_id="segment_everything")
                scenes = gr.Dataset(
                    components=[gr.Image(visible=False)],
                    samples=[[path] for path, _ in self.scenes],
                    type="index",
                    label="Examples",
                    elem_id="scenes",
                    scale=3,
                )
            with gr.Row():
                one_line = {"lines": 1, "max_lines": 1}
                labels = gr.Textbox("", label="Labels, separated by commas", elem_id="labels", scale=4, **one_line)
                template = gr.Textbox(
                    "a {}" if self.is_miniature else "a photo of a {}",
                    label="Prompt template",
                    elem_id="template",
                    **one_line,
                )
            background = gr.Textbox(
                ", ".join(BACKGROUND_PROMPTS),
                label="Background texts, separated by commas",
                elem_id="background",
                **one_line,
            )
            with gr.Row():
                by_clip_head = gr.AnnotatedImage(label="Text: CLIP head", elem_id="by_clip_head", **mask_options)
                by_both_heads = gr.AnnotatedImage(label="Text: both heads", elem_id="by_both_heads", **mask_options)
                with gr.Column():
                    classes = gr.Label(
                        label="Text: whole image", num_top_classes=5, show_heading=False, elem_id="classes"
                    )
                    with gr.Row():
                        slider = {"min_width": 100, "buttons": []}
                        threshold = gr.Slider(0, 1, 0.3, label="Score threshold", elem_id="threshold", **slider)
                        opacity = gr.Slider(0, 1, 0.6, label="Opacity", elem_id="opacity", **slider)
            with gr.Row(elem_classes="timers", elem_id="timers"):
                encoder_time, prompt_time, text_time, everything_time = (gr.Markdown() for _ in range(4))

            state = [encoded, prompts]
            load_outputs = [input_image, *state, by_prompts, everything, encoder_time, prompt_time, everything_time]
            text_inputs = [encoded, labels, background, template, threshold]
            text_outputs = [by_clip_head, by_both_heads, classes, text_time, text_request]
            prompt_outputs = [input_image, prompts, by_prompts, prompt_time]
            # One at a time, so that the results of the last request are shown last.
            one_by_one = {"concurrency_id": "text", "concurrency_limit": 1, "trigger_mode": "always_last"}
            segment = {"fn": self.segment, "inputs": text_inputs, "outputs": text_outputs} | one_by_one
            segment_changes = segment | {"fn": self.segment_changes, "inputs": [text_request, *text_inputs]}
            events = [
                gr.on([labels.submit, background.submit, template.submit, threshold.release], **segment),
                gr.on([labels.blur, background.blur, template.blur], **segment_changes),
            ]
            loads = [
                page.load(lambda *state: self.choose(0, *state), state, [*load_outputs, labels]),
                scenes.click(self.choose, [scenes, *state], [*load_outputs, labels]),
                # Without preprocessing, because Gradio would open the file and report a less specific error.
                input_image.upload(self.upload, [input_image, *state], load_outputs, preprocess=False),
            ]
            events += [*loads, *(load.then(**segment_changes) for load in loads)]
            events.append(
                input_image.select(
                    self.click, [*state, mode], prompt_outputs, trigger_mode="multiple", show_progress="hidden"
                )
            )
            events.append(clear.click(self.clear, encoded, prompt_outputs, show_progress="hidden"))
            events.append(segment_everything.click(self.segment_everything, encoded, [everything, everything_time]))
            image_outputs = [by_prompts, everything, by_clip_head, by_both_heads, classes]
            times = [encoder_time, prompt_time, text_time, everything_time]
            # Results of an image that was removed in the meantime are not shown.
            input_image.clear(self.remove, None, [*state, text_request, *image_outputs, *times], cancels=events)
            gr.on([prompts.change, mode.change], Prompts.next_step, [prompts, mode], next_step, show_progress="hidden")
            opacity.change(None, opacity, js=SET_OPACITY)
        return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=os.environ.get("SAMCLIP_CHECKPOINT") or miniature.checkpoint(),
        help="a folder or a repository on the Hub (default: SAMCLIP_CHECKPOINT, or the shipped miniature)",
    )
    checkpoint = parser.parse_args().checkpoint
    try:
        check_model(checkpoint, "checkpoint")
        app = App(checkpoint)
    except (CommandError, OSError, ValueError) as error:
        parser.error(str(error))
    # System fonts: Gradio's default fonts are downloaded.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app.build().launch(
        theme=theme, css=CSS, max_file_size="64mb", state_session_capacity=MAX_SESSIONS, footer_links=[]
    )


if __name__ == "__main__":
    main()
