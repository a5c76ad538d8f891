"""`config.json` of a VoRA (Vision as LoRA, arXiv:2503.20680): its own keys among those of its language model."""

import inspect

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig


class VoRAConfig(PretrainedConfig):
    """The keys that are not listed here are the language model's: `text_config` is made of them."""

    model_type = "vora"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        llm_model_type="llama",
        vision_embedding_intermediate_size=1536,
        patch_size=14,
        image_size=448,
        image_token_id=None,
        vision_attention_mask="bidirectional",
        fuse_adjacent_images=False,
        pos_embed="interpolate",
        lora=None,
        lora_layer_bias=False,
        llm="",
        aux_vision="",
        vision_embedding="AIMv2Embedding",
        text_config=None,
        **kwargs,
    ):
        self.llm_model_type = llm_model_type
        self.vision_embedding_intermediate_size = vision_embedding_intermediate_size
        self.patch_size = patch_size
        self.image_size = image_size
        self.image_token_id = image_token_id
        self.vision_attention_mask = vision_attention_mask
        self.fuse_adjacent_images = fuse_adjacent_images
        self.pos_embed = pos_embed
        self.lora = lora
        self.lora_layer_bias = lora_layer_bias
        self.llm = llm
        self.aux_vision = aux_vision
        self.vision_embedding = vision_embedding
        of_any_model = inspect.signature(PretrainedConfig.__init__).parameters.keys() | {"auto_map", "_name_or_path"}
        of_llm = {key: value for key, value in kwargs.items() if key not in of_any_model}
        for key in ("dtype", "torch_dtype", "tie_word_embeddings"):
            if key in kwargs:
                of_llm[key] = kwargs[key]
        self.text_config = text_config or CONFIG_MAPPING[llm_model_type](**of_llm)
        super().__init__(**{key: value for key, value in kwargs.items() if key in of_any_model})

    def to_dict(self):
        """One flat object, as it was read."""
        of_llm = self.text_config.to_dict()
        own = super().to_dict()
        del own["text_config"], of_llm["model_type"]
        return of_llm | own
