//! DINOv2 (arXiv 2304.07193), with or without registers: a frozen vision transformer under Hugging Face's names.

use std::cell::RefCell;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer};
use tch::{Tensor, nn::Module};
use vora_torch::weights::{Init, Weights};

use crate::layers::{LayerNorm, Linear};
use crate::patchify::patchify;
use crate::positions::{Interpolation, interpolate};
use crate::teacher::Patchifier;

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

/// Both sides of a square: `14` or `[14, 14]`.
fn square<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Side {
        One(i64),
        Two([i64; 2]),
    }
    match Side::deserialize(deserializer)? {
        Side::One(side) => Ok(side),
        Side::Two([height, width]) if height == width => Ok(height),
        Side::Two(sides) => Err(serde::de::Error::custom(format!("{sides:?} is not a square"))),
    }
}

impl Dinov2Config {
    /// Reads `config.json` of a model folder.
    ///
    /// # Errors
    /// Names the file and the key.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut config: Self = serde_json::from_slice(&bytes).with_context(|| format!("in {}", path.display()))?;
        if config.model_type == "dinov2_with_registers" && !contains_key(&bytes, "num_register_tokens") {
            config.num_register_tokens = 4;
        }
        config.validate().with_context(|| format!("in {}", path.display()))?;
        Ok(config)
    }

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

    fn validate(&self) -> Result<()> {
        ensure!(
            self.num_attention_heads > 0 && self.hidden_size % self.num_attention_heads == 0,
            "hidden_size {} does not divide among num_attention_heads {}",
            self.hidden_size,
            self.num_attention_heads
        );
        ensure!(
            self.patch_size > 0 && self.image_size >= self.patch_size,
            "image_size {} holds no patch of patch_size {}",
            self.image_size,
            self.patch_size
        );
        ensure!(
            self.use_swiglu_ffn || self.hidden_act == "gelu",
            "hidden_act is `{}`, only `gelu` is known here",
            self.hidden_act
        );
        Ok(())
    }

    /// Patches along a side of `image_size`.
    fn side(&self) -> i64 {
        self.image_size / self.patch_size
    }

    fn has_registers(&self) -> bool {
        self.model_type == "dinov2_with_registers"
    }
}

fn contains_key(json: &[u8], key: &str) -> bool {
    serde_json::from_slice::<serde_json::Value>(json).is_ok_and(|json| json.get(key).is_some())
}

/// The transformer, frozen. Run it under `tch::no_grad`, or with pixels that need no gradient.
#[derive(Debug)]
pub struct Dinov2 {
    config: Dinov2Config,
    embeddings: Embeddings,
    layers: Vec<Layer>,
    layernorm: LayerNorm,
}

impl Dinov2 {
    /// Takes `embeddings.*`, `encoder.layer.*` and `layernorm.*`.
    ///
    /// # Errors
    /// Where the config contradicts itself; tensors that do not fit are told by `weights.finish()`.
    pub fn load(config: &Dinov2Config, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let layer = |i| Layer::load(config, &weights.pp("encoder.layer").pp(i));
        Ok(Self {
            config: config.clone(),
            embeddings: Embeddings::load(config, &weights.pp("embeddings"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            layernorm: LayerNorm::load(&weights.pp("layernorm"), config.hidden_size, config.layer_norm_eps)?,
        })
    }

    /// Its sizes.
    pub fn config(&self) -> &Dinov2Config {
        &self.config
    }

    /// `[batch, 3, height, width]` -> the embeddings (index 0), then the output of every block, each
    /// `[batch, 1 + registers + patches, hidden]`, before the last norm. Any sides that are multiples of `patch_size`.
    pub fn hidden_states(&self, pixel_values: &Tensor) -> Vec<Tensor> {
        self.first_hidden_states(pixel_values, self.layers.len())
    }

    /// As [`Dinov2::hidden_states`], of the first `num_layers` blocks only: `num_layers + 1` tensors.
    ///
    /// # Panics
    /// Where the model has fewer blocks.
    pub fn first_hidden_states(&self, pixel_values: &Tensor, num_layers: usize) -> Vec<Tensor> {
        let mut states = Vec::with_capacity(num_layers + 1);
        states.push(self.embeddings.forward(pixel_values));
        for layer in &self.layers[..num_layers] {
            states.push(layer.forward(&states[states.len() - 1]));
        }
        states
    }

    /// The norm behind the last block: `last_hidden_state` of Hugging Face.
    pub fn last_hidden_state(&self, hidden: &Tensor) -> Tensor {
        self.layernorm.forward(hidden)
    }

    /// `[batch, 1 + registers + patches, hidden]` -> `[batch, patches, hidden]`, row by row
    pub fn patch_tokens(&self, hidden: &Tensor) -> Tensor {
        let others = 1 + self.config.num_register_tokens;
        hidden.narrow(1, others, hidden.size()[1] - others)
    }

    /// The start for a student's own patch embedding.
    pub fn patchifier(&self) -> Patchifier<'_> {
        let table = self.embeddings.position_embeddings.squeeze_dim(0); // [1 + positions, hidden]
        Patchifier {
            weight: &self.embeddings.weight,
            bias: &self.embeddings.bias,
            positions: table.narrow(0, 1, table.size()[0] - 1),
        }
    }
}

/// Class token, registers, patches and their positions.
#[derive(Debug)]
struct Embeddings {
    cls_token: Tensor,           // [1, 1, hidden]
    register_tokens: Tensor,     // [1, registers, hidden]
    weight: Tensor,              // [hidden, 3, patch, patch]
    bias: Tensor,                // [hidden]
    position_embeddings: Tensor, // [1, 1 + positions, hidden]
    interpolation: Interpolation,
    last: RefCell<Option<(i64, i64, Tensor)>>, // the positions of the last grid
}

impl Embeddings {
    fn load(config: &Dinov2Config, weights: &Weights) -> Result<Self> {
        let (hidden, patch, registers) = (config.hidden_size, config.patch_size, config.num_register_tokens);
        if weights.contains("mask_token") {
            let _ = weights.get("mask_token", &[1, hidden], Init::Zeros)?; // only DINOv2's own training masks patches
        }
        let cls_token = weights.get("cls_token", &[1, 1, hidden], Init::Required)?;
        let projection = weights.pp("patch_embeddings.projection");
        Ok(Self {
            register_tokens: if registers > 0 {
                weights.get("register_tokens", &[1, registers, hidden], Init::Required)?
            } else {
                cls_token.narrow(1, 0, 0)
            },
            cls_token,
            weight: projection.get("weight", &[hidden, 3, patch, patch], Init::Required)?,
            bias: projection.get("bias", &[hidden], Init::Zeros)?,
            position_embeddings: weights.get(
                "position_embeddings",
                &[1, 1 + config.side().pow(2), hidden],
                Init::Required,
            )?,
            interpolation: if config.has_registers() {
                Interpolation::BicubicAntialias
            } else {
                Interpolation::Bicubic
            },
            last: RefCell::new(None),
        })
    }

    /// `[batch, 3, height, width]` -> `[batch, 1 + registers + patches, hidden]`
    fn forward(&self, pixel_values: &Tensor) -> Tensor {
        let (batch, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let patch = self.weight.size()[3];
        let patches = patchify(&pixel_values.to_kind(self.weight.kind()), &self.weight, &self.bias);
        let patches = patches + self.positions(height / patch, width / patch); // [batch, patches, hidden]
        let cls = &self.cls_token + self.position_embeddings.narrow(1, 0, 1);
        let first = |tokens: &Tensor| tokens.expand([batch, -1, -1], false);
        Tensor::cat(&[first(&cls), first(&self.register_tokens), patches], 1)
    }

    /// `[1, rows * columns, hidden]`, kept until another grid is asked for
    fn positions(&self, rows: i64, columns: i64) -> Tensor {
        if let Some((r, c, positions)) = &*self.last.borrow()
            && (*r, *c) == (rows, columns)
        {
            return positions.shallow_clone();
        }
        let table = self.position_embeddings.squeeze_dim(0);
        let table = table.narrow(0, 1, table.size()[0] - 1);
        let positions = interpolate(&table, rows, columns, self.interpolation).unsqueeze(0);
        *self.last.borrow_mut() = Some((rows, columns, positions.shallow_clone()));
        positions
    }
}

/// `h = x + scale1 * attention(norm1(x))`, `y = h + scale2 * mlp(norm2(h))`
#[derive(Debug)]
struct Layer {
    norm1: LayerNorm,
    attention: Attention,
    layer_scale1: Tensor, // [hidden]
    norm2: LayerNorm,
    mlp: Mlp,
    layer_scale2: Tensor, // [hidden]
}

impl Layer {
    fn load(config: &Dinov2Config, weights: &Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.layer_norm_eps);
        let scale = |name| weights.pp(name).get("lambda1", &[hidden], Init::Ones);
        Ok(Self {
            norm1: LayerNorm::load(&weights.pp("norm1"), hidden, eps)?,
            attention: Attention::load(config, &weights.pp("attention"))?,
            layer_scale1: scale("layer_scale1")?,
            norm2: LayerNorm::load(&weights.pp("norm2"), hidden, eps)?,
            mlp: Mlp::load(config, &weights.pp("mlp"))?,
            layer_scale2: scale("layer_scale2")?,
        })
    }
}

impl Module for Layer {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let h = x.addcmul(&self.attention.forward(&self.norm1.forward(x)), &self.layer_scale1);
        h.addcmul(&self.mlp.forward(&self.norm2.forward(&h)), &self.layer_scale2)
    }
}

/// Every token sees every token.
#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    dense: Linear,
    num_heads: i64,
}

impl Attention {
    fn load(config: &Dinov2Config, weights: &Weights) -> Result<Self> {
        let hidden = config.hidden_size;
        let part = |name| Linear::load(&weights.pp("attention").pp(name), hidden, hidden, config.qkv_bias);
        Ok(Self {
            query: part("query")?,
            key: part("key")?,
            value: part("value")?,
            dense: Linear::load(&weights.pp("output.dense"), hidden, hidden, true)?,
            num_heads: config.num_attention_heads,
        })
    }
}

impl Module for Attention {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, tokens, hidden) = x.size3().expect("x is [batch, tokens, hidden]");
        let heads = |linear: &Linear| linear.forward(x).view([batch, tokens, self.num_heads, -1]).transpose(1, 2);
        let mixed = Tensor::scaled_dot_product_attention(
            &heads(&self.query), // [batch, heads, tokens, head_dim]
            &heads(&self.key),
            &heads(&self.value),
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        );
        self.dense.forward(&mixed.transpose(1, 2).reshape([batch, tokens, hidden]))
    }
}

/// The feed-forward layer.
#[derive(Debug)]
enum Mlp {
    /// `fc2(gelu(fc1(x)))`
    Gelu { fc1: Linear, fc2: Linear },
    /// `weights_out(silu(a) * b)`, a and b the halves of `weights_in(x)`
    SwiGlu { weights_in: Linear, weights_out: Linear },
}

impl Mlp {
    fn load(config: &Dinov2Config, weights: &Weights) -> Result<Self> {
        let hidden = config.hidden_size;
        let inner = (hidden as f64 * config.mlp_ratio) as i64;
        if config.use_swiglu_ffn {
            let inner = (inner * 2 / 3 + 7) / 8 * 8;
            return Ok(Self::SwiGlu {
                weights_in: Linear::load(&weights.pp("weights_in"), hidden, 2 * inner, true)?,
                weights_out: Linear::load(&weights.pp("weights_out"), inner, hidden, true)?,
            });
        }
        Ok(Self::Gelu {
            fc1: Linear::load(&weights.pp("fc1"), hidden, inner, true)?,
            fc2: Linear::load(&weights.pp("fc2"), inner, hidden, true)?,
        })
    }
}

impl Module for Mlp {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Gelu { fc1, fc2 } => fc2.forward(&fc1.forward(x).gelu("none")),
            Self::SwiGlu { weights_in, weights_out } => {
                let halves = weights_in.forward(x).chunk(2, -1);
                weights_out.forward(&(halves[0].silu() * &halves[1]))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// Every hidden state and the last norm, at the size the positions were learned for and at others.
    fn matches_reference(name: &str) {
        let golden = fixtures::open(name);
        let config = fixtures::root().join("golden").join(format!("{name}.json"));
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(config, folder.path().join("config.json")).unwrap();
        let config = Dinov2Config::open(folder.path()).unwrap();
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        let model = Dinov2::load(&config, &weights).unwrap();
        weights.finish().unwrap();
        for size in ["native", "wide", "small", "native"] {
            let states = model.hidden_states(&golden[&format!("{size}.pixel_values")]);
            assert_eq!(states.len(), config.num_hidden_layers + 1);
            for (i, state) in states.iter().enumerate() {
                fixtures::assert_close_to(state, &golden[&format!("{size}.hidden_states.{i}")], 2e-5);
            }
            let last = model.last_hidden_state(&states[states.len() - 1]);
            fixtures::assert_close_to(&last, &golden[&format!("{size}.last_hidden_state")], 2e-5);
        }
    }

    #[test]
    fn dinov2_matches_reference() {
        matches_reference("dinov2");
    }

    #[test]
    fn dinov2_with_registers_and_gated_layers_matches_reference() {
        matches_reference("dinov2_registers");
    }

    #[test]
    fn patch_tokens_are_the_last_ones() {
        let config = Dinov2Config { num_register_tokens: 3, ..Dinov2Config::tiny() };
        let model = Dinov2::load(&config, &Weights::random(0, Device::Cpu, Kind::Float)).unwrap();
        let states = model.hidden_states(&Tensor::zeros([2, 3, 8, 12], (Kind::Float, Device::Cpu)));
        assert_eq!(states[3].size(), [2, 1 + 3 + 6, 16]);
        let patches = model.patch_tokens(&states[3]);
        assert!(patches.equal(&states[3].narrow(1, 4, 6)));
        assert_eq!(model.first_hidden_states(&Tensor::zeros([1, 3, 8, 8], (Kind::Float, Device::Cpu)), 1).len(), 2);
    }

    #[test]
    fn configs_that_contradict_themselves_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |json: &str| {
            std::fs::write(folder.path().join("config.json"), json).unwrap();
            format!("{:#}", Dinov2Config::open(folder.path()).unwrap_err())
        };
        let error = refuse(r#"{"hidden_size": 10, "num_attention_heads": 3}"#);
        assert!(error.contains("hidden_size 10 does not divide among num_attention_heads 3"), "{error}");
        assert!(refuse(r#"{"image_size": [14, 28]}"#).contains("[14, 28] is not a square"));
        assert!(refuse(r#"{"hidden_act": "relu"}"#).contains("hidden_act is `relu`"));
        let few = Weights::from_tensors([], Device::Cpu, Kind::Float);
        Dinov2::load(&Dinov2Config::tiny(), &few).unwrap();
        let missing = few.finish().unwrap_err().to_string();
        assert!(missing.contains("missing    encoder.layer.2.attention.attention.query.weight"), "{missing}");
    }
}
