//! DINOv2 (arXiv 2304.07193), with or without registers: a frozen vision transformer under Hugging Face's names.

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample};
use vora_torch::weights::{Init, Weights};

use crate::encoders::family::{Family, FolderNames, side};
use crate::encoders::sizes::{Sizes, square};
use crate::transformer::{
    Activation, Attention, Block, Embeddings, Gates, Interpolation, Linear, Mlp, Norm, Positions, Projections,
    VisionTransformer,
};
use vora_torch::nn::LayerNorm;

/// The keys of a `config.json` of `Dinov2Model` or `Dinov2WithRegistersModel`; others pass.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct Dinov2Config {
    /// Channels of the hidden states.
    pub hidden_size: i64,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of a block.
    pub num_attention_heads: i64,
    /// Width of the feed-forward layer over `hidden_size`.
    pub mlp_ratio: f64,
    /// 3, for red, green and blue.
    pub num_channels: i64,
    /// `gelu`; not read where `use_swiglu_ffn` is set.
    pub hidden_act: String,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
    /// Side of the pictures that the position table was learned for, in pixels.
    #[serde(deserialize_with = "square")]
    pub image_size: i64,
    /// Side of a patch, in pixels.
    #[serde(deserialize_with = "square")]
    pub patch_size: i64,
    /// Whether query, key and value have a bias.
    pub qkv_bias: bool,
    /// Gated feed-forward layer, as the giant has it.
    pub use_swiglu_ffn: bool,
    /// Tokens between the class token and the patches.
    pub num_register_tokens: i64,
    /// `dinov2` or `dinov2_with_registers`: the two resample positions differently.
    pub model_type: String,
}

impl Default for Dinov2Config {
    /// What Hugging Face takes where a key is missing: the base model at 224 pixels.
    fn default() -> Self {
        Self {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            mlp_ratio: 4.0,
            num_channels: 3,
            hidden_act: "gelu".to_owned(),
            layer_norm_eps: 1e-6,
            image_size: 224,
            patch_size: 14,
            qkv_bias: true,
            use_swiglu_ffn: false,
            num_register_tokens: 0,
            model_type: "dinov2".to_owned(),
        }
    }
}

impl Dinov2Config {
    /// A model of three small blocks for tests: hidden 16, patches of 4 in pictures of 16 pixels.
    pub fn tiny() -> Self {
        Self {
            hidden_size: 16,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            image_size: 16,
            patch_size: 4,
            ..Self::default()
        }
    }

    /// Takes `embeddings.*`, `encoder.layer.*` and `layernorm.*`.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        self.validate()?;
        let block = |i| self.block(&weights.pp("encoder.layer").pp(i));
        Ok(VisionTransformer {
            embeddings: self.embeddings(&weights.pp("embeddings"))?,
            pre_norm: None,
            blocks: (0..self.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: Some(self.norm(&weights.pp("layernorm"))?),
            side: self.sizes().side(),
        })
    }

    /// The same with what Hugging Face takes where `json` lacks a key and the two models differ.
    pub(crate) fn with_defaults_of(mut self, json: &Value) -> Self {
        if self.has_registers() && json.get("num_register_tokens").is_none() {
            self.num_register_tokens = 4;
        }
        self
    }

    fn embeddings(&self, weights: &Weights) -> Result<Embeddings> {
        let (hidden, patch, registers) = (self.hidden_size, self.patch_size, self.num_register_tokens);
        if weights.contains("mask_token") {
            weights.ignore("mask_token"); // only DINOv2's own training masks patches
        }
        let side = self.sizes().side();
        let class = weights.get("cls_token", &[1, 1, hidden], Init::Required)?;
        let table = weights.get("position_embeddings", &[1, 1 + side * side, hidden], Init::Required)?;
        let get_registers = || weights.get("register_tokens", &[1, registers, hidden], Init::Required);
        let registers = (registers > 0).then(get_registers).transpose()?;
        let interpolation = if self.has_registers() { Interpolation::BicubicAntialias } else { Interpolation::Bicubic };
        let projection = weights.pp("patch_embeddings.projection");
        Ok(Embeddings::new(
            projection.get("weight", &[hidden, 3, patch, patch], Init::Required)?,
            Some(projection.get("bias", &[hidden], Init::Zeros)?),
            Positions::Learned { table, before: 1, interpolation },
            weights.kind(),
        )
        .with_class(class, registers))
    }

    fn norm(&self, weights: &Weights) -> Result<Norm> {
        Ok(Box::new(LayerNorm::load(weights, self.hidden_size, self.layer_norm_eps)?))
    }

    fn block(&self, weights: &Weights) -> Result<Block> {
        let hidden = self.hidden_size;
        let attention = weights.pp("attention");
        let part = |name| Linear::load(&attention.pp("attention").pp(name), hidden, hidden, self.qkv_bias);
        let scale = |name| weights.pp(name).get("lambda1", &[hidden], Init::Ones);
        Ok(Block {
            norm1: self.norm(&weights.pp("norm1"))?,
            attention: Attention {
                projections: Projections::Apart(Box::new([part("query")?, part("key")?, part("value")?])),
                output: Linear::load(&attention.pp("output.dense"), hidden, hidden, true)?,
                num_heads: self.num_attention_heads,
            },
            scale1: Some(scale("layer_scale1")?),
            norm2: self.norm(&weights.pp("norm2"))?,
            mlp: self.mlp(&weights.pp("mlp"))?,
            scale2: Some(scale("layer_scale2")?),
        })
    }

    fn mlp(&self, weights: &Weights) -> Result<Mlp> {
        let hidden = self.hidden_size;
        let inner = (hidden as f64 * self.mlp_ratio) as i64;
        if self.use_swiglu_ffn {
            let inner = (inner * 2 / 3 + 7) / 8 * 8;
            let gates = Gates::Together(Linear::load(&weights.pp("weights_in"), hidden, 2 * inner, true)?);
            let down = Linear::load(&weights.pp("weights_out"), inner, hidden, true)?;
            return Ok(Mlp::Gated { gates, activation: Activation::Silu, down });
        }
        Ok(Mlp::Plain {
            fc1: Linear::load(&weights.pp("fc1"), hidden, inner, true)?,
            activation: Activation::named(&self.hidden_act)?,
            fc2: Linear::load(&weights.pp("fc2"), inner, hidden, true)?,
        })
    }

    fn validate(&self) -> Result<()> {
        if !self.use_swiglu_ffn {
            Activation::named(&self.hidden_act)?;
        }
        self.sizes().validate()
    }

    fn has_registers(&self) -> bool {
        self.model_type == "dinov2_with_registers"
    }
}

impl Family for Dinov2Config {
    fn names(&self) -> FolderNames {
        FolderNames {
            prefix: "dinov2",
            alone: "",
            convolution: "embeddings.patch_embeddings.projection.weight",
            last_norm: &["layernorm."],
            modules: &[
                ("attention.attention.query", "attention.q_proj"),
                ("attention.attention.key", "attention.k_proj"),
                ("attention.attention.value", "attention.v_proj"),
                ("attention.output.dense", "attention.o_proj"),
                ("mlp.weights_out", "mlp.down_proj"),
            ],
            left_out: &["classifier."],
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
        1 + self.num_register_tokens
    }

    fn default_processor(&self) -> ImageProcessor {
        let (mean, std) = IMAGENET_DEFAULT;
        ImageProcessor::square(side(self.image_size), mean, std, Resample::Bicubic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::{matches_reference, rounds_as_the_reference};
    use tch::{Device, Kind, Tensor};

    #[test]
    fn dinov2_matches_reference() {
        matches_reference("dinov2", &["native", "wide", "small"]);
    }

    #[test]
    fn dinov2_with_registers_and_gated_layers_matches_reference() {
        matches_reference("dinov2_registers", &["native", "wide", "small"]);
    }

    #[test]
    fn bf16_is_as_the_reference_has_it() {
        rounds_as_the_reference("dinov2", &["native", "wide", "small"]);
        rounds_as_the_reference("dinov2_registers", &["native", "wide", "small"]);
    }

    #[test]
    fn patch_tokens_are_the_last_ones() {
        let config = Dinov2Config { num_register_tokens: 3, ..Dinov2Config::tiny() };
        let model = config.load(&Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        let states = model.hidden_states(&Tensor::zeros([2, 3, 8, 12], (Kind::Float, Device::Cpu)));
        assert_eq!(states[3].size(), [2, 1 + 3 + 6, 16]);
        let patches = model.patch_tokens(&states[3]);
        assert!(patches.equal(&states[3].narrow(1, 4, 6)));
        assert_eq!(model.first_hidden_states(&Tensor::zeros([1, 3, 8, 8], (Kind::Float, Device::Cpu)), 1).len(), 2);
    }

    #[test]
    fn what_is_missing_is_told() {
        let few = Weights::from_tensors([], Device::Cpu, Kind::Float);
        Dinov2Config::tiny().load(&few).unwrap();
        let missing = few.finish().unwrap_err().to_string();
        assert!(missing.contains("missing    encoder.layer.0.norm1.weight"), "{missing}");
        assert!(missing.contains(" in all"), "{missing}");
    }
}
