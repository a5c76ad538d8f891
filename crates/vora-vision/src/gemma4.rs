//! Gemma 4 Unified's way from pixels to the language model: one matrix between norms, no encoder.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tch::{Kind, Tensor, nn::Module};
use vora_torch::nn::{LayerNorm, RmsNorm};
use vora_torch::weights::{Init, Weights};

use crate::transformer::grid;

/// Added to the variance by the layer norms, whatever the config says.
const LAYER_NORM_EPS: f64 = 1e-5;

/// `vision_config`, as HF's `Gemma4UnifiedVisionConfig` has it; what is absent is as there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Gemma4VisionConfig {
    /// Side of a patch, in pixels.
    pub patch_size: i64,
    /// Patches along the side of a token.
    pub pooling_kernel_size: i64,
    /// Width between the matrix and the projection.
    pub mm_embed_dim: i64,
    /// Rows and columns that have a position, at most.
    pub mm_posemb_size: i64,
    /// What goes into the projection; as wide as `mm_embed_dim`.
    pub output_proj_dims: i64,
    /// Added to the mean square in the norm before the projection.
    pub rms_norm_eps: f64,
    /// Standard deviation of a new one's matrices and positions.
    pub initializer_range: f64,
    /// Every other key, as it was.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl Default for Gemma4VisionConfig {
    fn default() -> Self {
        Self {
            patch_size: 16,
            pooling_kernel_size: 3,
            mm_embed_dim: 3840,
            mm_posemb_size: 1120,
            output_proj_dims: 3840,
            rms_norm_eps: 1e-6,
            initializer_range: 0.02,
            extra: Map::new(),
        }
    }
}

impl Gemma4VisionConfig {
    /// Side of what becomes one token, in pixels.
    pub fn token_size(&self) -> i64 {
        self.patch_size * self.pooling_kernel_size
    }

    /// Checks what the types cannot.
    ///
    /// # Errors
    /// Names the key, what it says, and what it may say.
    pub fn validate(&self) -> Result<()> {
        for (key, size) in [
            ("patch_size", self.patch_size),
            ("pooling_kernel_size", self.pooling_kernel_size),
            ("mm_embed_dim", self.mm_embed_dim),
            ("mm_posemb_size", self.mm_posemb_size),
        ] {
            ensure!((1..1 << 20).contains(&size), "{key} is {size}, it must be at least 1");
        }
        ensure!(
            self.output_proj_dims == self.mm_embed_dim,
            "output_proj_dims is {}, mm_embed_dim {}: the projection takes what the norm before it gives",
            self.output_proj_dims,
            self.mm_embed_dim
        );
        for (key, number) in [("rms_norm_eps", self.rms_norm_eps), ("initializer_range", self.initializer_range)] {
            ensure!(number > 0.0 && number.is_finite(), "{key} is {number}, it must be positive");
        }
        Ok(())
    }
}

/// `projection(rms_norm(pos_norm(patch_ln2(patch_dense(patch_ln1(patches))) + positions)))`, where a position is the sum
/// of its column's and its row's.
///
/// It is frozen, unless its source is [`Weights::trained`]; then its masters are f32.
#[derive(Debug)]
pub struct Gemma4VisionEmbedder {
    config: Gemma4VisionConfig,
    patch_ln1: LayerNorm,
    weight: Tensor, // patch_dense [embed, 3 * token * token]
    bias: Tensor,   // [embed]
    patch_ln2: LayerNorm,
    pos_embedding: Tensor, // [positions, 2, embed]: columns, then rows
    pos_norm: LayerNorm,
    pre_projection_norm: RmsNorm, // without a weight
    projection: Tensor,           // [hidden, embed]
    kind: Kind,
}

impl Gemma4VisionEmbedder {
    /// Takes what checkpoints have under `model`: `vision_embedder` with norms, matrix and positions, and
    /// `embed_vision.embedding_projection`, into a language model of width `hidden_size`.
    ///
    /// # Errors
    /// What [`Gemma4VisionConfig::validate`] refuses; tensors that do not fit are told by [`Weights::finish`].
    pub fn load(config: &Gemma4VisionConfig, hidden_size: i64, weights: &Weights) -> Result<Self> {
        config.validate()?;
        let weights = weights.with_initializer_range(config.initializer_range);
        let (embedder, projection) = (weights.pp("vision_embedder"), weights.pp("embed_vision.embedding_projection"));
        let (embed, pixels) = (config.mm_embed_dim, 3 * config.token_size().pow(2));
        let norm = |name: &str, size: i64| LayerNorm::load(&embedder.pp(name), size, LAYER_NORM_EPS);
        let dense = embedder.pp("patch_dense");
        Ok(Self {
            patch_ln1: norm("patch_ln1", pixels)?,
            weight: dense.get("weight", &[embed, pixels], Init::Required)?,
            bias: dense.get("bias", &[embed], Init::Zeros)?,
            patch_ln2: norm("patch_ln2", embed)?,
            pos_embedding: embedder.get("pos_embedding", &[config.mm_posemb_size, 2, embed], Init::Required)?,
            pos_norm: norm("pos_norm", embed)?,
            pre_projection_norm: RmsNorm::unscaled(&weights, embed, config.rms_norm_eps),
            projection: projection.get("weight", &[hidden_size, embed], Init::Required)?,
            kind: weights.kind(),
            config: config.clone(),
        })
    }

    /// The sizes it was made with.
    pub fn config(&self) -> &Gemma4VisionConfig {
        &self.config
    }

    /// Its tensors by their names on disk.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let norms = [("patch_ln1", &self.patch_ln1), ("patch_ln2", &self.patch_ln2), ("pos_norm", &self.pos_norm)];
        let norms = norms.into_iter().flat_map(|(name, norm)| {
            norm.tensors().map(|(part, tensor)| (format!("vision_embedder.{name}.{part}"), tensor.shallow_clone()))
        });
        let others = [
            ("vision_embedder.patch_dense.weight", &self.weight),
            ("vision_embedder.patch_dense.bias", &self.bias),
            ("vision_embedder.pos_embedding", &self.pos_embedding),
            ("embed_vision.embedding_projection.weight", &self.projection),
        ];
        norms.chain(others.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))).collect()
    }

    /// Rows and columns of tokens in a picture.
    ///
    /// # Errors
    /// Where a side is not a positive multiple of a token's, or has more tokens than there are positions.
    pub fn grid(&self, height: i64, width: i64) -> Result<(i64, i64)> {
        let (rows, columns) = grid(height, width, self.config.token_size())?;
        let most = self.config.mm_posemb_size;
        ensure!(
            rows.max(columns) <= most,
            "a picture of {rows} x {columns} tokens, but there are positions for {most} along a side (mm_posemb_size)"
        );
        Ok((rows, columns))
    }

    /// Gives a new projection the size that brings tokens to this root mean square, that of the word embeddings of a language
    /// model that was not trained with it; the direction stays.
    pub fn scale_to(&self, rms: f64) {
        // What goes into it has a mean square of 1.
        let size = (self.projection.square().mean(Kind::Float) * self.config.mm_embed_dim).sqrt();
        tch::no_grad(|| self.projection.shallow_clone().copy_(&(&self.projection * (rms / size))));
    }

    /// The sum of each token's column's and row's position, `[rows * columns, embed]`.
    fn positions(&self, rows: i64, columns: i64) -> Tensor {
        let along = |axis: i64, count: i64| self.pos_embedding.select(1, axis).narrow(0, 0, count).to_kind(self.kind);
        (along(0, columns).unsqueeze(0) + along(1, rows).unsqueeze(1)).flatten(0, 1)
    }
}

impl Module for Gemma4VisionEmbedder {
    /// Pictures in [0, 1], `[n, 3, height, width]` -> `[n, tokens, hidden]`
    ///
    /// # Panics
    /// Where [`Gemma4VisionEmbedder::grid`] refuses their size.
    fn forward(&self, pixel_values: &Tensor) -> Tensor {
        let (_, _, height, width) = pixel_values.size4().expect("pictures are [n, 3, height, width]");
        let (rows, columns) = self.grid(height, width).expect("callers ask for the grid first");
        let [weight, bias, projection] = [&self.weight, &self.bias, &self.projection].map(|t| t.to_kind(self.kind));
        let patches = patches(&pixel_values.to_kind(self.kind), self.config.token_size()); // [n, tokens, pixels]
        let x = self.patch_ln2.forward(&self.patch_ln1.forward(&patches).linear(&weight, Some(&bias))); // [n, tokens, embed]
        let x = self.pos_norm.forward(&(x + self.positions(rows, columns)));
        self.pre_projection_norm.forward(&x).linear::<&Tensor>(&projection, None)
    }
}

/// The pixels of each token, row by row and the channels of a pixel together: `[n, 3, height, width]` -> `[n, tokens, size *
/// size * 3]`
fn patches(pixel_values: &Tensor, size: i64) -> Tensor {
    let (n, channels, height, width) = pixel_values.size4().expect("pictures are [n, 3, height, width]");
    let (rows, columns) = (height / size, width / size);
    pixel_values.view([n, channels, rows, size, columns, size]).permute([0, 2, 4, 3, 5, 1]).reshape([
        n,
        rows * columns,
        size * size * channels,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn config() -> Gemma4VisionConfig {
        let path = fixtures::root().join("tiny/gemma4/config.json");
        let json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        serde_json::from_value(json["vision_config"].clone()).unwrap()
    }

    #[test]
    fn matches_reference() {
        let golden = fixtures::open("gemma4_unified");
        let folder = fixtures::root().join("tiny/gemma4");
        for trained in [false, true] {
            let weights = Weights::open(&folder, Device::Cpu, Kind::Float).unwrap();
            let source = if trained { weights.trained() } else { weights.clone() };
            let embedder = Gemma4VisionEmbedder::load(&config(), 32, &source.pp("model")).unwrap();
            let left = |name: &str| !name.contains("vision");
            weights.finish_allowing(left).unwrap();
            let names = weights.names();
            for (name, tensor) in embedder.tensors() {
                assert!(names.contains(&format!("model.{name}")) && tensor.requires_grad() == trained, "{name}");
            }
            assert_eq!(embedder.tensors().len(), names.iter().filter(|name| !left(name)).count());
            let features: Vec<Tensor> = (0..2)
                .map(|i| embedder.forward(&golden[&format!("two.pixel_values.{i}")].unsqueeze(0)).squeeze_dim(0))
                .collect();
            fixtures::assert_close_to(&Tensor::cat(&features, 0), &golden["image_features"], 1e-5);
        }
    }

    /// In patches of another size, into a decoder of another width, as a VoRA has it.
    #[test]
    fn other_sizes_match_reference_with_gradients() {
        let golden = fixtures::open("gemma4_eyes");
        let weights = Weights::from_tensors(golden.under("weights."), Device::Cpu, Kind::Float);
        let mut config = Gemma4VisionConfig { patch_size: 7, pooling_kernel_size: 1, ..Gemma4VisionConfig::default() };
        (config.mm_embed_dim, config.output_proj_dims, config.mm_posemb_size) = (12, 12, 40);
        let embedder = Gemma4VisionEmbedder::load(&config, 20, &weights.trained()).unwrap();
        weights.finish().unwrap();
        for name in ["square", "wide"] {
            let found = embedder.forward(&golden[&format!("{name}.pixel_values")]);
            fixtures::assert_close_to(&found, &golden[&format!("{name}.features")], 1e-5);
        }
        embedder.forward(&golden["wide.pixel_values"]).square().sum(Kind::Float).backward();
        let parameters = weights.parameters();
        assert_eq!(parameters.len(), 10);
        for (name, parameter) in parameters {
            fixtures::assert_close_to(&parameter.grad(), &golden[&format!("grads.{name}")], 1e-4);
        }

        let rms = |x: &Tensor| x.square().mean(Kind::Float).sqrt().double_value(&[]);
        embedder.scale_to(0.25);
        let found = rms(&embedder.forward(&golden["square.pixel_values"]));
        assert!((0.15..0.4).contains(&found), "{found}");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |change: &dyn Fn(&mut Gemma4VisionConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(refused(&|config| config.patch_size = 0), "patch_size is 0, it must be at least 1");
        assert!(refused(&|config| config.output_proj_dims = 9).starts_with("output_proj_dims is 9, mm_embed_dim 12"));
        assert!(refused(&|config| config.rms_norm_eps = 0.0).starts_with("rms_norm_eps is 0"));
        let weights = Weights::random(1, Device::Cpu, Kind::BFloat16);
        let embedder = Gemma4VisionEmbedder::load(&config(), 32, &weights).unwrap();
        assert_eq!(embedder.grid(8, 12).unwrap(), (2, 3));
        let pixels = Tensor::zeros([2, 3, 8, 12], (Kind::Float, Device::Cpu));
        let features = embedder.forward(&pixels);
        assert_eq!((features.size(), features.kind()), (vec![2, 6, 32], Kind::BFloat16));
        assert!(
            embedder
                .grid(8, 13)
                .unwrap_err()
                .to_string()
                .contains("13 x 8 pixels does not divide into patches of 4 x 4")
        );
        assert!(embedder.grid(4, 4 * 71).unwrap_err().to_string().contains("there are positions for 70 along a side"));
    }
}
