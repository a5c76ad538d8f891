//! The vision tower of AIMv2 (arXiv 2411.14402), at a fixed and at native resolution, under Hugging Face's names and
//! under Apple's own.

use anyhow::{Result, ensure};
use serde::Deserialize;
use vora_image::{ImageProcessor, OPENAI_CLIP, Resample};
use vora_torch::nn::RmsNorm;
use vora_torch::weights::{Init, Weights};

use crate::encoders::family::{Family, FolderNames, side};
use crate::encoders::sizes::{Sizes, square};
use crate::transformer::{
    Activation, Attention, Block, Embeddings, Gates, Interpolation, Linear, Mlp, Norm, Positions, Projections,
    VisionTransformer,
};

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
    /// Whether those of the feed-forward layer have one; in Apple's files `use_bias`, of attention's output too.
    #[serde(alias = "use_bias")]
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

/// Where the layers stand.
struct Names {
    convolution: &'static str,
    patch_norm: &'static str,
    positions: &'static str,
    blocks: &'static str,
    norm1: &'static str,
    query_key_value: QueryKeyValue,
    output: &'static str,
    norm2: &'static str,
    gate: &'static str,
    up: &'static str,
    down: &'static str,
    norm: &'static str,
}

/// Query, key and value in three layers or in one.
enum QueryKeyValue {
    Apart([&'static str; 3]),
    Together(&'static str),
}

const HUGGING_FACE: Names = Names {
    convolution: "embeddings.patch_embed",
    patch_norm: "embeddings.rms_norm",
    positions: "embeddings.position_embedding.weight",
    blocks: "encoder.layers",
    norm1: "rms_norm1",
    query_key_value: QueryKeyValue::Apart(["attention.q_proj", "attention.k_proj", "attention.v_proj"]),
    output: "attention.out_proj",
    norm2: "rms_norm2",
    gate: "ffn.gate_proj",
    up: "ffn.up_proj",
    down: "ffn.down_proj",
    norm: "rms_norm",
};

/// As Apple published the models, before transformers had them; VoRA's teacher is one of these.
const APPLE: Names = Names {
    convolution: "preprocessor.patchifier.proj",
    patch_norm: "preprocessor.patchifier.norm",
    positions: "preprocessor.pos_embed",
    blocks: "trunk.blocks",
    norm1: "norm_1",
    query_key_value: QueryKeyValue::Together("attn.qkv"),
    output: "attn.proj",
    norm2: "norm_2",
    gate: "mlp.fc1",
    up: "mlp.fc3",
    down: "mlp.fc2",
    norm: "trunk.post_trunk_norm",
};

impl Aimv2VisionConfig {
    /// Takes `embeddings.*`, `encoder.layers.*` and `rms_norm`, or Apple's `preprocessor.*` and `trunk.*`. The pooling
    /// `head` is left where it is. Hugging Face refuses pictures of other sizes than `image_size` for a learned table of
    /// positions; here it is resampled as those of other encoders are.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(&self, weights: &Weights) -> Result<VisionTransformer> {
        let sizes = self.sizes();
        sizes.validate()?;
        let (hidden, patch, side) = (self.hidden_size, self.patch_size, sizes.side());
        let has = |names: &Names| weights.pp(names.convolution).contains("weight");
        let apples = !has(&HUGGING_FACE) && has(&APPLE);
        let names = if apples { APPLE } else { HUGGING_FACE };
        // Apple's configs do not tell, their files do.
        let is_native = self.is_native || apples && !weights.contains(names.positions);
        ensure!(
            !is_native || hidden % 4 == 0,
            "hidden_size {hidden} is not a multiple of 4, which positions of sines and cosines take (is_native)"
        );
        let positions = if is_native {
            Positions::SinCos { dim: hidden, kind: weights.kind(), device: weights.device() }
        } else {
            let shape = [1, side * side, hidden];
            let table = weights.get(names.positions, &shape[usize::from(!apples)..], Init::Required)?;
            Positions::Learned { table, before: 0, interpolation: Interpolation::Bicubic }
        };
        let convolution = weights.pp(names.convolution);
        let block = |i| self.block(&names, &weights.pp(names.blocks).pp(i));
        Ok(VisionTransformer {
            embeddings: Embeddings::new(
                convolution.get("weight", &[hidden, 3, patch, patch], Init::Required)?,
                Some(convolution.get("bias", &[hidden], Init::Zeros)?),
                positions,
                weights.kind(),
            )
            .with_norm(self.norm(&weights.pp(names.patch_norm))?),
            pre_norm: None,
            blocks: (0..self.num_hidden_layers).map(block).collect::<Result<_>>()?,
            norm: Some(self.norm(&weights.pp(names.norm))?),
            side,
        })
    }

    fn norm(&self, weights: &Weights) -> Result<Norm> {
        Ok(Box::new(RmsNorm::load(weights, self.hidden_size, self.rms_norm_eps)?))
    }

    fn block(&self, names: &Names, weights: &Weights) -> Result<Block> {
        let (hidden, intermediate) = (self.hidden_size, self.intermediate_size);
        let linear = |name, inputs, outputs, bias| Linear::load(&weights.pp(name), inputs, outputs, bias);
        let (projections, output_bias) = match names.query_key_value {
            QueryKeyValue::Apart(names) => {
                let [query, key, value] = names.map(|name| linear(name, hidden, hidden, self.qkv_bias));
                (Projections::Apart(Box::new([query?, key?, value?])), self.qkv_bias)
            }
            QueryKeyValue::Together(name) => {
                (Projections::Together(linear(name, hidden, 3 * hidden, self.qkv_bias)?), self.mlp_bias)
            }
        };
        Ok(Block {
            norm1: self.norm(&weights.pp(names.norm1))?,
            attention: Attention {
                projections,
                output: linear(names.output, hidden, hidden, output_bias)?,
                num_heads: self.num_attention_heads,
            },
            scale1: None,
            norm2: self.norm(&weights.pp(names.norm2))?,
            mlp: Mlp::Gated {
                gates: Gates::Apart([
                    linear(names.gate, hidden, intermediate, self.mlp_bias)?,
                    linear(names.up, hidden, intermediate, self.mlp_bias)?,
                ]),
                activation: Activation::named(&self.hidden_act)?,
                down: linear(names.down, intermediate, hidden, self.mlp_bias)?,
            },
            scale2: None,
        })
    }
}

impl Family for Aimv2VisionConfig {
    fn names(&self) -> FolderNames {
        FolderNames {
            prefix: "vision_model",
            alone: "",
            convolution: "embeddings.patch_embed.weight",
            last_norm: &["rms_norm.", "trunk.post_trunk_norm."],
            modules: &[],
            left_out: &[
                "head.",
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
        0
    }

    fn default_processor(&self) -> ImageProcessor {
        let (mean, std) = OPENAI_CLIP;
        ImageProcessor::square(side(self.image_size), mean, std, Resample::Bicubic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoder::Encoder;
    use crate::encoder::EncoderConfig;
    use crate::golden::{json, load, matches_reference, rounds_as_the_reference};
    use crate::patch_embed::{PatchEmbed, PatchEmbedConfig};
    use serde_json::Value;
    use std::collections::BTreeMap;
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
    /// The vision half of a golden file as Apple would have written it: the names of Hugging Face's conversion, undone.
    fn as_apple_has_it(golden: &fixtures::Golden, prefix: &str) -> Vec<(String, Tensor)> {
        let renames = [
            ("embeddings.patch_embed", "preprocessor.patchifier.proj"),
            ("embeddings.rms_norm", "preprocessor.patchifier.norm"),
            ("embeddings.position_embedding.weight", "preprocessor.pos_embed"),
            ("encoder.layers", "trunk.blocks"),
            ("rms_norm1", "norm_1"),
            ("rms_norm2", "norm_2"),
            ("attention.out_proj", "attn.proj"),
            ("ffn.gate_proj", "mlp.fc1"),
            ("ffn.down_proj", "mlp.fc2"),
            ("ffn.up_proj", "mlp.fc3"),
        ];
        let mut tensors = BTreeMap::new();
        for (name, tensor) in golden.under(prefix).into_iter().filter(|(name, _)| !name.starts_with("head.")) {
            let name = if name == "rms_norm.weight" { "trunk.post_trunk_norm.weight".to_owned() } else { name };
            let name = renames.iter().fold(name, |name, (theirs, apples)| name.replace(theirs, apples));
            let tensor = if name.ends_with("pos_embed") { tensor.unsqueeze(0) } else { tensor };
            tensors.insert(name, tensor);
        }
        for name in tensors.keys().filter(|name| name.contains("q_proj")).cloned().collect::<Vec<_>>() {
            let parts =
                ["q_proj", "k_proj", "v_proj"].map(|part| tensors.remove(&name.replace("q_proj", part)).unwrap());
            tensors.insert(name.replace("attention.q_proj", "attn.qkv"), Tensor::cat(&parts, 0));
        }
        tensors.into_iter().collect()
    }

    #[test]
    fn apples_own_files_are_read_as_well() {
        for (name, prefix, biased) in [("aimv2", "weights.vision_model.", true), ("aimv2_native", "weights.", false)] {
            let whole = json(name);
            let mut config = if biased { whole["vision_config"].clone() } else { whole };
            let keys = config.as_object_mut().unwrap();
            for key in ["mlp_bias", "is_native", "hidden_act"] {
                keys.remove(key);
            }
            keys.insert("model_type".to_owned(), Value::from("aimv2"));
            keys.insert("use_bias".to_owned(), Value::from(biased));

            let golden = fixtures::open(name);
            let config = EncoderConfig::from_json(&config).unwrap();
            let weights = Weights::from_tensors(as_apple_has_it(&golden, prefix), Device::Cpu, Kind::Float);
            let model = config.load(&weights).unwrap();
            weights.finish().unwrap();
            let states = model.hidden_states(&golden["native.pixel_values"]);
            for (i, state) in states.iter().enumerate() {
                fixtures::assert_close_to(state, &golden[&format!("native.hidden_states.{i}")], 2e-5);
            }
            fixtures::assert_close_to(&model.last_hidden_state(&states[3]), &golden["native.last_hidden_state"], 2e-5);
        }
    }

    #[test]
    fn a_students_patch_embedding_is_a_copy_of_apples() {
        let golden = fixtures::open("aimv2");
        let mut config = json("aimv2")["vision_config"].clone();
        let keys = config.as_object_mut().unwrap();
        for key in ["mlp_bias", "is_native", "hidden_act"] {
            keys.remove(key);
        }
        keys.insert("model_type".to_owned(), Value::from("aimv2"));
        keys.insert("use_bias".to_owned(), true.into());
        let config = EncoderConfig::from_json(&config).unwrap();
        let stored = as_apple_has_it(&golden, "weights.vision_model.");
        let tensors = stored.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        let teacher = Encoder::load(&config, &Weights::from_tensors(tensors, Device::Cpu, Kind::Float)).unwrap();
        assert_eq!(teacher.first_hidden_state(), 1); // Apple's hidden states begin after the first block
        let (patch_size, embed_dim) = (teacher.patch_size(), teacher.hidden_size());
        let side = (config.num_patches() as f64).sqrt() as i64;
        let sizes = PatchEmbedConfig { patch_size, image_size: side * patch_size, embed_dim, hidden_size: 10 };
        let new = Weights::random(3, Device::Cpu, Kind::Float);
        let embed = PatchEmbed::load(&sizes, &new).unwrap();
        let before = embed.tensors().into_iter().find(|(name, _)| name == "out_proj.weight").unwrap().1.copy();
        embed.copy_from_teacher(&teacher).unwrap();
        for (name, tensor) in embed.tensors() {
            match stored.iter().find(|(other, _)| *other == format!("preprocessor.{name}")) {
                Some((_, expected)) => assert!(tensor.equal(expected), "{name}"),
                None => assert!(name == "out_proj.weight" && tensor.equal(&before), "{name}"),
            }
        }
        let small = PatchEmbed::load(&PatchEmbedConfig { embed_dim: 12, ..sizes }, &new.pp("small")).unwrap();
        let error = small.copy_from_teacher(&teacher).unwrap_err().to_string();
        assert!(error.contains("it cannot be copied"), "{error}");
    }
}
