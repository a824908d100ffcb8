"""
The transformers version that SAM-CLIP needs.

Importing this file raises an `ImportError` with an older version. The other files import it first, so that the error
states the required version instead of a missing class.
"""

import transformers
from packaging.version import Version

MINIMUM_TRANSFORMERS_VERSION = "5.17.0"

if Version(transformers.__version__) < Version(MINIMUM_TRANSFORMERS_VERSION):
    raise ImportError(
        f"SAM-CLIP needs transformers>={MINIMUM_TRANSFORMERS_VERSION}; version {transformers.__version__} is "
        "installed. pip install -U transformers"
    )

__all__ = ["MINIMUM_TRANSFORMERS_VERSION"]
