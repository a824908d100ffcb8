"""Configuration of SAM-CLIP: SAM's configuration, a CLIP head, a text tower and, optionally, a vocabulary."""

from .versions_samclip import MINIMUM_TRANSFORMERS_VERSION  # isort: skip  # first: raises on older versions

from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import (
    BackboneConfigMixin,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    SamConfig,
    SamVisionConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from .code_samclip import save_code, without_repository


@strict
class SamClipHeadConfig(PreTrainedConfig):
    r"""
    The CLIP head: transformer layers like the image encoder's last one, pooling, LayerNorm and an MLP with two hidden
    layers (SAM-CLIP, arXiv 2310.15308, section 3 and appendix A).

    num_hidden_layers (`int`, *optional*, defaults to 3):
        Number of transformer layers between the image encoder and the pooling (appendix A).
    pooling (`"max"` or `"mean"`, *optional*, defaults to `"max"`):
        How the patch tokens are pooled to one token. The paper uses max for zero-shot classification and segmentation.
    mlp_hidden_size (`int`, *optional*):
        Width of the two hidden layers of the MLP. Defaults to the image encoder's width; the paper does not state it.
    projection_dim (`int`, *optional*, defaults to 768):
        Size of the text space, which is that of the CLIP teacher (768 for ViT-L/14).
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
        The text tower: CLIP's or, if `model_type` is `"siglip_text_model"`, SigLIP's. Texts for SigLIP are padded with
        its `pad_token_id` to `max_position_embeddings` tokens.
    clip_head_config (`dict` or [`SamClipHeadConfig`], *optional*):
        The CLIP head.
    logit_scale_init_value (`float`, *optional*, defaults to 2.6592):
        Initial value of `logit_scale`, the logarithm of the factor between cosine similarities and logits (as in
        CLIP). [`SamClipModel.from_teachers`] copies the teacher's.
    vocabulary_label_ids (`list[int]`, *optional*, defaults to `[]`):
        The label, a key of `id2label`, of each row of the checkpoint's `class_embeds`. Several rows may have the same
        label. Empty if the checkpoint has no vocabulary. Set by
        [`SamClipForImageSegmentation.set_vocabulary`].
    id2label (`dict[int, str]`, *optional*):
        The names of the labels in outputs. After loading, other names for the same number of labels, such as
        translations, can be assigned and are saved. They do not change what the model finds, which the embeddings of
        the names of [`SamClipForImageSegmentation.set_vocabulary`] define.
    vocabulary_num_labels (`int`, *optional*):
        The number of labels of the vocabulary, including background. A label may have no rows, see
        [`SamClipForImageSegmentation.embed_vocabulary`].
    vocabulary_num_neutral (`int`, *optional*, defaults to 0):
        The number of neutral texts of the vocabulary, see [`SamClipForImageSegmentation.embed_vocabulary`]. Not 0 only
        if it was embedded with `multi_label=True`.
    background_label_id (`int`, *optional*):
        The label of pixels that belong to no class. `None` if every pixel belongs to a class.
    background_threshold (`float`, *optional*):
        Set if no texts describe the background. A pixel or segment is background if no class has at least this
        probability.
    has_text_tower (`bool`, *optional*, defaults to `True`):
        `False` in a checkpoint without text tower, which can use its own vocabulary only.
    composition (`"segments"` or `"classes"`, *optional*, defaults to `"segments"`):
        How the CLIP head and the SAM head are combined: [`SamClipForImageSegmentation.compose_heads`], or the paper's
        [`SamClipForImageSegmentation.compose_heads_by_class`].
    composition_points (`int`, *optional*, defaults to 16):
        For `"segments"`: the number of points that prompt the SAM head. [`SamClipModel.from_teachers`] sets 32 in
        unmerged models.
    segment_attention (`"restricted"` or `"class_token"`, *optional*, defaults to `"restricted"`):
        How an unmerged model embeds segments, see [`SamClipTower.pool_segments`].
    clip_vision_config (`dict`, [`CLIPVisionConfig`] or [`SiglipVisionConfig`], *optional*):
        The vision tower of a CLIP or SigLIP, which an unmerged model has in place of the CLIP head. `None` in a merged
        model. [`SamClipModel.from_teachers`] with `merged=False` sets this and the following three arguments.
    clip_image_size (`int`, *optional*):
        Height and width in pixels of the tower's input, a multiple of its patch size. Defaults to
        `clip_vision_config.image_size`.
    clip_pixel_scale, clip_pixel_shift (`list[float]`, *optional*):
        Factors and offsets of the channels that convert `pixel_values` from SAM's normalization to the tower's:
        `pixel_values * clip_pixel_scale + clip_pixel_shift`.
    semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
        The value of pixels in label maps that are ignored by the loss of [`SamClipForImageSegmentation`].
    mask_loss_weight (`float`, *optional*, defaults to 1.0):
        Weight of the SAM head in the loss of [`SamClipForImageSegmentation`] for masks. 0 turns it off.
    teachers (`dict[str, dict[str, str]]`, *optional*):
        The models that [`SamClipModel.from_teachers`] copied weights from, `"sam"` and `"clip"`, as returned by
        [`describe_teacher`]. The model card names them; no output depends on them.

    Example:

    ```python
    >>> from samclip_hf import SamClipConfig, SamClipModel

    >>> model = SamClipModel(SamClipConfig())  # sizes of SAM ViT-B and CLIP ViT-L/14, random weights
    ```"""

    model_type = "samclip"
    # transformers 5.17 reads `sub_configs`, newer versions read `sub_configs_defaults`.
    sub_configs = {
        **SamConfig.sub_configs,
        "text_config": CLIPTextConfig,
        "clip_head_config": SamClipHeadConfig,
    }
    sub_configs_defaults = dict(sub_configs)
    # Newer versions would fill every entry of `sub_configs_defaults`, but a merged model has no clip_vision_config.
    sub_configs["clip_vision_config"] = CLIPVisionConfig
    # Trainer passes only `logits` to `compute_metrics`, as with SegFormer.
    keys_to_ignore_at_inference = [  # a class attribute of transformers' configurations
        *("segment_masks", "segment_logits", "segment_embeds", "segment_scores"),
        *("content_sizes", "dense_embeds", "background_label_ids"),
    ]

    if TYPE_CHECKING:  # types after __post_init__
        text_config: CLIPTextConfig | SiglipTextConfig
        clip_head_config: SamClipHeadConfig
        clip_vision_config: CLIPVisionConfig | SiglipVisionConfig | None
        vocabulary_label_ids: list[int]
    else:
        text_config: dict | PreTrainedConfig | None = None
        clip_head_config: dict | PreTrainedConfig | None = None
        clip_vision_config: dict | PreTrainedConfig | None = None
        vocabulary_label_ids: list[int] | None = None
    logit_scale_init_value: float = 2.6592
    vocabulary_num_labels: int | None = None
    vocabulary_num_neutral: int = 0
    background_label_id: int | None = None
    background_threshold: float | None = None
    has_text_tower: bool = True
    composition: Literal["segments", "classes"] = "segments"
    composition_points: int = 16
    segment_attention: Literal["restricted", "class_token"] = "restricted"
    clip_image_size: int | None = None
    clip_pixel_scale: list[float] | None = None
    clip_pixel_shift: list[float] | None = None
    semantic_loss_ignore_index: int = 255
    mask_loss_weight: float = 1.0
    teachers: dict[str, dict[str, str]] | None = None

    def __post_init__(self, **kwargs):
        if self.text_config is None:
            # The paper's text tower is CLIP ViT-L/14's; the defaults of CLIPTextConfig are ViT-B/32's.
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
        if isinstance(self.clip_vision_config, dict):
            vision_kind = SiglipVisionConfig if self.has_siglip_text else CLIPVisionConfig
            self.clip_vision_config = vision_kind(**self.clip_vision_config)
        if self.clip_vision_config is not None and self.clip_image_size is None:
            self.clip_image_size = self.clip_vision_config.image_size
        if self.vocabulary_label_ids is None:
            self.vocabulary_label_ids = []
        super().__post_init__(**kwargs)

    @property
    def merged(self) -> bool:
        """Whether one image encoder serves SAM and CLIP. An unmerged model has a separate vision tower for CLIP."""
        return self.clip_vision_config is None

    @property
    def has_siglip_text(self) -> bool:
        """Whether the text tower is SigLIP's, not CLIP's."""
        return self.text_config.model_type == SiglipTextConfig.model_type

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in [`PreTrainedConfig`]. Raises `ValueError` for the configuration of another model, such as SAM's."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This checkpoint contains a model of type {model_type!r}, not a SAM-CLIP. "
                "SamClipModel.from_teachers(sam, clip) builds a SAM-CLIP from a SAM and a CLIP."
            )
        if config_dict.get("vocabulary_label_ids"):
            id2label = {int(label_id): name for label_id, name in (config_dict.get("id2label") or {}).items()}
            label2id = {name: label_id for label_id, name in id2label.items()}
            for name, own in (("id2label", id2label), ("label2id", label2id), ("num_labels", len(id2label))):
                given = kwargs.get(name)
                if name == "id2label" and given is not None:
                    pairs = given.items() if isinstance(given, dict) else enumerate(given)
                    given = {int(label_id): label for label_id, label in pairs}
                if given is not None and given != own:
                    raise ValueError(
                        f"{name} cannot change the labels of this checkpoint, because they are defined by their text "
                        f"embeddings. Load it without {name} and set another vocabulary: "
                        'SamClipForImageSegmentation.from_pretrained(...).set_vocabulary(["cat", "sofa"]).'
                    )
            if config_dict.get("vocabulary_num_labels") is None:  # version 0.1.0
                config_dict = config_dict | {"vocabulary_num_labels": len(id2label)}
        is_hub_copy = cls.__module__.startswith("transformers_modules.")
        if not is_hub_copy and "custom_pipelines" in config_dict:
            # This package has registered the pipeline. If transformers found `custom_pipelines`, it would use the
            # checkpoint's code instead, which needs trust_remote_code=True.
            config_dict = dict(config_dict)
            config_dict["_custom_pipelines"] = config_dict.pop("custom_pipelines")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in [`PreTrainedConfig`]."""
        config_dict = super().to_dict()
        pipelines = config_dict.pop("_custom_pipelines", None) or config_dict.get("custom_pipelines")
        if pipelines:
            config_dict["custom_pipelines"] = {
                task: {**entry, "impl": without_repository(entry["impl"])} for task, entry in pipelines.items()
            }
        return config_dict

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in [`PreTrainedConfig`]. The configuration of a published checkpoint is saved with the model's code."""
        save_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def validate_vocabulary(self):
        """Part of `@strict`-powered validation. Raises `ValueError` if `id2label` does not have the labels of the
        vocabulary."""
        if not self.vocabulary_label_ids:
            return
        num_labels = self.vocabulary_num_labels or 1 + max(*self.vocabulary_label_ids, self.background_label_id or 0)
        if sorted(self.id2label or ()) != list(range(num_labels)):
            raise ValueError(
                f"id2label has {len(self.id2label or ())} labels, but the vocabulary of the checkpoint has "
                f"{num_labels}. Labels are defined by their text embeddings. Call set_vocabulary to change them."
            )

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        if self.composition_points < 1:
            raise ValueError(f"composition_points must be 1 or more, got {self.composition_points}.")
        if self.mask_loss_weight < 0:
            raise ValueError(f"mask_loss_weight must be 0 or more, got {self.mask_loss_weight}.")
        if self.merged and self.segment_attention != "restricted":
            raise ValueError(
                'segment_attention has an effect in unmerged models only; a merged model has "restricted".'
            )
        if not self.merged:
            assert self.clip_vision_config is not None and self.clip_image_size is not None
            patch_size = self.clip_vision_config.patch_size
            if self.clip_image_size < 1 or self.clip_image_size % patch_size:
                nearest = max(1, round(self.clip_image_size / patch_size)) * patch_size
                raise ValueError(
                    f"clip_image_size must be a multiple of the patch size {patch_size}, such as {nearest}, got "
                    f"{self.clip_image_size}."
                )
            if self.clip_pixel_scale is None or self.clip_pixel_shift is None:
                raise ValueError("An unmerged model needs clip_pixel_scale and clip_pixel_shift.")
        vision, prompt_encoder = self.vision_config, self.prompt_encoder_config
        if not isinstance(vision, PreTrainedConfig) or not isinstance(prompt_encoder, PreTrainedConfig):
            return
        if vision.patch_size != prompt_encoder.patch_size or vision.image_size != prompt_encoder.image_size:
            raise ValueError(
                "vision_config and prompt_encoder_config must share image_size and patch_size, got "
                f"{vision.image_size}/{vision.patch_size} and {prompt_encoder.image_size}/{prompt_encoder.patch_size}."
            )
        _check_heads(vision)


def _size_of(part: str, name: str) -> Any:
    """A property that reads and writes `name` of the sub-configuration `part`: a copy would not follow its changes."""

    def read(self):
        return getattr(getattr(self, part), name)

    def write(self, value):
        setattr(getattr(self, part), name, value)

    return property(read, write)


# Sizes of SamVisionConfig and SamClipHeadConfig that SamClipVisionConfig takes without nesting. `num_hidden_layers` is
# the sum of both. `mlp_dim` is called `intermediate_size`, as in CLIPVisionConfig.
_ENCODER_SIZES = set(SamVisionConfig.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
_ENCODER_SIZES -= {"num_hidden_layers", "initializer_range"}
_HEAD_SIZES = {"pooling", "mlp_hidden_size", "projection_dim"}


@strict
class SamClipVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    The vision tower alone, image encoder and CLIP head, for [`SamClipVisionModel`]. Sizes are arguments, as in
    [`CLIPVisionConfig`]; `from_pretrained` also reads the configuration of a whole SAM-CLIP.

    hidden_size, num_attention_heads, num_channels, image_size, patch_size, intermediate_size, hidden_act,
    layer_norm_eps, attention_dropout, window_size, global_attn_indexes, ... (*optional*):
        Sizes of the image encoder, as in [`SamVisionConfig`], with its defaults. `intermediate_size` is its `mlp_dim`.
    num_hidden_layers (`int`, *optional*):
        Number of transformer layers of image encoder and CLIP head together, which is one less than the number of
        `hidden_states`. By default the sum of the layers of both parts. If given, the last
        `clip_head_config.num_hidden_layers` of them are those of the CLIP head (3 by default, and at least one layer
        remains for the image encoder).
    projection_dim, pooling, mlp_hidden_size (*optional*):
        Sizes of the CLIP head, as in [`SamClipHeadConfig`].
    vision_config (`dict` or [`SamVisionConfig`], *optional*), clip_head_config (`dict` or [`SamClipHeadConfig`], \
    *optional*):
        The same sizes by part. This is how they are saved.
    initializer_range (`float`, *optional*, defaults to 0.02):
        Standard deviation of new weights of the CLIP head.
    out_features (`list[str]`, *optional*), out_indices (`list[int]`, *optional*):
        For [`SamClipBackbone`]: the layers whose outputs it returns, as names ("stem", "stage1", ...) or indices. By
        default the last layer.

    Example:

    ```python
    >>> from samclip_hf import SamClipVisionConfig, SamClipVisionModel

    >>> config = SamClipVisionConfig(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=64)
    >>> model = SamClipVisionModel(config)  # an encoder of one layer, a CLIP head of three; random weights
    ```"""

    model_type = "samclip_vision_model"
    sub_configs = {"vision_config": SamVisionConfig, "clip_head_config": SamClipHeadConfig}
    sub_configs_defaults = dict(sub_configs)

    if TYPE_CHECKING:  # types after __post_init__
        vision_config: SamVisionConfig
        clip_head_config: SamClipHeadConfig
    else:
        vision_config: dict | PreTrainedConfig | None = None
        clip_head_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if "intermediate_size" in kwargs:
            kwargs["mlp_dim"] = kwargs.pop("intermediate_size")
        head = {name: kwargs.pop(name) for name in _HEAD_SIZES & kwargs.keys()}
        encoder = {name: kwargs.pop(name) for name in _ENCODER_SIZES & kwargs.keys()}
        num_layers = kwargs.pop("num_hidden_layers", None)
        head_layers = _to_dict(self.clip_head_config).get("num_hidden_layers")
        if num_layers is not None:
            if head_layers is None:
                head_layers = head["num_hidden_layers"] = max(0, min(3, num_layers - 1))
            encoder["num_hidden_layers"] = _encoder_layers(num_layers, head_layers)
        if encoder or not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = SamVisionConfig(**(_to_dict(self.vision_config) | encoder))
        if head or not isinstance(self.clip_head_config, PreTrainedConfig):
            self.clip_head_config = SamClipHeadConfig(**(_to_dict(self.clip_head_config) | head))
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in [`PreTrainedConfig`]. The configuration of a published checkpoint is saved with the model's code."""
        save_code(self, save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        _check_heads(self.vision_config)

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of image encoder and CLIP head together, one less than the number of `hidden_states`."""
        return self.vision_config.num_hidden_layers + self.clip_head_config.num_hidden_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int):
        self.vision_config.num_hidden_layers = _encoder_layers(value, self.clip_head_config.num_hidden_layers)

    @property
    def stage_names(self) -> list[str]:
        """Names of the `hidden_states`, for backbones."""
        return ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]

    def set_output_features_output_indices(self, out_features: list | None, out_indices: list | None):
        """As in [`BackboneConfigMixin`], but stores only the given values, so that the default and `out_indices=[-1]`
        are the last layer after a change of `num_hidden_layers`, too."""
        super().set_output_features_output_indices(out_features, out_indices)
        self._out_features, self._out_indices = out_features, None if out_indices is None else list(out_indices)

    @BackboneConfigMixin.out_features.getter
    def out_features(self) -> list[str]:
        """Names of the layers whose outputs [`SamClipBackbone`] returns."""
        if self._out_features is None:
            return [self.stage_names[index] for index in self.out_indices]
        return self._out_features

    @BackboneConfigMixin.out_indices.getter
    def out_indices(self) -> list[int]:
        """Indices of the layers whose outputs [`SamClipBackbone`] returns."""
        if self._out_indices is None and self._out_features is not None:
            return [self.stage_names.index(name) for name in self._out_features]
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As in [`PreTrainedConfig`]. Returns the vision tower's part of the configuration of a whole SAM-CLIP."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == SamClipConfig.model_type:
            if config_dict.get("clip_vision_config") is not None:
                raise ValueError(
                    f"{pretrained_model_name_or_path} is an unmerged model, which has two encoders. "
                    "Use the vision tower of its CLIP, or train a merged model."
                )
            own = (*cls.sub_configs, "initializer_range", "dtype")
            vision_dict = {name: config_dict[name] for name in own if name in config_dict}
            if code := config_dict.get("auto_map", {}).get("AutoConfig"):  # a published folder's
                repository = code.rpartition("--")[0]
                prefix = f"{repository}--" if repository else ""
                vision_dict["auto_map"] = {name: prefix + reference for name, reference in VISION_AUTO_MAP.items()}
            config_dict = vision_dict
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in [`PreTrainedConfig`]. Raises `ValueError` for another model's configuration."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This checkpoint contains a model of type {model_type!r}, not a SAM-CLIP or its vision tower."
            )
        return super().from_dict(config_dict, **kwargs)


# hidden_size, num_attention_heads, image_size, patch_size, projection_dim, ...
for _name in _ENCODER_SIZES:
    setattr(SamClipVisionConfig, _name, _size_of("vision_config", _name))
for _name in _HEAD_SIZES:
    setattr(SamClipVisionConfig, _name, _size_of("clip_head_config", _name))
SamClipVisionConfig.intermediate_size = _size_of("vision_config", "mlp_dim")  # type: ignore[attr-defined]

# Classes of the vision tower in the code of a published folder.
VISION_AUTO_MAP = {
    "AutoConfig": "configuration_samclip.SamClipVisionConfig",
    "AutoModel": "modeling_samclip.SamClipVisionModel",
    "AutoBackbone": "modeling_samclip.SamClipBackbone",
}


def _check_heads(config: SamVisionConfig) -> None:
    """As in [`CLIPVisionConfig`]; [`SamVisionConfig`] does not check it."""
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size, {config.hidden_size}, is not a multiple of num_attention_heads, "
            f"{config.num_attention_heads}."
        )


def _encoder_layers(num_layers: int, head_layers: int) -> int:
    """Number of layers of the image encoder, from that of both parts. Raises `ValueError` if it has none."""
    if num_layers <= head_layers:
        raise ValueError(
            f"num_hidden_layers is {num_layers} for image encoder and CLIP head together, but the CLIP head alone has "
            f"{head_layers}: the image encoder needs at least one."
        )
    return num_layers - head_layers


def _to_dict(config: dict | PreTrainedConfig | None) -> dict:
    return config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config or {})


__all__ = ["MINIMUM_TRANSFORMERS_VERSION", "SamClipConfig", "SamClipHeadConfig", "SamClipVisionConfig"]
