//! The vision tower of SigLIP (arXiv 2303.15343) and of SigLIP 2 (arXiv 2502.14786) at a fixed resolution, under
//! Hugging Face's names.

use anyhow::Result;
use serde::Deserialize;
use tch::Tensor;
use vora_image::{IMAGENET_STANDARD, ImageProcessor, Resample};
use vora_torch::weights::{Init, Weights};

use crate::encoders::clip::ClipLayer;
use crate::encoders::family::{Family, FolderNames, side};
use crate::encoders::sizes::{Sizes, square};
use crate::transformer::{Embeddings, Interpolation, Layout, Positions, VisionTransformer};
use vora_torch::nn::LayerNorm;

/// The keys of a `SiglipVisionConfig`; others pass.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct SiglipVisionConfig {
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
    /// Side of the pictures that the position table was learned for, in pixels.
    #[serde(deserialize_with = "square")]
    pub image_size: i64,
    /// Side of a patch, in pixels.
    #[serde(deserialize_with = "square")]
    pub patch_size: i64,
    /// `gelu_pytorch_tanh`
    pub hidden_act: String,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
}

impl Default for SiglipVisionConfig {
    /// What Hugging Face takes where a key is missing: ViT-B/16 at 224 pixels.
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 16,
            hidden_act: "gelu_pytorch_tanh".to_owned(),
            layer_norm_eps: 1e-6,
        }
    }
}

impl SiglipVisionConfig {
    /// Takes `embeddings.*`, `encoder.layers.*` and `post_layernorm`. The pooling `head` is left where it is.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        self.sizes().validate()?;
        let shape = [self.hidden_size, 3, self.patch_size, self.patch_size];
        let convolution = weights.pp("embeddings.patch_embedding").get("weight", &shape, Init::Required)?;
        self.load_around(convolution, Layout::Convolution, Interpolation::Bicubic, weights)
    }

    /// All but the weight of the convolution, for a config whose sizes were checked.
    pub(crate) fn load_around(
        &self,
        convolution: Tensor,
        layout: Layout,
        interpolation: Interpolation,
        weights: &Weights,
    ) -> Result<VisionTransformer> {
        let (hidden, side) = (self.hidden_size, self.sizes().side());
        let embeddings = weights.pp("embeddings");
        let bias = embeddings.pp("patch_embedding").get("bias", &[hidden], Init::Zeros)?;
        let table = embeddings.pp("position_embedding").get("weight", &[side * side, hidden], Init::Required)?;
        let positions = Positions::Learned { table, before: 0, interpolation };
        let block = |i| {
            let layer = ClipLayer { hidden, intermediate: self.intermediate_size, heads: self.num_attention_heads };
            layer.load(&self.hidden_act, self.layer_norm_eps, &weights.pp("encoder.layers").pp(i))
        };
        Ok(VisionTransformer {
            embeddings: Embeddings::new(convolution, Some(bias), positions, weights.kind()).with_layout(layout),
            pre_norm: None,
            blocks: (0..self.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: Some(Box::new(LayerNorm::load(&weights.pp("post_layernorm"), hidden, self.layer_norm_eps)?)),
            side,
        })
    }
}

/// Where SigLIP's tensors stand, and SigLIP 2's.
pub(super) const NAMES: FolderNames = FolderNames {
    prefix: "vision_model",
    alone: "vision_model.",
    convolution: "embeddings.patch_embedding.weight",
    last_norm: &["post_layernorm."],
    modules: &[("vision_model.", "")],
    left_out: &["head.", "embeddings.position_ids", "text_model.", "logit_scale", "logit_bias"],
};

impl Family for SiglipVisionConfig {
    fn names(&self) -> FolderNames {
        NAMES
    }

    fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        self.load(weights)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            hidden_size: self.hidden_size,
            num_attention_heads: self.num_attention_heads,
            num_channels: self.num_channels,
            image_size: self.image_size,
            patch_size: self.patch_size,
        }
    }

    fn num_prefix_tokens(&self) -> i64 {
        0
    }

    fn default_processor(&self) -> ImageProcessor {
        let (mean, std) = IMAGENET_STANDARD;
        ImageProcessor::square(side(self.image_size), mean, std, Resample::Bicubic)
    }
}

#[cfg(test)]
mod tests {
    use crate::golden::{matches_reference, rounds_as_the_reference};

    #[test]
    fn matches_the_reference() {
        matches_reference("siglip", &["native", "wide", "small"]);
    }

    #[test]
    fn bf16_is_as_the_reference_has_it() {
        rounds_as_the_reference("siglip", &["native", "wide", "small"]);
    }
}
