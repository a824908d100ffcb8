"""Configuration of SAM-CLIP: SAM's configuration plus a CLIP head, CLIP's text tower and, optionally, a vocabulary."""

from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import CLIPTextConfig, PreTrainedConfig, SamConfig, SamVisionConfig, SiglipTextConfig


@strict
class SamClipHeadConfig(PreTrainedConfig):
    r"""
    The CLIP head: transformer layers like the image encoder's last one, pooling, LayerNorm and an MLP with two hidden
    layers (SAM-CLIP, arXiv 2310.15308, section 3 and appendix A).

    num_hidden_layers (`int`, *optional*, defaults to 3):
        Transformer layers between the image encoder and the pooling (appendix A).
    pooling (`"max"` or `"mean"`, *optional*, defaults to `"max"`):
        How patch tokens become one token. The paper chose max for zero-shot classification and segmentation.
    mlp_hidden_size (`int`, *optional*):
        Width of the MLP's two hidden layers. Not stated in the paper; defaults to the image encoder's width.
    projection_dim (`int`, *optional*, defaults to 768):
        Size of the text-aligned space: that of the CLIP teacher (768 for ViT-L/14).
    """

    model_type = "samclip_head"
    base_config_key = "clip_head_config"

    num_hidden_layers: int = 3
    pooling: Literal["max", "mean"] = "max"
    mlp_hidden_size: int | None = None
    projection_dim: int = 768

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers must be 0 or more, got {self.num_hidden_layers}.")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be positive, got {self.projection_dim}.")


@strict
class SamClipConfig(SamConfig):
    r"""
    text_config (`dict`, [`CLIPTextConfig`] or [`SiglipTextConfig`], *optional*):
        CLIP's or SigLIP's text tower; a `dict` is SigLIP's if its `model_type` is `"siglip_text_model"`. SigLIP's
        texts are filled up with its `pad_token_id` to `max_position_embeddings` tokens.
    clip_head_config (`dict` or [`SamClipHeadConfig`], *optional*):
        The CLIP head.
    logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
        Logarithm of the factor between cosine similarities and logits, before a teacher's is copied (as in CLIP).
    vocabulary_label_ids (`list[int]`, *optional*, defaults to `[]`):
        For each class embedding stored in the checkpoint, the label (key of `id2label`) that it stands for; several
        embeddings may share a label. Empty: the checkpoint has no vocabulary. Written by
        [`SamClipForImageSegmentation.set_vocabulary`].
    background_label_id (`int`, *optional*):
        The label that stands for "none of the classes", or `None` where every pixel belongs to a class.
    background_threshold (`float`, *optional*):
        Where that label has no texts: it wins where no class is as probable as this.
    label_tokens (`list[list[int]]`, *optional*, defaults to `[]`):
        The names of the labels but background's, in their order, as the tokenizer gives them: by these, object
        detection knows a name of the vocabulary.
    has_text_tower (`bool`, *optional*, defaults to `True`):
        `False` where it was left out and only the checkpoint's own vocabulary is known.
    composition (`"segments"` or `"classes"`, *optional*, defaults to `"segments"`):
        How both heads are composed: [`SamClipForImageSegmentation.compose_heads`], or the paper's way,
        [`SamClipForImageSegmentation.compose_heads_by_class`].
    composition_points (`int`, *optional*, defaults to 16):
        With `"segments"`: points at which the SAM head is asked what is there.

    Example:

    ```python
    >>> from samclip_hf import SamClipConfig, SamClipModel

    >>> model = SamClipModel(SamClipConfig())  # SAM ViT-B's and CLIP ViT-L/14's sizes, random weights
    ```"""

    model_type = "samclip"
    # transformers 5.17 reads the first name, newer versions the second one.
    sub_configs = {**SamConfig.sub_configs, "text_config": CLIPTextConfig, "clip_head_config": SamClipHeadConfig}
    sub_configs_defaults = dict(sub_configs)

    if TYPE_CHECKING:  # what __post_init__ leaves
        text_config: CLIPTextConfig | SiglipTextConfig
        clip_head_config: SamClipHeadConfig
        vocabulary_label_ids: list[int]
        label_tokens: list[list[int]]
    else:
        text_config: dict | PreTrainedConfig | None = None
        clip_head_config: dict | PreTrainedConfig | None = None
        vocabulary_label_ids: list[int] | None = None
        label_tokens: list[list[int]] | None = None
    logit_scale_init_value: float = 2.6592
    background_label_id: int | None = None
    background_threshold: float | None = None
    has_text_tower: bool = True
    composition: Literal["segments", "classes"] = "segments"
    composition_points: int = 16

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            # The paper's text tower, that of CLIP ViT-L/14; CLIPTextConfig's own defaults are ViT-B/32's.
            self.text_config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        if isinstance(self.text_config, dict):
            kinds = {kind.model_type: kind for kind in (CLIPTextConfig, SiglipTextConfig)}
            model_type = self.text_config.get("model_type", CLIPTextConfig.model_type)
            if model_type not in kinds:
                raise ValueError(f"text_config is of type {model_type!r}, but must be one of {', '.join(kinds)}.")
            self.text_config = kinds[model_type](**self.text_config)
        if self.clip_head_config is None:
            self.clip_head_config = {}
        if isinstance(self.clip_head_config, dict):
            self.clip_head_config = SamClipHeadConfig(**self.clip_head_config)
        if self.vocabulary_label_ids is None:
            self.vocabulary_label_ids = []
        if self.label_tokens is None:
            self.label_tokens = []
        super().__post_init__(**kwargs)

    @property
    def has_siglip_text(self) -> bool:
        """Whether the text tower is SigLIP's rather than CLIP's."""
        return self.text_config.model_type == SiglipTextConfig.model_type

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in [`PreTrainedConfig`]; refuses other models' configurations, SAM's and CLIP's too."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This checkpoint holds a model of type {model_type!r}, not a SAM-CLIP. "
                "SamClipModel.from_teachers(sam, clip) builds a SAM-CLIP from a SAM and a CLIP."
            )
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.composition_points < 1:
            raise ValueError(f"composition_points must be 1 or more, got {self.composition_points}.")
        vision, prompt_encoder = self.vision_config, self.prompt_encoder_config
        if not isinstance(vision, PreTrainedConfig) or not isinstance(prompt_encoder, PreTrainedConfig):
            return
        if vision.patch_size != prompt_encoder.patch_size or vision.image_size != prompt_encoder.image_size:
            raise ValueError(
                "vision_config and prompt_encoder_config must share image_size and patch_size, got "
                f"{vision.image_size}/{vision.patch_size} and {prompt_encoder.image_size}/{prompt_encoder.patch_size}."
            )


@strict
class SamClipVisionConfig(PreTrainedConfig):
    r"""
    SAM-CLIP's eye alone, image encoder and CLIP head, for [`SamClipVisionModel`]. Reads a SAM-CLIP's too.

    vision_config (`dict` or [`SamVisionConfig`], *optional*):
        The image encoder.
    clip_head_config (`dict` or [`SamClipHeadConfig`], *optional*):
        The CLIP head.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of new weights of the CLIP head.
    """

    model_type = "samclip_vision_model"
    sub_configs = {"vision_config": SamVisionConfig, "clip_head_config": SamClipHeadConfig}
    sub_configs_defaults = dict(sub_configs)

    if TYPE_CHECKING:  # what __post_init__ leaves
        vision_config: SamVisionConfig
        clip_head_config: SamClipHeadConfig
    else:
        vision_config: dict | PreTrainedConfig | None = None
        clip_head_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            config = getattr(self, name)
            if config is None or isinstance(config, dict):
                setattr(self, name, config_class(**(config or {})))
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As in [`PreTrainedConfig`]; of a SAM-CLIP's configuration, the eye's part."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == SamClipConfig.model_type:
            own = (*cls.sub_configs, "initializer_range", "dtype")
            config_dict = {name: config_dict[name] for name in own if name in config_dict}
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in [`PreTrainedConfig`]; refuses other models' configurations."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"This checkpoint holds a model of type {model_type!r}, not a SAM-CLIP or its eye.")
        return super().from_dict(config_dict, **kwargs)

    # What vision-language models ask of a vision tower's configuration.

    @property
    def num_hidden_layers(self) -> int:
        """The image encoder's and the CLIP head's: one less than there are `hidden_states`."""
        return self.vision_config.num_hidden_layers + self.clip_head_config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.vision_config.hidden_size

    @property
    def num_attention_heads(self) -> int:
        return self.vision_config.num_attention_heads

    @property
    def num_channels(self) -> int:
        return self.vision_config.num_channels

    @property
    def image_size(self) -> int:
        return self.vision_config.image_size

    @property
    def patch_size(self) -> int:
        return self.vision_config.patch_size


__all__ = ["SamClipConfig", "SamClipHeadConfig", "SamClipVisionConfig"]
