"""A VoRA (Vision as LoRA, arXiv:2503.20680): a language model that reads pictures as patches among its words.

Only one small patch embedding stands before the language model; the tokens of a picture attend to each other in both
directions, words as they always did.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .configuration_vora import VoRAConfig


class VoRAPatchifier(nn.Module):
    def __init__(self, config):
        super().__init__()
        dim, patch_size = config.vision_embedding_intermediate_size, config.patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.RMSNorm(dim, eps=config.text_config.rms_norm_eps)

    def forward(self, pixel_values):
        """`[batch, 3, height, width]` -> `[batch, patches, dim]`, patches row by row"""
        return self.norm(self.proj(pixel_values).flatten(2).transpose(1, 2))


class VoRAVisionEmbedding(nn.Module):
    """`(norm(patches) + positions) W^T`, in f32 as it was trained."""

    def __init__(self, config):
        super().__init__()
        dim, self.patch_size = config.vision_embedding_intermediate_size, config.patch_size
        self.side = config.image_size // config.patch_size
        self.takes_first_rows = config.pos_embed == "first_rows"
        self.patchifier = VoRAPatchifier(config)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, dim))
        self.out_proj = nn.Linear(dim, config.text_config.hidden_size, bias=False)

    def positions(self, rows, columns):
        """`[1, rows * columns, dim]`: the table, resampled for pictures of another size than it was made for"""
        if self.takes_first_rows and rows * columns <= self.side**2:
            return self.pos_embed[:, : rows * columns]  # as the published VoRA models were trained
        if (rows, columns) == (self.side, self.side):
            return self.pos_embed
        table = self.pos_embed.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        mode = "bilinear" if self.takes_first_rows else "bicubic"
        return F.interpolate(table, (rows, columns), mode=mode, align_corners=False).flatten(2).transpose(1, 2)

    def forward(self, pixel_values):
        """`[batch, 3, height, width]` -> `[batch, patches, hidden]`"""
        height, width = pixel_values.shape[-2:]
        patches = self.patchifier(pixel_values.to(self.pos_embed.dtype))
        return self.out_proj(patches + self.positions(height // self.patch_size, width // self.patch_size))


class WordsOnly(LogitsProcessor):
    """Another processor of logits, which gets a row's first word for the places of its pictures."""

    def __init__(self, processor, image_token_id):
        self.processor, self.image_token_id = processor, image_token_id

    def __call__(self, input_ids, scores):
        is_image = input_ids == self.image_token_id
        first_word = input_ids.gather(1, is_image.int().argmin(1, keepdim=True))
        return self.processor(torch.where(is_image, first_word, input_ids), scores)


class VoRAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = VoRAConfig
    base_model_prefix = "llm"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["vision_embedding"]

    def __init__(self, config):
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config)
        self.vision_embedding = VoRAVisionEmbedding(config)
        if config.lora_layer_bias:
            self.add_layer_biases()
        self.post_init()

    def add_layer_biases(self):
        """Merged layers of the published VoRA code keep a bias that their language model has none of."""
        layers, targets = self.config.lora["layers"], tuple(self.config.lora["target_modules"])
        for layer in self.llm.model.layers if layers == "all" else self.llm.model.layers[:layers]:
            for name, module in layer.named_modules():
                is_target = any(f".{name}".endswith(f".{target}") for target in targets)
                if isinstance(module, nn.Linear) and module.bias is None and is_target:
                    module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=module.weight.dtype))

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.llm.set_output_embeddings(value)

    def get_decoder(self):
        return self.llm.get_decoder()

    def get_image_features(self, pixel_values, image_sizes=None, **kwargs):
        """One `[patches, hidden]` a picture. `pixel_values` `[pictures, 3, height, width]` are padded at the right and
        the bottom; `image_sizes` `[pictures, 2]` have their heights and widths without that."""
        if image_sizes is None:
            return list(self.vision_embedding(pixel_values))
        pictures = zip(pixel_values, image_sizes.tolist())
        return [self.vision_embedding(picture[None, :, :height, :width])[0] for picture, (height, width) in pictures]

    def block_sequence_ids(self, is_image, features):
        """`[batch, seq]`: tokens with the same number attend to each other in both directions, those with -1 to what came
        before them. A picture is such a block, with `fuse_adjacent_images` together with those right beside it."""
        blocks = torch.full(is_image.shape, -1, device=is_image.device)
        if self.config.fuse_adjacent_images:
            begins = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
            return torch.where(is_image, begins.cumsum(1), blocks)
        lengths = torch.tensor([len(feature) for feature in features], device=is_image.device)
        numbers = torch.arange(len(features), device=is_image.device).repeat_interleave(lengths)
        return blocks.masked_scatter(is_image, numbers)

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_sizes=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values is not None and input_ids is None:
            raise ValueError("pictures go to the places that input_ids have for them; there are only inputs_embeds")
        is_image = None if input_ids is None else input_ids == self.config.image_token_id
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, image_sizes)
            tokens, places = sum(map(len, features)), int(is_image.sum())
            if tokens != places:
                raise ValueError(f"the pictures make {tokens} tokens, the text has places for {places}")
            words = inputs_embeds.dtype
            inputs_embeds = inputs_embeds.masked_scatter(is_image[..., None], torch.cat(features).to(words))
            if self.config.vision_attention_mask == "bidirectional":
                blocks = self.block_sequence_ids(is_image, features)
                past = 0 if past_key_values is None else past_key_values.get_seq_length()
                attention_mask = create_masks_for_generate(
                    config=self.config.get_text_config(),
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                    block_sequence_ids=F.pad(blocks, (past, 0), value=-1),
                )
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(attention_mask=None, **kwargs):
        """Masks are made in `forward`, which knows the pictures."""
        return attention_mask

    def _get_logits_processor(self, *args, **kwargs):
        """What looks at the tokens before, as a repetition penalty does, looks at words: a picture's places have an id
        that the vocabulary may not have."""
        processors = super()._get_logits_processor(*args, **kwargs)
        return LogitsProcessorList(WordsOnly(processor, self.config.image_token_id) for processor in processors)
