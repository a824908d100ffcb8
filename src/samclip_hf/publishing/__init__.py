"""Publishing on the Hub: a repository that loads without this package, its model card, and its verification."""

from .repository import PublishingError, build_repository, card, find_target, prepare_push, push, verify

__all__ = ["PublishingError", "build_repository", "card", "find_target", "prepare_push", "push", "verify"]
