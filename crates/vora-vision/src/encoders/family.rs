//! What a family of vision transformers knows of itself.

use anyhow::Result;
use vora_image::ImageProcessor;
use vora_torch::weights::Weights;

use crate::encoders::sizes::Sizes;
use crate::transformer::VisionTransformer;

/// The config of a family, and what follows from it.
pub(crate) trait Family {
    /// Where the tensors stand.
    fn names(&self) -> FolderNames;

    /// Builds the transformer from its own names at the root of `weights`.
    fn load(&self, weights: &Weights) -> Result<VisionTransformer>;

    /// Its sizes, under the keys that every config has.
    fn sizes(&self) -> Sizes;

    /// Side of a patch, in pixels.
    fn patch_size(&self) -> i64 {
        self.sizes().patch_size
    }

    /// Patches of a picture of the size that it was trained for.
    fn num_patches(&self) -> i64 {
        let Sizes { image_size, patch_size, .. } = self.sizes();
        (image_size / patch_size.max(1)).pow(2)
    }

    /// Tokens before the patches: the class token and registers.
    fn num_prefix_tokens(&self) -> i64;

    /// What its pictures go through where no file says so.
    fn default_processor(&self) -> ImageProcessor;
}

/// Where a family's tensors stand.
pub(crate) struct FolderNames {
    /// In models with more in them.
    pub(crate) prefix: &'static str,
    /// What the model alone writes before its own names.
    pub(crate) alone: &'static str,
    /// The tensor by which the place is known.
    pub(crate) convolution: &'static str,
    /// The norm after the last block.
    pub(crate) last_norm: &'static [&'static str],
    /// What modules are called in files, and in Hugging Face's class itself.
    pub(crate) modules: &'static [(&'static str, &'static str)],
    /// What names of tensors begin with that no encoder reads.
    pub(crate) left_out: &'static [&'static str],
}

/// A config's `image_size` as a side of the pictures that a processor makes.
pub(super) fn side(image_size: i64) -> u32 {
    u32::try_from(image_size).unwrap_or(224)
}
