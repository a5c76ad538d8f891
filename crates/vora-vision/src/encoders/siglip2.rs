//! The vision tower of SigLIP 2 (arXiv 2502.14786) for pictures of any aspect (NaFlex), under Hugging Face's names.

use anyhow::{Result, ensure};
use serde::Deserialize;
use vora_image::ImageProcessor;
use vora_torch::weights::{Init, Weights};

use crate::encoders::family::{Family, FolderNames};
use crate::encoders::siglip::{NAMES, SiglipVisionConfig};
use crate::encoders::sizes::{Sizes, square};
use crate::transformer::{Interpolation, Layout, VisionTransformer};

/// The keys of a `Siglip2VisionConfig`; others pass.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Siglip2VisionConfig {
    /// Channels of the hidden states.
    pub hidden_size: i64,
    /// Width of the feed-forward layers.
    pub intermediate_size: i64,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of a block.
    pub num_attention_heads: i64,
    /// 3, for red, green and blue.
    pub num_channels: i64,
    /// Learned positions, a square number; pictures of other grids get them resampled.
    pub num_patches: i64,
    /// Side of a patch, in pixels.
    #[serde(deserialize_with = "square")]
    pub patch_size: i64,
    /// `gelu_pytorch_tanh`
    pub hidden_act: String,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
}

impl Default for Siglip2VisionConfig {
    /// What Hugging Face takes where a key is missing: ViT-B/16 with 256 patches.
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            num_patches: 256,
            patch_size: 16,
            hidden_act: "gelu_pytorch_tanh".to_owned(),
            layer_norm_eps: 1e-6,
        }
    }
}

impl Siglip2VisionConfig {
    /// Takes `embeddings.*`, `encoder.layers.*` and `post_layernorm`. The pooling `head` is left where it is. Hugging
    /// Face pads pictures to the same number of patches and hides the padding from attention; here pictures of one
    /// size come together, without padding, to the same result.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        let sizes = self.sizes();
        sizes.validate()?;
        ensure!(
            sizes.side().pow(2) == self.num_patches,
            "num_patches is {}, which is not a square number",
            self.num_patches
        );
        let (hidden, patch) = (self.hidden_size, self.patch_size);
        let linear = weights.pp("embeddings.patch_embedding");
        let linear = linear.get("weight", &[hidden, patch * patch * 3], Init::Required)?;
        self.siglip().load_around(linear, Layout::ChannelsLast { patch }, Interpolation::BilinearAntialias, weights)
    }

    /// The SigLIP that has these layers, for pictures of as many patches as there are positions.
    fn siglip(&self) -> SiglipVisionConfig {
        SiglipVisionConfig {
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: self.num_attention_heads,
            num_channels: self.num_channels,
            image_size: self.num_patches.max(0).isqrt() * self.patch_size,
            patch_size: self.patch_size,
            hidden_act: self.hidden_act.clone(),
            layer_norm_eps: self.layer_norm_eps,
        }
    }
}

impl Family for Siglip2VisionConfig {
    fn names(&self) -> FolderNames {
        NAMES
    }

    fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        self.load(weights)
    }

    fn sizes(&self) -> Sizes {
        self.siglip().sizes()
    }

    fn num_patches(&self) -> i64 {
        self.num_patches
    }

    fn num_prefix_tokens(&self) -> i64 {
        0
    }

    fn default_processor(&self) -> ImageProcessor {
        ImageProcessor::patches(self.patch_size, self.num_patches)
    }
}

#[cfg(test)]
mod tests {
    use crate::golden::{matches_reference, rounds_as_the_reference};

    #[test]
    fn matches_the_reference() {
        matches_reference("siglip2", &["native", "wide", "small"]);
    }

    #[test]
    fn bf16_is_as_the_reference_has_it() {
        rounds_as_the_reference("siglip2", &["native", "wide", "small"]);
    }
}
