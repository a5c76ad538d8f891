"""Pictures and text as a VoRA takes them: a picture's place in the text becomes as many tokens as it has patches."""

import math

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images


def whole_patches(height, width, patch_size, min_image_tokens, max_image_tokens):
    """The height and width in whole patches nearest to a picture's own, between `min_image_tokens` and `max_image_tokens`
    of them; the maximum always holds."""
    if max(height, width) > max_image_tokens * min(height, width):
        raise ValueError(
            f"a picture of {width} x {height} pixels cannot keep its shape within {max_image_tokens} tokens: crop it, or raise "
            "max_image_tokens"
        )
    sides, by_rounding = (height / patch_size, width / patch_size), 1e-6
    scaled = lambda scale, whole: [max(1, whole(side * scale)) for side in sides]
    scale_to = lambda tokens: math.sqrt(tokens / (sides[0] * sides[1]))
    grid = scaled(max(1.0, 1 / min(sides)), round)
    if math.prod(grid) < min_image_tokens:
        grid = scaled(scale_to(min_image_tokens), lambda side: math.ceil(side - by_rounding))
    if math.prod(grid) > max_image_tokens:
        grid = scaled(scale_to(max_image_tokens), lambda side: math.floor(side + by_rounding))
    return [patches * patch_size for patches in grid]


class VoRAProcessor(ProcessorMixin):
    """Some keys say what no file of an image processor can: `image_backend`, the arithmetic that pictures were resized
    with in training, `pil` or `torchvision`; `background_color`, the colour of the bars that made them square; and
    `min_image_tokens` and `max_image_tokens`, between which pictures kept their own shape instead."""

    # A chat template writes every special token itself, and an answer begins where its row ends.
    text_kwargs = {"padding": False, "padding_side": "left", "add_special_tokens": False}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=14,
        image_token="<image>",
        image_token_id=None,
        image_backend=None,
        background_color=None,
        min_image_tokens=1,
        max_image_tokens=None,
        chat_template=None,
        **kwargs,
    ):
        self.patch_size, self.image_token, self.image_token_id = patch_size, image_token, image_token_id
        self.image_backend, self.background_color = image_backend, background_color
        self.min_image_tokens, self.max_image_tokens = min_image_tokens, max_image_tokens
        pil_class = getattr(transformers, f"{type(image_processor).__name__}Pil", None)
        if image_backend == "pil" and pil_class is not None:
            image_processor = pil_class.from_dict(image_processor.to_dict())
        tokenizer.add_tokens(AddedToken(image_token, normalized=False, special=True), special_tokens=True)
        if image_token_id != (found := tokenizer.convert_tokens_to_ids(image_token)):
            raise ValueError(f"`{image_token}` is token {found} of this tokenizer, the model knows it as {image_token_id}")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self):
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def _process_images(self, images, **kwargs):
        """`pixel_values` `[pictures, 3, height, width]`, padded at the right and the bottom where sizes differ;
        `image_sizes` `[pictures, 2]`, heights and widths without that; and what stands in the text for each."""
        kwargs["return_tensors"] = "pt"
        images = [self.pad_to_square(image) for image in make_flat_list_of_images(images)]
        pictures = [self.image_processor(image, **self.size_of(image), **kwargs)["pixel_values"][0] for image in images]
        sizes = torch.tensor([picture.shape[-2:] for picture in pictures])
        if (sizes % self.patch_size).any():
            raise ValueError(f"pictures of {sizes.tolist()} pixels do not divide into patches of {self.patch_size}")
        height, width = sizes.amax(0).tolist()
        pad = lambda picture: F.pad(picture, (0, width - picture.shape[-1], 0, height - picture.shape[-2]))
        pixel_values = torch.stack([pad(picture) for picture in pictures])
        places = [self.image_token * num_patches for num_patches in (sizes // self.patch_size).prod(1).tolist()]
        return {"pixel_values": pixel_values, "image_sizes": sizes}, places

    def size_of(self, image):
        """What the image processor is told of a picture's size, where the picture keeps its shape."""
        if self.max_image_tokens is None:
            return {}
        image = image if isinstance(image, Image.Image) else to_pil_image(image)
        tokens = (self.min_image_tokens, self.max_image_tokens)
        height, width = whole_patches(image.height, image.width, self.patch_size, *tokens)
        return {"size": {"height": height, "width": width}}

    def pad_to_square(self, image):
        """The picture in the middle of a square of `background_color`, where there is one."""
        if self.background_color is None:
            return image
        image = (image if isinstance(image, Image.Image) else to_pil_image(image)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(self.background_color))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
