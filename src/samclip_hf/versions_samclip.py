"""
The transformers version that SAM-CLIP needs.

Importing this file raises on an older version. The other files import it before anything that older versions lack, so
that the error names the version and not a missing class.
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
