//! One low-rank adapter: its tensors and their names on disk, and what it adds to a weight.

use anyhow::Result;
use tch::{Kind, Tensor};
use vora_torch::weights::{Init, Weights};

use crate::config::LoraConfig;

/// DoRA's tensor beside `lora_A.weight` and `lora_B.weight`.
pub(crate) const MAGNITUDE: &str = "lora_magnitude_vector";

/// What a linear's `A` `[r, in]` and `B` `[out, r]` are called beside it on disk.
pub const LINEAR_HALVES: [&str; 2] = ["lora_A.weight", "lora_B.weight"];

/// What an embedding's `A` `[r, vocab]` and `B` `[hidden, r]` are called beside it on disk: it is adapted as the linear
/// whose weight is the embedding turned over, `E + scaling * (B A)^T`.
pub const EMBEDDING_HALVES: [&str; 2] = ["lora_embedding_A", "lora_embedding_B"];

/// The module whose adapter the tensor `name` is a part of: `q_proj` of `q_proj.lora_A.weight`; none for what is no part
/// of one.
pub fn adapted_module(name: &str) -> Option<&str> {
    let parts = LINEAR_HALVES.into_iter().chain(EMBEDDING_HALVES).chain([MAGNITUDE]);
    parts.into_iter().find_map(|part| name.strip_suffix(part))?.strip_suffix('.')
}

/// A low-rank addition to a linear: `W + scaling * B A`; where it has a magnitude (DoRA, arXiv 2402.09353), each row
/// of that sum is brought to the length `m`.
#[derive(Debug)]
pub struct Adapter {
    name: String,
    lora_a: Tensor,            // A [r, in], f32
    lora_b: Tensor,            // B [out, r], f32, zero at the start
    scaling: f64,              // lora_alpha / r
    magnitude: Option<Tensor>, // m [out], f32
}

impl Adapter {
    /// Takes `A` `[r, in_features]` and `B` `[out_features, r]` as trained parameters, and DoRA's magnitude where the
    /// source has one.
    pub(crate) fn load(
        name: &str,
        config: &LoraConfig,
        weights: &Weights,
        in_features: i64,
        out_features: i64,
    ) -> Result<Self> {
        let rank = config.rank(weights.path())?;
        let (lora_a, lora_b) = (weights.pp("lora_A"), weights.pp("lora_B"));
        let is_dora = weights.shape(MAGNITUDE).is_some(); // new weights have no shapes yet
        let magnitude = is_dora.then(|| weights.parameter(MAGNITUDE, &[out_features], Init::Required));
        Ok(Self {
            name: name.to_owned(),
            lora_a: lora_a.parameter("weight", &[rank.r, in_features], Init::KaimingUniform)?,
            lora_b: lora_b.parameter("weight", &[out_features, rank.r], Init::Zeros)?,
            scaling: rank.scaling,
            magnitude: magnitude.transpose()?,
        })
    }

    /// The name it was attached under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `A`, `[r, in]`, f32.
    pub fn lora_a(&self) -> &Tensor {
        &self.lora_a
    }

    /// `B`, `[out, r]`, f32.
    pub fn lora_b(&self) -> &Tensor {
        &self.lora_b
    }

    /// What `B A` is multiplied with.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// The rank.
    pub fn r(&self) -> i64 {
        self.lora_a.size()[0]
    }

    /// DoRA's length of each row, `[out]`, f32.
    pub fn magnitude(&self) -> Option<&Tensor> {
        self.magnitude.as_ref()
    }

    /// All of it, by the names that its tensors have beside the linear's own on disk.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let pair = [("lora_A.weight", &self.lora_a), ("lora_B.weight", &self.lora_b)];
        pair.into_iter().chain(self.magnitude.as_ref().map(|magnitude| (MAGNITUDE, magnitude)))
    }

    /// Number of elements of `A`, `B` and the magnitude.
    pub fn num_parameters(&self) -> usize {
        self.tensors().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// What it adds to `weight` `[out, in]`, f32, without a graph.
    pub(crate) fn delta_weight(&self, weight: &Tensor) -> Tensor {
        let magnitude = self.magnitude.as_ref().map(Tensor::detach);
        delta_weight(weight, &self.lora_a, &self.lora_b, self.scaling, magnitude.as_ref())
    }

    /// What DoRA multiplies each row of `W + scaling * B A` with, `[out]`: `m` over the row's length, which counts as a
    /// constant in the gradient (section 4.3 of the paper).
    pub(crate) fn row_scale(&self, weight: impl FnOnce() -> Tensor) -> Option<Tensor> {
        let magnitude = self.magnitude.as_ref()?;
        let weight = weight();
        Some(
            magnitude
                / row_lengths(
                    &(low_rank(&self.lora_a, &self.lora_b, self.scaling) + weight.detach().to_kind(Kind::Float)),
                ),
        )
    }

    /// `(scaling * B)^T`, `[r, out]`, in this dtype: scaled in f32, where it costs least, then rounded.
    pub(crate) fn scaled_b_t(&self, kind: Kind) -> Tensor {
        let b = if self.scaling == 1.0 { self.lora_b.shallow_clone() } else { &self.lora_b * self.scaling };
        b.to_kind(kind).tr()
    }
}

/// `scaling * B A` in f32, without a graph: `[r, in]`, `[out, r]` -> `[out, in]`.
fn low_rank(lora_a: &Tensor, lora_b: &Tensor, scaling: f64) -> Tensor {
    let product = lora_b.detach().to_kind(Kind::Float).mm(&lora_a.detach().to_kind(Kind::Float));
    if scaling == 1.0 { product } else { product * scaling }
}

/// `[out, in]` -> `[out]`
fn row_lengths(weight: &Tensor) -> Tensor {
    weight.square().sum_dim_intlist(1, false, Kind::Float).sqrt()
}

/// What an adapter adds to `weight` `[out, in]`, in f32 and without a graph: `scaling * B A`, or with a magnitude `m`
/// `[out]` the difference that bringing every row of `W + scaling * B A` to the length `m` makes as well.
pub(crate) fn delta_weight(
    weight: &Tensor,
    lora_a: &Tensor,
    lora_b: &Tensor,
    scaling: f64,
    magnitude: Option<&Tensor>,
) -> Tensor {
    let low_rank = low_rank(lora_a, lora_b, scaling);
    let Some(magnitude) = magnitude else { return low_rank };
    let weight = weight.detach().to_kind(Kind::Float);
    let sum = low_rank + &weight;
    let scale = magnitude.to_kind(Kind::Float) / row_lengths(&sum); // [out]
    sum * scale.unsqueeze(1) - weight
}
