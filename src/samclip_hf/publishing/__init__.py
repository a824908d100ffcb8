"""Publishing on the Hub: a repository that loads without this package, its model card, and its verification.

Needs the extra `train`.
"""

from .card import (
    UNKNOWN_LICENSE,
    create_model_card,
    draw_example_image,
    find_results,
    prepare_push,
    publish_provenance,
)
from .repository import PublishingError, add_code, build_repository, push, resolve_target
from .verification import verify

__all__ = [
    "UNKNOWN_LICENSE",
    "PublishingError",
    "add_code",
    "build_repository",
    "create_model_card",
    "draw_example_image",
    "find_results",
    "prepare_push",
    "publish_provenance",
    "push",
    "resolve_target",
    "verify",
]
