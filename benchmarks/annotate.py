"""
Measures the throughput of `samclip annotate`, and divides its time:

    python benchmarks/annotate.py --num_images 40              # the miniature, on its scenes
    python benchmarks/annotate.py --model vit_b --num_images 3  # SAM ViT-B and CLIP ViT-B/16 with random weights
    python benchmarks/annotate.py --model merged_vit_b --num_images 3  # a SAM-CLIP of the two, before training
    python benchmarks/annotate.py --num_images 5000 --processes 2      # the time and the memory of two processes

Without `--processes`, all parts run in one process, one after the other. Shares are of the CPU time of the process,
which other jobs affect less than elapsed time. Other threads read images while the model runs, so their CPU time is
counted in the part that runs at the same time.

Random weights find no segments. With `vit_b` and `merged_vit_b`, the mask decoder runs for every point, and a box of a
grid of 4 x 4 then replaces its masks, as in `inference.py`, so that 16 segments are named, encoded and written.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from inference import replace_masks_by_boxes
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    SamConfig,
    SamImageProcessor,
    SamModel,
)

from samclip_cli import data_sets, segment
from samclip_cli import main as run_command
from samclip_cli.data_sets import DataSetWriter
from samclip_cli.segment import load_segmenter
from samclip_hf import (
    SamClipForImageSegmentation,
    SamClipImageSegmentationPipeline,
    SamClipProcessor,
    miniature,
)
from samclip_hf.clip_tower_samclip import SamClipTower
from samclip_hf.miniature.scenes import BACKGROUND_PROMPTS, CLASS_NAMES, render

LOADING, ENCODER, DECODER, WRITING = "loading the model", "image encoder", "mask decoder", "writing the dataset"


class Division:
    """CPU seconds of parts of a run, of all threads. A part inside of another one is not counted twice."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.inner = [0.0]  # of each part that runs: seconds of the parts inside of it

    def wrap(self, part: str, function: Callable) -> Callable:
        def timed(*args, **kwargs):
            self.inner.append(0.0)
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.process_time() - start
                self.seconds[part] += seconds - self.inner.pop()
                self.inner[-1] += seconds

        return timed

    @contextlib.contextmanager
    def measure(self, replaces_masks: bool) -> Iterator[None]:
        """Measures the parts of `samclip annotate`."""

        def load(*args, **kwargs):
            loaded = segment_load_model(*args, **kwargs)
            model = loaded.model
            if replaces_masks:
                replace_masks_by_boxes(model)
            model.vision_encoder.forward = self.wrap(ENCODER, model.vision_encoder.forward)
            model.predict_masks = self.wrap(DECODER, model.predict_masks)
            model._head_tokens = self.wrap("CLIP side, patches", model._head_tokens)
            if isinstance(model.clip_head, SamClipTower):
                model.clip_head.encode_pixels = self.wrap("CLIP side, patches", model.clip_head.encode_pixels)
            model._embed_segments = self.wrap("CLIP side, segments", model._embed_segments)
            model.forward = self.wrap("composition", model.forward)
            return loaded

        segment_load_model = segment.load_model
        pipeline = SamClipImageSegmentationPipeline
        parts: list[tuple[Any, str, str]] = [
            (pipeline, "preprocess", "preprocessing"),
            (pipeline, "postprocess", "masks at the size of the image"),
            (segment, "coco_annotation", "encoding of masks"),
            (DataSetWriter, "_contact_sheet", "contact sheet"),
            (data_sets, "_png", "PNG compression"),
            (DataSetWriter, "write", WRITING),
        ]
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(segment, "load_model", load))
            loads = self.wrap(LOADING, load_segmenter)
            stack.enter_context(mock.patch("samclip_cli.annotate.load_segmenter", loads))
            for owner, name, part in parts:
                stack.enter_context(mock.patch.object(owner, name, _as_method(self.wrap, part, getattr(owner, name))))
            yield


def _as_method(wrap: Callable, part: str, function: Callable) -> Callable:
    """A plain function, which becomes a method as an attribute of a class."""
    timed = wrap(part, function)
    return lambda *args, **kwargs: timed(*args, **kwargs)


def save_random_models(folder: Path, sam_config: SamConfig, clip_config: CLIPConfig) -> list[str]:
    """Saves a SAM and a CLIP with random weights. Returns their arguments of the command line."""
    torch.manual_seed(0)
    SamModel(sam_config).save_pretrained(folder / "sam")
    size, patch = sam_config.vision_config.image_size, sam_config.vision_config.patch_size
    sides = {"size": {"longest_edge": size}, "pad_size": {"height": size, "width": size}}
    cells = 4 * size // patch
    mask_sides = {"mask_size": {"longest_edge": cells}, "mask_pad_size": {"height": cells, "width": cells}}
    SamImageProcessor(**sides, **mask_sides).save_pretrained(folder / "sam")
    CLIPModel(clip_config).save_pretrained(folder / "clip")
    CLIPTokenizer.from_pretrained(miniature.clip_teacher()).save_pretrained(folder / "clip")
    side = clip_config.vision_config.image_size
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder / "clip"
    )
    return ["--sam", str(folder / "sam"), "--clip", str(folder / "clip")]


def merge_models(folder: Path) -> list[str]:
    """Saves a SAM-CLIP of the models of `save_random_models`. Returns its argument of the command line."""
    teachers = str(folder / "sam"), str(folder / "clip")
    torch.manual_seed(0)
    SamClipForImageSegmentation.from_teachers(*teachers).save_pretrained(folder / "merged")
    SamClipProcessor.from_teachers(*teachers).save_pretrained(folder / "merged")
    return ["--model", str(folder / "merged")]


def command_line(images: Path, arguments: argparse.Namespace, is_random: bool = False) -> list[str]:
    """`samclip annotate` without its model and output. Random weights find no background, and have low scores."""
    labels = ", ".join(CLASS_NAMES[: arguments.num_labels])
    command = ["annotate", str(images), "--labels", labels, "--formats", arguments.formats]
    return [*command, *(["--threshold", "0"] if is_random else ["--background", ", ".join(BACKGROUND_PROMPTS)])]


def run_processes(images: Path, arguments: argparse.Namespace) -> None:
    """Runs the command in several processes, and then in one, which writes the dataset. Prints the time and the peak
    memory."""
    import resource

    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [*command_line(images, arguments), "--output", str(images.parent / "output")]
    print(f"miniature, {arguments.num_images} images, formats {arguments.formats}, {os.cpu_count()} cores\n")
    print("| step | seconds | CPU seconds | GB, largest process so far |\n|---|---|---|---|")
    for step, words in (
        (f"{arguments.processes} processes", launcher),
        ("one process, which writes the dataset", []),
    ):
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, *words, "-m", "samclip_cli", *command], env=environment)
        assert done.returncode == 0
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"| {step} | {seconds:.0f} | {cpu:.0f} | {after.ru_maxrss * 1024 / 1e9:.2f} |", flush=True)


def annotate(images: Path, model: list[str], arguments: argparse.Namespace, division: Division) -> tuple[float, float]:
    """Seconds and CPU seconds of the command in this process."""
    is_random = bool(model)
    command = [*command_line(images, arguments, is_random), *model]
    with tempfile.TemporaryDirectory() as output, division.measure(replaces_masks=is_random):
        start = time.perf_counter(), time.process_time()
        status = run_command([*command, "--output", output])
        seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    assert status == 0
    return seconds


def main(argv: list[str] | None = None, configs: tuple[SamConfig, CLIPConfig] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["miniature", "vit_b", "merged_vit_b"]
    parser.add_argument("--model", choices=models, default="miniature", help="default: %(default)s")
    parser.add_argument("--num_images", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--num_labels", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--formats", default="coco,parquet,webdataset", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--processes", type=int, default=1, help="of one thread each, with the miniature only")
    arguments = parser.parse_args(argv)
    if arguments.processes > 1 and arguments.model != "miniature":
        parser.error("--processes measures the miniature only: remove --model.")
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), []
        images = folder / "images"
        images.mkdir()
        for index in range(arguments.num_images):
            scene = Image.fromarray(render(seed=0, index=index).image)
            scene = scene if arguments.model == "miniature" else scene.resize((1024, 768))
            scene.save(images / f"{index:06d}.png")
        if arguments.processes > 1:
            run_processes(images, arguments)
            return
        if arguments.model != "miniature":
            if configs is None:
                vocabulary = len(CLIPTokenizer.from_pretrained(miniature.clip_teacher()))
                configs = (
                    SamConfig(vision_config={"initializer_range": 0.02}),  # its default is 1e-10
                    CLIPConfig(vision_config={"patch_size": 16}, text_config={"vocab_size": vocabulary}),
                )
            model = save_random_models(folder, *configs)
            if arguments.model == "merged_vit_b":
                model = merge_models(folder)
        else:  # imports libraries
            annotate(images / "000000.png", model, arguments, Division())
        division = Division()
        elapsed, total = annotate(images, model, arguments, division)
    seconds = division.seconds
    seconds["rest"] = total - seconds.total()
    print(f"{arguments.model}, {arguments.num_images} images, formats {arguments.formats}")
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores\n")
    print(f"{elapsed / arguments.num_images:.3f} seconds per image\n")
    print("| part | CPU seconds per image | share |\n|---|---|---|")
    for part, own in [("`samclip annotate`", total), *seconds.most_common()]:
        print(f"| {part} | {own / arguments.num_images:.3f} | {own / total:.2f} |")
    without_loading = total - seconds[LOADING]
    share = seconds[ENCODER] / without_loading
    print(f"\nimage encoder, share of the CPU time without loading the model: {share:.2f}")


if __name__ == "__main__":
    main()
