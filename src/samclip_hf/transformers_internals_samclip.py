"""
Names that transformers does not export. SAM-CLIP's Hub files import them from here and nowhere else. The names that
only the registration needs are in `registration.py`, so that published code does not depend on them.

Checked on transformers 5.17.0 and 5.24.0.

- `SamPromptEncoder`, `SamMaskDecoder`: SAM's prompt encoder and mask decoder. [`SamModel`] is exported, but its
  constructor also builds SAM's image encoder, which SAM-CLIP replaces.
- `SamTwoWayAttentionBlock`: the mask decoder's layer, whose attention weights `output_attentions=True` returns.
- `capture_outputs`, `OutputRecorder`: return `hidden_states` and `attentions` on request, as every model in
  transformers does.
- `sdpa_attention_forward`, `flex_attention_forward`: transformers' entries of `AttentionInterface`. SAM-CLIP's own
  attention computes what they compute, unless another function is registered under their name.
"""

from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder, SamTwoWayAttentionBlock
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

__all__ = [
    "OutputRecorder",
    "SamMaskDecoder",
    "SamPromptEncoder",
    "SamTwoWayAttentionBlock",
    "capture_outputs",
    "flex_attention_forward",
    "sdpa_attention_forward",
]
