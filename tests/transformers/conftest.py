"""Makes the downloaded tests the package `transformers_tests`, with replacements for modules that the sdist lacks."""

import sys
from types import ModuleType

from PIL import Image

from .sdist import FOLDER


def replace_module(name: str, **contents) -> None:
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(contents)


replace_module("transformers_tests", __path__=[str(FOLDER)])
# The sdist lacks the folders exporters and generation, from which the model mixin takes base classes.
replace_module("transformers_tests.exporters", __path__=[])
replace_module("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
replace_module("transformers_tests.generation", __path__=[])
replace_module("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
# Any image will do in place of those on the Hub.
image = Image.effect_mandelbrot((640, 480), (-2, -1.25, 1, 1.25), 100)
replace_module("fetch_hub_objects_for_ci", url_to_local_path=lambda url: image)
