"""Publishing on the Hub: a repository that loads without this package, its model card, and its verification.

Needs the extra `train`.
"""

from .card import (
    UNKNOWN_LICENSE,
    check_results_name,
    create_model_card,
    draw_example_image,
    prepare_push,
    publish_provenance,
    read_results,
)
from .repository import PublishingError, add_code, build_repository, push, resolve_target
from .verification import verify

__all__ = [
    "UNKNOWN_LICENSE",
    "PublishingError",
    "add_code",
    "build_repository",
    "check_results_name",
    "create_model_card",
    "draw_example_image",
    "prepare_push",
    "publish_provenance",
    "push",
    "read_results",
    "resolve_target",
    "verify",
]
