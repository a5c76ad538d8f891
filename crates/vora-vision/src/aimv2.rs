//! The vision tower of AIMv2 (arXiv 2411.14402), at a fixed and at native resolution, under Hugging Face's names.

use anyhow::{Result, ensure};
use serde::Deserialize;
use vora_torch::rms_norm::RmsNorm;
use vora_torch::weights::{Init, Weights};

use crate::activation::Activation;
use crate::attention::Attention;
use crate::block::Block;
use crate::embeddings::Embeddings;
use crate::layers::{Linear, Norm};
use crate::mlp::Mlp;
use crate::positions::{Interpolation, Positions};
use crate::sizes::{Sizes, square};
use crate::vision_transformer::VisionTransformer;

/// The keys of an `Aimv2VisionConfig`; others pass.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Aimv2VisionConfig {
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
    /// Side of the pictures that it was trained for, in pixels.
    #[serde(deserialize_with = "square")]
    pub image_size: i64,
    /// Side of a patch, in pixels.
    #[serde(deserialize_with = "square")]
    pub patch_size: i64,
    /// `silu`, of the gate.
    pub hidden_act: String,
    /// Added to the mean square in each norm.
    pub rms_norm_eps: f64,
    /// Whether the linear layers of attention have a bias.
    pub qkv_bias: bool,
    /// Whether those of the feed-forward layer have one.
    pub mlp_bias: bool,
    /// Whether positions are computed for any size; else they are a learned table.
    pub is_native: bool,
}

impl Default for Aimv2VisionConfig {
    /// What Hugging Face takes where a key is missing: the large model at 224 pixels.
    fn default() -> Self {
        Self {
            hidden_size: 1024,
            intermediate_size: 2816,
            num_hidden_layers: 24,
            num_attention_heads: 8,
            num_channels: 3,
            image_size: 224,
            patch_size: 14,
            hidden_act: "silu".to_owned(),
            rms_norm_eps: 1e-5,
            qkv_bias: false,
            mlp_bias: false,
            is_native: false,
        }
    }
}

impl Aimv2VisionConfig {
    /// Takes `embeddings.*`, `encoder.layers.*` and `rms_norm`. The pooling `head` is left where it is. Hugging Face
    /// refuses pictures of other sizes than `image_size` for a learned table of positions; here it is resampled as
    /// those of other encoders are.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        let sizes = self.sizes();
        sizes.validate()?;
        let (hidden, patch, side) = (self.hidden_size, self.patch_size, sizes.side());
        ensure!(
            !self.is_native || hidden % 4 == 0,
            "hidden_size {hidden} is not a multiple of 4, which is_native takes for its sines and cosines"
        );
        let embeddings = weights.pp("embeddings");
        let convolution = embeddings.pp("patch_embed");
        let positions = if self.is_native {
            Positions::SinCos { dim: hidden, kind: weights.kind(), device: weights.device() }
        } else {
            let table = embeddings.pp("position_embedding").get("weight", &[side * side, hidden], Init::Required)?;
            Positions::Learned { table, interpolation: Interpolation::Bicubic }
        };
        let block = |i| self.block(&weights.pp("encoder.layers").pp(i));
        Ok(VisionTransformer {
            embeddings: Embeddings::new(
                convolution.get("weight", &[hidden, 3, patch, patch], Init::Required)?,
                Some(convolution.get("bias", &[hidden], Init::Zeros)?),
                positions,
            )
            .with_norm(self.norm(&embeddings.pp("rms_norm"))?),
            pre_norm: None,
            blocks: (0..self.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: Some(self.norm(&weights.pp("rms_norm"))?),
            side,
        })
    }

    fn norm(&self, weights: &Weights) -> Result<Norm> {
        Ok(Box::new(RmsNorm::load(weights, self.hidden_size, self.rms_norm_eps)?))
    }

    fn block(&self, weights: &Weights) -> Result<Block> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let proj = |name| Linear::load(&weights.pp("attention").pp(name), hidden, hidden, self.qkv_bias);
        let ffn = weights.pp("ffn");
        Ok(Block {
            norm1: self.norm(&weights.pp("rms_norm1"))?,
            attention: Attention {
                query: proj("q_proj")?,
                key: proj("k_proj")?,
                value: proj("v_proj")?,
                output: proj("out_proj")?,
                num_heads: self.num_attention_heads,
            },
            scale1: None,
            norm2: self.norm(&weights.pp("rms_norm2"))?,
            mlp: Mlp::Gated {
                gate: Linear::load(&ffn.pp("gate_proj"), hidden, intermediate, self.mlp_bias)?,
                up: Linear::load(&ffn.pp("up_proj"), hidden, intermediate, self.mlp_bias)?,
                activation: Activation::named(&self.hidden_act)?,
                down: Linear::load(&ffn.pp("down_proj"), intermediate, hidden, self.mlp_bias)?,
            },
            scale2: None,
        })
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
}

#[cfg(test)]
mod tests {
    use crate::golden::{load, matches_reference, rounds_as_the_reference};
    use tch::{Device, Kind, Tensor};

    #[test]
    fn matches_the_reference() {
        matches_reference("aimv2", &["native"]);
        matches_reference("aimv2_native", &["native", "wide", "small"]);
    }

    #[test]
    fn bf16_is_as_the_reference_has_it() {
        rounds_as_the_reference("aimv2", &["native"]);
        rounds_as_the_reference("aimv2_native", &["native", "wide", "small"]);
    }

    #[test]
    fn computed_positions_are_a_start_too() {
        let golden = fixtures::open("aimv2_native");
        let model = load("aimv2_native", golden.under("weights."), Kind::Float);
        let positions = model.patchifier().positions;
        assert_eq!(positions.size(), [16, 16]);
        // Row 1, column 2, the fastest of four frequencies: sin x, cos x, sin y, cos y.
        let found: Vec<f32> = [0, 4, 8, 12].map(|i| positions.double_value(&[4 + 2, i]) as f32).into();
        assert_eq!(found, [2f32.sin(), 2f32.cos(), 1f32.sin(), 1f32.cos()]);
        let other = load("aimv2", fixtures::open("aimv2").under("weights."), Kind::Float);
        let wide = other.hidden_states(&Tensor::zeros([1, 3, 12, 28], (Kind::Float, Device::Cpu)));
        assert_eq!(wide[0].size(), [1, 21, 16]); // a learned table is resampled
    }
}
