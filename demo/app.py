"""
SAM-CLIP in the browser: points, a box, words and everything, from one pass of the image encoder for each picture.

    python demo/app.py                # the shipped miniature
    python demo/app.py runs/stage3    # any SAM-CLIP, a folder or a name on the Hub; so does SAMCLIP_CHECKPOINT
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
from PIL import Image, ImageDraw, ImageOps
from transformers import AutoConfig

from samclip_hf import SamClipForImageSegmentation, SamClipProcessor, miniature
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render

SCENES = (42, 3, 50, 54, 57, 8)  # of world 0: of all backgrounds, and such as the miniature does well
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # not all that Pillow opens: some start other programs
Image.init()  # or `Image.open` would not find the rarer ones by name
MAX_MEGAPIXELS = 50  # a few kilobytes can unpack to gigabytes; telephones take 48
SMALLEST_VIEW = 512  # pixels: smaller pictures are enlarged, to be clicked on
USERS = 200  # whose pictures are remembered: ViT-B's embeddings of one are 17 MB
POINTS_AT_ONCE = 64  # of everything mode: the mask decoder's memory grows with them
# Of everything mode: the stock pipeline's, and the miniature's, whose predicted IoUs and edges are less sure.
GENERATION = {"points_per_side": 32, "pred_iou_thresh": 0.88, "stability_score_thresh": 0.95, "crops_nms_thresh": 0.7}
MINIATURE = {"points_per_side": 16, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.3, "crops_nms_thresh": 0.5}

INSIDE, OUTSIDE, BOX = "point inside", "point outside", "box: two corners"
NO_PICTURE = "Choose a scene or drop a photograph first."

# Gradio draws masks at an opacity of its own; `active` and `inactive` ones are those of a legend that is pointed at.
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


@dataclass(frozen=True)
class Picture:
    """
    A picture and all that the image encoder has to say about it.

    image (`PIL.Image.Image`):
        As it is shown.
    inputs (`dict[str, torch.Tensor]`):
        `original_sizes` and `reshaped_input_sizes`, as the processor gives them.
    vision_embeds (`SamClipVisionEncoderOutput`):
        On the model's device.
    """

    image: Image.Image
    inputs: dict
    vision_embeds: object

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width


@dataclass(frozen=True)
class Prompts:
    """What was clicked, in pixels of the picture: points with their labels, a box, the first corner of the next."""

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    corner: tuple[float, float] | None = None

    def click(self, mode: str, x: float, y: float) -> "Prompts":
        if mode != BOX:
            return replace(self, points=(*self.points, (x, y)), labels=(*self.labels, int(mode == INSIDE)))
        if self.corner is None:
            return replace(self, corner=(x, y))
        left, right = sorted((self.corner[0], x))
        top, bottom = sorted((self.corner[1], y))
        return replace(self, box=(left, top, right, bottom), corner=None)

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of the image that shows them: green inside, red outside, a yellow box."""
        image = image.copy()
        draw, radius = ImageDraw.Draw(image), max(image.size) / 80
        for (x, y), label in zip(self.points, self.labels, strict=True):
            colour = "lime" if label else "red"
            draw.circle((x, y), radius, fill=colour, outline="white", width=max(1, round(radius / 3)))
        if self.box is not None:
            draw.rectangle(self.box, outline="yellow", width=max(2, round(radius / 2)))
        if self.corner is not None:
            draw.circle(self.corner, radius / 2, fill="yellow")
        return image


def read_picture(path: str | None, edge: int) -> Image.Image:
    """A file as an RGB picture whose longer side is `edge` pixels. Raises `ValueError` with what is wrong with it."""
    if path is None or not os.path.getsize(path):
        raise ValueError("This file is empty.")
    try:
        with Image.open(path, formats=FORMATS) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels > MAX_MEGAPIXELS:  # before any of it is unpacked
                raise Image.DecompressionBombError(f"{megapixels:.0f} megapixels")
            if image.mode.startswith("I"):  # 16 bits, of which Pillow would cut off all above 255
                image = image.point(lambda value: value * (1 / 257)).convert("L")
            image = ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise ValueError(f"This picture is too large: at most {MAX_MEGAPIXELS} megapixels, please.") from None
    except Exception as error:  # decoders of broken files raise anything
        raise ValueError(
            f"This file is no picture, or a broken one. What can be read: {', '.join(FORMATS)}."
        ) from error
    scale = edge / max(image.size)
    return image.resize(tuple(max(1, round(side * scale)) for side in image.size), Image.Resampling.BICUBIC)


def overlay(image: Image.Image, masks: list[tuple[torch.Tensor, str, int]]) -> gr.AnnotatedImage:
    """Masks `(height, width)` with their text in the legend and a number that gives the colour."""
    hues = {text: colorsys.hsv_to_rgb(number * 0.618 % 1, 0.85, 1) for _, text, number in masks}
    colours = {text: "#" + "".join(f"{round(255 * part):02x}" for part in hue) for text, hue in hues.items()}
    annotations = [(mask.float().cpu().numpy(), text) for mask, text, _ in masks]
    return gr.AnnotatedImage((image, annotations), color_map=colours)


class Timer:
    """Milliseconds of a `with` block."""

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
    The page's callbacks. What they return goes to the components that `build` names; the picture and the prompts are
    each user's own.

    checkpoint (`str`):
        A folder or a name on the Hub.
    """

    def __init__(self, checkpoint: str):
        self.checkpoint = checkpoint
        self.is_miniature = checkpoint == miniature.checkpoint()
        self.generation = MINIATURE if self.is_miniature else GENERATION
        kind = AutoConfig.from_pretrained(checkpoint).model_type
        if kind != "samclip":
            raise ValueError(f'{checkpoint} is a model of type "{kind}", not a SAM-CLIP.')
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = SamClipForImageSegmentation.from_pretrained(checkpoint).to(device).eval()
        self.processor = SamClipProcessor.from_pretrained(checkpoint)
        self.tokenizing = threading.Lock()  # one call's padding is another's, and callbacks run in threads
        self.edge = max(SMALLEST_VIEW, self.processor.image_processor.size["longest_edge"])

        folder = Path(tempfile.mkdtemp(prefix="samclip-scenes-"))
        self.scenes: list[tuple[str, str]] = []  # path, words
        for index in SCENES:
            scene = render(seed=0, index=index)
            path = str(folder / f"scene{index}.png")
            image = Image.fromarray(scene.image)
            image.resize((SMALLEST_VIEW, SMALLEST_VIEW), Image.Resampling.BICUBIC).save(path)
            self.scenes.append((path, ", ".join(CLASS_NAMES[number] for number in dict.fromkeys(scene.class_ids))))

    # Callbacks.

    @torch.inference_mode()
    def load(self, path: str | None, picture: Picture | None, prompts: Prompts):
        """A new picture: the only pass of the image encoder. One that cannot be read leaves everything as it was."""
        try:
            image = read_picture(path, self.edge)
        except ValueError as error:
            gr.Warning(f"{error} The picture before it stays.", title="Not loaded")
            return prompts.draw(picture.image) if picture else None, *[gr.skip()] * 7
        inputs = self.processor(images=image)
        with Timer() as timer:
            vision_embeds = self.model.vision_encoder(inputs.pop("pixel_values").to(self.model.device))
        return (
            image,
            Picture(image, dict(inputs), vision_embeds),
            Prompts(),
            overlay(image, []),
            overlay(image, []),
            f"Image encoder {timer}, once for this picture",
            "",
            "",
        )

    def upload(self, file: dict | None, picture: Picture | None, prompts: Prompts):
        return self.load(file and file["path"], picture, prompts)

    def choose(self, index: int, picture: Picture | None, prompts: Prompts):
        path, words = self.scenes[index]
        return *self.load(path, picture, prompts), words

    def click(self, picture: Picture | None, prompts: Prompts, mode: str, event: gr.SelectData):
        if picture is None:
            gr.Warning(NO_PICTURE)
            return gr.skip()
        return self.prompt(picture, prompts.click(mode, *event.index))

    def clear(self, picture: Picture | None):
        return gr.skip() if picture is None else self.prompt(picture, Prompts())

    @torch.inference_mode()
    def prompt(self, picture: Picture, prompts: Prompts):
        """The mask of the points and the box together: of three for a single point, the best."""
        shown, masks, line = prompts.draw(picture.image), [], ""
        if prompts.points or prompts.box:
            inputs = self.processor(
                images=picture.image,
                input_points=[[prompts.points]] if prompts.points else None,
                input_labels=[[prompts.labels]] if prompts.points else None,
                input_boxes=[[prompts.box]] if prompts.box else None,
            )
            names = [name for name in ("input_points", "input_labels", "input_boxes") if name in inputs]
            with Timer() as timer:
                logits, iou_scores = self.model.predict_masks(
                    picture.vision_embeds.last_hidden_state,
                    **{name: inputs[name].to(self.model.device) for name in names},
                    multimask_output=len(prompts.points) == 1 and prompts.box is None,
                )
            mask = self.processor.post_process_masks(logits.cpu(), **picture.inputs)[0][0, iou_scores[0, 0].argmax()]
            masks = [(mask, f"predicted IoU {iou_scores.max():.2f}", 1)]
            line = f"Points and box {timer}"
        return shown, prompts, overlay(picture.image, masks), line

    @torch.inference_mode()
    def segment(self, picture: Picture | None, words: str, background: str, sentence: str, least_score: float):
        """By words: the CLIP head alone, both heads, and the picture as a whole."""
        if picture is None:
            gr.Warning(NO_PICTURE)
            return gr.skip()
        labels, others = ([text.strip() for text in field.split(",") if text.strip()] for field in (words, background))
        try:
            with self.tokenizing, Timer() as text:
                vocabulary = self.model.embed_vocabulary(labels, others, [sentence], self.processor.tokenizer)
        except ValueError as error:  # what is wrong with the words
            gr.Warning(str(error), title="Words")
            return gr.skip()
        names, nothing = vocabulary.id2label, vocabulary.background_label_id
        inputs = {
            "vision_embeds": picture.vision_embeds,
            "reshaped_input_sizes": picture.inputs["reshaped_input_sizes"],
        }

        with Timer() as clip_head:
            outputs = self.model(**inputs, vocabulary=vocabulary, both_heads=False)
        labels = self.processor.post_process_semantic_segmentation(outputs, [picture.size])[0]
        found = [number for number in labels.unique().tolist() if number != nothing]
        by_clip_head = [(labels == number, names[number], number) for number in found]

        with Timer() as both_heads:
            outputs = self.model(**inputs, vocabulary=vocabulary)
        segments = self.processor.post_process_panoptic_segmentation(
            outputs,
            threshold=least_score,
            overlap_mask_area_threshold=0,  # all that is seen of a mask behind others
            label_ids_to_fuse=set(names),
            target_sizes=[picture.size],
        )[0]
        by_both_heads = [
            (
                segments["segmentation"] == segment["id"],
                f"{names[segment['label_id']]} {segment['score']:.2f}",
                segment["label_id"],
            )
            for segment in segments["segments_info"]
        ]

        with Timer() as whole:
            image_embeds = F.normalize(self.model.get_image_features(**inputs).pooler_output, dim=-1)
            scores = self.model.classify(image_embeds, vocabulary)[0].softmax(dim=-1)
        return (
            overlay(picture.image, by_clip_head),
            overlay(picture.image, by_both_heads),
            {names[number]: score for number, score in enumerate(scores.tolist())},
            f"Text tower {text}, CLIP head {clip_head}, both heads {both_heads}, whole picture {whole}",
        )

    @torch.inference_mode()
    def draw_everything(self, picture: Picture | None):
        """What the stock mask-generation pipeline does, but from the embedding that is there."""
        if picture is None:
            gr.Warning(NO_PICTURE)
            return gr.skip()
        image_processor, device, options = self.processor.image_processor, self.model.device, self.generation
        thresholds = {name: options[name] for name in ("pred_iou_thresh", "stability_score_thresh")}
        with Timer() as timer:
            crop_boxes, points, _, labels = image_processor.generate_crop_boxes(
                picture.image,
                image_processor.size["longest_edge"],
                points_per_crop=options["points_per_side"],
            )
            kept = []
            for start in range(0, points.shape[1], POINTS_AT_ONCE):
                chunk = slice(start, start + POINTS_AT_ONCE)
                logits, iou_scores = self.model.predict_masks(
                    picture.vision_embeds.last_hidden_state,
                    points[:, chunk].to(device, self.model.dtype),
                    labels[:, chunk].to(device),
                )
                masks = image_processor.post_process_masks(logits, **picture.inputs, binarize=False)
                kept.append(
                    image_processor.filter_masks(masks[0], iou_scores[0], picture.size, crop_boxes[0], **thresholds)
                )
            all_masks, all_scores, all_boxes = zip(*kept, strict=True)
            masks, iou_scores, _, _ = image_processor.post_process_for_mask_generation(
                [mask for chunk in all_masks for mask in chunk],
                torch.cat(all_scores),
                torch.cat(all_boxes),
                options["crops_nms_thresh"],
            )
        scored = zip(masks, iou_scores.tolist(), strict=True)
        numbered = [(torch.as_tensor(mask), f"{n}: {score:.2f}", n) for n, (mask, score) in enumerate(scored, start=1)]
        return overlay(picture.image, numbered), f"Everything {timer}, {len(numbered)} masks"

    # The page.

    def describe(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        if not self.is_miniature:
            return f"Checkpoint: **{self.checkpoint}**, {size:.0f} million parameters."
        return (
            f"Checkpoint: **the shipped miniature**, {size:.0f} million parameters, trained on drawn scenes; it knows "
            "nothing of photographs. Another one: `python demo/app.py FOLDER_OR_NAME`."
        )

    def build(self) -> gr.Blocks:
        looks = {"height": 290, "format": "jpeg"}  # Gradio's WebP takes ten times as long to write
        masks = looks | {"elem_classes": "masks"}
        with gr.Blocks(title="SAM-CLIP", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
            gr.Markdown(f"### SAM-CLIP: points, a box and words, from one pass of the encoder\n{self.describe()}")
            picture = gr.State(None, time_to_live=3600)
            prompts = gr.State(Prompts())
            with gr.Row():
                photograph = gr.Image(
                    label="Drop a photograph here, then click on it",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    elem_id="photograph",
                    **looks,
                )
                by_prompts = gr.AnnotatedImage(label="Points and box", elem_id="by_prompts", **masks)
                everything = gr.AnnotatedImage(label="Everything", elem_id="everything", **masks)
            with gr.Row():
                mode = gr.Radio([INSIDE, OUTSIDE, BOX], value=INSIDE, show_label=False, elem_id="mode", scale=3)
                with gr.Column(min_width=150, scale=1):
                    clear = gr.Button("Clear points and box", size="sm", elem_id="clear")
                    draw_everything = gr.Button("Draw everything", size="sm", elem_id="draw_everything")
                scenes = gr.Dataset(
                    components=[gr.Image(visible=False)],
                    samples=[[path] for path, _ in self.scenes],
                    type="index",
                    label="Scenes drawn by samclip_hf.miniature",
                    elem_id="scenes",
                    scale=3,
                )
            with gr.Row():
                one_line = {"lines": 1, "max_lines": 1}
                words = gr.Textbox(label="Words, with commas between", elem_id="words", scale=3, **one_line)
                background = gr.Textbox(
                    ", ".join(BACKGROUND_PROMPTS), label="What is none of them", elem_id="background", **one_line
                )
                sentence = gr.Textbox(
                    "a {}" if self.is_miniature else "a photo of a {}", label="Sentence around a word", **one_line
                )
            with gr.Row():
                by_clip_head = gr.AnnotatedImage(label="Words: CLIP head alone", elem_id="by_clip_head", **masks)
                by_both_heads = gr.AnnotatedImage(label="Words: both heads", elem_id="by_both_heads", **masks)
                with gr.Column():
                    classes = gr.Label(
                        label="Words: the picture as a whole", num_top_classes=5, show_heading=False, elem_id="classes"
                    )
                    with gr.Row():
                        slider = {"min_width": 100, "buttons": []}
                        least_score = gr.Slider(0, 1, 0.3, label="Least score", elem_id="least_score", **slider)
                        opacity = gr.Slider(0, 1, 0.6, label="Opacity", elem_id="opacity", **slider)
            with gr.Row(elem_classes="timers", elem_id="timers"):
                encoder_time, prompt_time, words_time, everything_time = (gr.Markdown() for _ in range(4))

            state = [picture, prompts]
            loaded = [photograph, *state, by_prompts, everything, encoder_time, prompt_time, everything_time]
            asked = [picture, words, background, sentence, least_score]
            answered = [by_clip_head, by_both_heads, classes, words_time]
            prompted = [photograph, prompts, by_prompts, prompt_time]
            gr.on(
                [words.submit, background.submit, sentence.submit, least_score.release], self.segment, asked, answered
            )
            page.load(lambda *own: self.choose(0, *own), state, [*loaded, words]).then(self.segment, asked, answered)
            scenes.click(self.choose, [scenes, *state], [*loaded, words]).then(self.segment, asked, answered)
            # Not preprocessed: Gradio would open the file itself, and fail where `read_picture` can say why.
            photograph.upload(self.upload, [photograph, *state], loaded, preprocess=False).then(
                self.segment, asked, answered
            )
            photograph.select(self.click, [*state, mode], prompted, trigger_mode="multiple", show_progress="hidden")
            clear.click(self.clear, picture, prompted, show_progress="hidden")
            draw_everything.click(self.draw_everything, picture, [everything, everything_time])
            opacity.change(None, opacity, js=SET_OPACITY)
        return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", nargs="?", default=os.environ.get("SAMCLIP_CHECKPOINT") or miniature.checkpoint()
    )
    try:
        app = App(parser.parse_args().checkpoint)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    # Fonts of the system: Gradio's own would come from elsewhere.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app.build().launch(theme=theme, css=CSS, max_file_size="64mb", state_session_capacity=USERS, footer_links=[])


if __name__ == "__main__":
    main()
