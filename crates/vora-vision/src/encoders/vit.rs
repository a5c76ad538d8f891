//! The plain vision transformer (arXiv 2010.11929), under both sets of names that Hugging Face reads.

use anyhow::Result;
use serde::Deserialize;
use vora_image::{IMAGENET_STANDARD, ImageProcessor, Resample};
use vora_torch::weights::{Init, Weights};

use crate::encoders::family::{Family, FolderNames, side};
use crate::encoders::sizes::{Sizes, square};
use crate::transformer::{
    Activation, Attention, Block, Embeddings, Interpolation, Linear, Mlp, Norm, Positions, Projections,
    VisionTransformer,
};
use vora_torch::nn::LayerNorm;

/// The keys of a `ViTConfig`; others pass.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VitConfig {
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
    /// `gelu`
    pub hidden_act: String,
    /// Added to the variance in each norm.
    pub layer_norm_eps: f64,
    /// Whether query, key and value have a bias.
    pub qkv_bias: bool,
}

impl Default for VitConfig {
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
            hidden_act: "gelu".to_owned(),
            layer_norm_eps: 1e-12,
            qkv_bias: true,
        }
    }
}

/// Where the layers of a block stand.
struct Names {
    blocks: &'static str,
    query: &'static str,
    key: &'static str,
    value: &'static str,
    output: &'static str,
    fc1: &'static str,
    fc2: &'static str,
}

/// In checkpoint files.
const ON_DISK: Names = Names {
    blocks: "encoder.layer",
    query: "attention.attention.query",
    key: "attention.attention.key",
    value: "attention.attention.value",
    output: "attention.output.dense",
    fc1: "intermediate.dense",
    fc2: "output.dense",
};

/// In the module itself since transformers 5, and in files written from its `state_dict`.
const IN_MEMORY: Names = Names {
    blocks: "layers",
    query: "attention.q_proj",
    key: "attention.k_proj",
    value: "attention.v_proj",
    output: "attention.o_proj",
    fc1: "mlp.fc1",
    fc2: "mlp.fc2",
};

impl VitConfig {
    /// Takes `embeddings.*`, `encoder.layer.*` (or `layers.*`) and `layernorm`. The `pooler` is left where it is.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        let sizes = self.sizes();
        sizes.validate()?;
        let (hidden, patch, side) = (self.hidden_size, self.patch_size, sizes.side());
        let embeddings = weights.pp("embeddings");
        let convolution = embeddings.pp("patch_embeddings.projection");
        let class = embeddings.get("cls_token", &[1, 1, hidden], Init::Required)?;
        let table = embeddings.get("position_embeddings", &[1, 1 + side * side, hidden], Init::Required)?;
        let positions = Positions::Learned { table, before: 1, interpolation: Interpolation::Bicubic };
        let first = weights.pp(ON_DISK.blocks).pp(0).pp(ON_DISK.query);
        let names = if first.contains("weight") { ON_DISK } else { IN_MEMORY };
        let block = |i| self.block(&names, &weights.pp(names.blocks).pp(i));
        Ok(VisionTransformer {
            embeddings: Embeddings::new(
                convolution.get("weight", &[hidden, 3, patch, patch], Init::Required)?,
                Some(convolution.get("bias", &[hidden], Init::Zeros)?),
                positions,
                weights.kind(),
            )
            .with_class(class, None),
            pre_norm: None,
            blocks: (0..self.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: Some(self.norm(&weights.pp("layernorm"))?),
            side,
        })
    }

    fn norm(&self, weights: &Weights) -> Result<Norm> {
        Ok(Box::new(LayerNorm::load(weights, self.hidden_size, self.layer_norm_eps)?))
    }

    fn block(&self, names: &Names, weights: &Weights) -> Result<Block> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let proj = |name, bias| Linear::load(&weights.pp(name), hidden, hidden, bias);
        Ok(Block {
            norm1: self.norm(&weights.pp("layernorm_before"))?,
            attention: Attention {
                projections: Projections::Apart(Box::new([
                    proj(names.query, self.qkv_bias)?,
                    proj(names.key, self.qkv_bias)?,
                    proj(names.value, self.qkv_bias)?,
                ])),
                output: proj(names.output, true)?,
                num_heads: self.num_attention_heads,
            },
            scale1: None,
            norm2: self.norm(&weights.pp("layernorm_after"))?,
            mlp: Mlp::Plain {
                fc1: Linear::load(&weights.pp(names.fc1), hidden, intermediate, true)?,
                activation: Activation::named(&self.hidden_act)?,
                fc2: Linear::load(&weights.pp(names.fc2), intermediate, hidden, true)?,
            },
            scale2: None,
        })
    }
}

impl Family for VitConfig {
    fn names(&self) -> FolderNames {
        FolderNames {
            prefix: "vit",
            alone: "",
            convolution: "embeddings.patch_embeddings.projection.weight",
            last_norm: &["layernorm."],
            modules: &[
                (ON_DISK.blocks, IN_MEMORY.blocks),
                (ON_DISK.query, IN_MEMORY.query),
                (ON_DISK.key, IN_MEMORY.key),
                (ON_DISK.value, IN_MEMORY.value),
                (ON_DISK.output, IN_MEMORY.output),
                (ON_DISK.fc1, IN_MEMORY.fc1),
                (ON_DISK.fc2, IN_MEMORY.fc2),
            ],
            left_out: &["pooler.", "embeddings.mask_token", "classifier.", "decoder."],
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
        let (mean, std) = IMAGENET_STANDARD;
        ImageProcessor::square(side(self.image_size), mean, std, Resample::Bilinear)
    }
}

#[cfg(test)]
mod tests {
    use crate::golden::{json, load, matches_reference, rounds_as_the_reference};
    use tch::Kind;

    #[test]
    fn matches_the_reference() {
        matches_reference("vit", &["native", "wide", "small"]);
    }

    #[test]
    fn bf16_is_as_the_reference_has_it() {
        rounds_as_the_reference("vit", &["native", "wide", "small"]);
    }

    #[test]
    fn the_modules_own_names_are_read_as_well() {
        let golden = fixtures::open("vit");
        let names = &json("vit")["names"];
        let tensors = golden.under("weights.").into_iter();
        let renamed: Vec<_> =
            tensors.map(|(name, tensor)| (names[&name].as_str().unwrap().to_owned(), tensor)).collect();
        assert!(renamed.iter().any(|(name, _)| name == "layers.2.attention.q_proj.weight"));
        let states = load("vit", renamed, Kind::Float).hidden_states(&golden["native.pixel_values"]);
        fixtures::assert_close_to(&states[3], &golden["native.hidden_states.3"], 2e-5);
    }
}
