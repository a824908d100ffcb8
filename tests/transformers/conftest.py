"""Makes the fetched tests the package `transformers_tests`, and stands in for what they import and the sdist lacks."""

import sys
from types import ModuleType

from PIL import Image

from .sdist import FOLDER


def stand_in(name: str, **contents) -> None:
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(contents)


stand_in("transformers_tests", __path__=[str(FOLDER)])
# Two folders of tests, of export and of generation, each of which gives the model mixin a base class.
stand_in("transformers_tests.exporters", __path__=[])
stand_in("transformers_tests.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
stand_in("transformers_tests.generation", __path__=[])
stand_in("transformers_tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
# Pictures of the Hub; any will do.
picture = Image.effect_mandelbrot((640, 480), (-2, -1.25, 1, 1.25), 100)
stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: picture)
