//! The vision tower of CLIP (arXiv 2103.00020), under Hugging Face's names.

use anyhow::Result;
use serde::Deserialize;
use vora_image::{ImageProcessor, OPENAI_CLIP, Resample};
use vora_torch::weights::{Init, Weights};

use crate::encoders::family::{Family, FolderNames, side};
use crate::encoders::sizes::{Sizes, square};
use crate::transformer::{
    Activation, Attention, Block, Embeddings, Interpolation, Linear, Mlp, Norm, Positions, Projections,
    VisionTransformer,
};
use vora_torch::nn::LayerNorm;

/// The keys of a `CLIPVisionConfig`; others pass.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
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
    /// `quick_gelu` in OpenAI's checkpoints, `gelu` in many others.
    pub hidden_act: String,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
}

impl Default for ClipVisionConfig {
    /// What Hugging Face takes where a key is missing: ViT-B/32 at 224 pixels.
    fn default() -> Self {
        Self {
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: "quick_gelu".to_owned(),
            layer_norm_eps: 1e-5,
        }
    }
}

impl ClipVisionConfig {
    /// Takes `embeddings.*`, `pre_layrnorm` (sic) and `encoder.layers.*`. `post_layernorm` is left where it is: only
    /// CLIP's comparison with words reads it.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        let sizes = self.sizes();
        sizes.validate()?;
        let (hidden, patch, side) = (self.hidden_size, self.patch_size, sizes.side());
        let embeddings = weights.pp("embeddings");
        let convolution = embeddings.pp("patch_embedding").get("weight", &[hidden, 3, patch, patch], Init::Required)?;
        let class = embeddings.get("class_embedding", &[hidden], Init::Required)?;
        let table = embeddings.pp("position_embedding").get("weight", &[1 + side * side, hidden], Init::Required)?;
        let positions = Positions::Learned { table, before: 1, interpolation: Interpolation::Bicubic };
        let block = |i| {
            let layer = ClipLayer { hidden, intermediate: self.intermediate_size, heads: self.num_attention_heads };
            layer.load(&self.hidden_act, self.layer_norm_eps, &weights.pp("encoder.layers").pp(i))
        };
        Ok(VisionTransformer {
            embeddings: Embeddings::new(convolution, None, positions, weights.kind()).with_class(class, None),
            pre_norm: Some(Box::new(LayerNorm::load(&weights.pp("pre_layrnorm"), hidden, self.layer_norm_eps)?)),
            blocks: (0..self.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: None,
            side,
        })
    }
}

/// The sizes of a `CLIPEncoderLayer`, which SigLIP has as well.
pub(crate) struct ClipLayer {
    pub(crate) hidden: i64,
    pub(crate) intermediate: i64,
    pub(crate) heads: i64,
}

impl ClipLayer {
    /// Takes `layer_norm1`, `self_attn.*`, `layer_norm2` and `mlp.*`.
    pub(crate) fn load(&self, hidden_act: &str, eps: f64, weights: &Weights) -> Result<Block> {
        let Self { hidden, intermediate, heads } = *self;
        let norm = |name| Ok::<Norm, anyhow::Error>(Box::new(LayerNorm::load(&weights.pp(name), hidden, eps)?));
        let proj = |name| Linear::load(&weights.pp("self_attn").pp(name), hidden, hidden, true);
        let mlp = weights.pp("mlp");
        Ok(Block {
            norm1: norm("layer_norm1")?,
            attention: Attention {
                projections: Projections::Apart(Box::new([proj("q_proj")?, proj("k_proj")?, proj("v_proj")?])),
                output: proj("out_proj")?,
                num_heads: heads,
            },
            scale1: None,
            norm2: norm("layer_norm2")?,
            mlp: Mlp::Plain {
                fc1: Linear::load(&mlp.pp("fc1"), hidden, intermediate, true)?,
                activation: Activation::named(hidden_act)?,
                fc2: Linear::load(&mlp.pp("fc2"), intermediate, hidden, true)?,
            },
            scale2: None,
        })
    }
}

impl Family for ClipVisionConfig {
    fn names(&self) -> FolderNames {
        FolderNames {
            prefix: "vision_model",
            alone: "vision_model.",
            convolution: "embeddings.patch_embedding.weight",
            last_norm: &["post_layernorm."],
            modules: &[("vision_model.", "")],
            left_out: &[
                "post_layernorm.",
                "embeddings.position_ids",
                "text_model.",
                "visual_projection.",
                "text_projection.",
                "logit_scale",
            ],
        }
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
        1
    }

    fn default_processor(&self) -> ImageProcessor {
        let (mean, std) = OPENAI_CLIP;
        ImageProcessor::square(side(self.image_size), mean, std, Resample::Bicubic)
    }
}

#[cfg(test)]
mod tests {
    use crate::golden::{matches_reference, rounds_as_the_reference};

    #[test]
    fn matches_the_reference() {
        matches_reference("clip", &["native", "wide", "small"]);
    }

    #[test]
    fn bf16_is_as_the_reference_has_it() {
        rounds_as_the_reference("clip", &["native", "wide", "small"]);
    }
}
