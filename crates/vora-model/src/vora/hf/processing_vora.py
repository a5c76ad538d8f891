"""Pictures and text as a VoRA takes them: a picture's place in the text becomes as many tokens as it has patches."""

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken
from torch.nn import functional as F
from transformers import ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images


class VoRAProcessor(ProcessorMixin):
    """`image_backend` and `background_color` say what no file of an image processor can: the arithmetic that pictures
    were resized with in training, `pil` or `torchvision`, and the colour of the bars that made them square."""

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
        chat_template=None,
        **kwargs,
    ):
        self.patch_size, self.image_token, self.image_token_id = patch_size, image_token, image_token_id
        self.image_backend, self.background_color = image_backend, background_color
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
        pictures = [self.image_processor(image, **kwargs)["pixel_values"][0] for image in images]
        sizes = torch.tensor([picture.shape[-2:] for picture in pictures])
        if (sizes % self.patch_size).any():
            raise ValueError(f"pictures of {sizes.tolist()} pixels do not divide into patches of {self.patch_size}")
        height, width = sizes.amax(0).tolist()
        pad = lambda picture: F.pad(picture, (0, width - picture.shape[-1], 0, height - picture.shape[-2]))
        pixel_values = torch.stack([pad(picture) for picture in pictures])
        places = [self.image_token * num_patches for num_patches in (sizes // self.patch_size).prod(1).tolist()]
        return {"pixel_values": pixel_values, "image_sizes": sizes}, places

    def pad_to_square(self, image):
        """The picture in the middle of a square of `background_color`, where there is one."""
        if self.background_color is None:
            return image
        image = (image if isinstance(image, Image.Image) else to_pil_image(image)).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), tuple(self.background_color))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square
