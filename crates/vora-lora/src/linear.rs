//! A frozen linear layer that can carry named low-rank adapters.

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor, nn::Module};
use vora_torch::weights::{Init, Weights};

use crate::LoraConfig;

/// `y = x W^T + b + sum over adapters of scaling * (x A^T) B^T`; only the `A`s and `B`s are trained.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,       // W [out, in], frozen
    bias: Option<Tensor>, // b [out], frozen
    adapters: Vec<Adapter>,
}

/// A low-rank addition to a linear: `W + scaling * B A`.
#[derive(Debug)]
pub struct Adapter {
    name: String,
    lora_a: Tensor, // A [r, in], f32
    lora_b: Tensor, // B [out, r], f32, zero at the start
    scaling: f64,   // lora_alpha / r
}

impl Adapter {
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

    /// Number of elements of `A` and `B`.
    pub fn num_parameters(&self) -> usize {
        self.lora_a.numel() + self.lora_b.numel()
    }

    /// `scaling * B A`, `[out, in]`, f32, without a graph.
    pub fn delta_weight(&self) -> Tensor {
        delta_weight(&self.lora_a, &self.lora_b, self.scaling)
    }

    /// `(scaling * B)^T`, `[r, out]`, in `kind`: scaled in f32, where it costs least, then rounded.
    fn scaled_b_t(&self, kind: Kind) -> Tensor {
        let b = if self.scaling == 1.0 { self.lora_b.shallow_clone() } else { &self.lora_b * self.scaling };
        b.to_kind(kind).tr()
    }
}

/// `scaling * B A` in f32, without a graph: `[r, in]`, `[out, r]` -> `[out, in]`.
pub(crate) fn delta_weight(lora_a: &Tensor, lora_b: &Tensor, scaling: f64) -> Tensor {
    let delta = lora_b.detach().to_kind(Kind::Float).mm(&lora_a.detach().to_kind(Kind::Float));
    if scaling == 1.0 { delta } else { delta * scaling }
}

impl Linear {
    /// Takes `weight` `[out_features, in_features]` and, where `bias`, `bias` `[out_features]`; both stay frozen.
    pub fn load(weights: &Weights, in_features: i64, out_features: i64, bias: bool) -> Result<Self> {
        let weight = weights.get("weight", &[out_features, in_features], Init::Normal { std: 0.02 })?;
        let bias = bias.then(|| weights.get("bias", &[out_features], Init::Zeros)).transpose()?;
        Ok(Self { weight, bias, adapters: Vec::new() })
    }

    /// Adds the adapter `name`: `lora_A.weight` and `lora_B.weight` of `weights`, as trained f32 parameters.
    ///
    /// A source of new weights starts `A` Kaiming-uniform (a = sqrt 5) and `B` at zero, so that nothing changes yet.
    /// Errors where the name is taken or the configuration is out of range.
    pub fn attach(&mut self, name: &str, config: &LoraConfig, weights: &Weights) -> Result<()> {
        config.validate()?;
        let taken = self.adapters.iter().any(|adapter| adapter.name == name);
        ensure!(!taken, "{} already carries an adapter `{name}`", weights.path());
        let (lora_a, lora_b) = (weights.pp("lora_A"), weights.pp("lora_B"));
        self.adapters.push(Adapter {
            name: name.to_owned(),
            lora_a: lora_a.parameter("weight", &[config.r, self.in_features()], Init::KaimingUniform)?,
            lora_b: lora_b.parameter("weight", &[self.out_features(), config.r], Init::Zeros)?,
            scaling: config.scaling(),
        });
        Ok(())
    }

    /// Takes the adapter `name` off again.
    pub fn detach(&mut self, name: &str) -> Result<Adapter> {
        Ok(self.adapters.remove(self.position(name)?))
    }

    /// The frozen weight, `[out_features, in_features]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The frozen bias, `[out_features]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The last dimension of what goes in.
    pub fn in_features(&self) -> i64 {
        self.weight.size()[1]
    }

    /// The last dimension of what comes out.
    pub fn out_features(&self) -> i64 {
        self.weight.size()[0]
    }

    /// The adapters, in the order they were attached; all of them are active.
    pub fn adapters(&self) -> impl Iterator<Item = &Adapter> {
        self.adapters.iter()
    }

    /// Number of trained elements over all adapters.
    pub fn num_adapter_parameters(&self) -> usize {
        self.adapters.iter().map(Adapter::num_parameters).sum()
    }

    /// What the adapter `name` adds to the weight: `scaling * B A`, `[out, in]`, f32.
    pub fn delta_weight(&self, name: &str) -> Result<Tensor> {
        Ok(self.adapters[self.position(name)?].delta_weight())
    }

    /// Folds every adapter into the weight: summed in f32, rounded once to the weight's kind. None is left.
    pub fn merge(&mut self) {
        let adapters = std::mem::take(&mut self.adapters);
        self.add(adapters.iter().map(Adapter::delta_weight));
    }

    /// Folds the adapter `name` into the weight and hands it back for [`Linear::unmerge`].
    pub fn merge_adapter(&mut self, name: &str) -> Result<Adapter> {
        let adapter = self.detach(name)?;
        self.add([adapter.delta_weight()]);
        Ok(adapter)
    }

    /// Takes a merged adapter out of the weight and attaches it again. The weight is what it was before the merge
    /// up to the rounding of its kind: in bf16 a merge followed by this is not exact.
    pub fn unmerge(&mut self, adapter: Adapter) {
        self.add([-adapter.delta_weight()]);
        self.adapters.push(adapter);
    }

    /// Adds f32 matrices `[out, in]` to the weight, rounding once.
    fn add(&mut self, deltas: impl IntoIterator<Item = Tensor>) {
        let sum = deltas.into_iter().reduce(|mut sum, delta| sum.g_add_(&delta));
        if let Some(mut sum) = sum {
            // Into a new tensor: the weight may be a view of a checkpoint that others read too.
            self.weight = sum.g_add_(&self.weight.to_kind(Kind::Float)).to_kind(self.weight.kind());
        }
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.adapters.iter().position(|adapter| adapter.name == name).with_context(|| {
            let names: Vec<&str> = self.adapters.iter().map(Adapter::name).collect();
            format!("no adapter `{name}` is attached; there are {names:?}")
        })
    }
}

impl Module for Linear {
    /// `[.., in_features]` -> `[.., out_features]`, in the kind of `x`
    fn forward(&self, x: &Tensor) -> Tensor {
        if self.adapters.is_empty() {
            return x.linear(&self.weight, self.bias.as_ref());
        }
        let mut shape = x.size();
        // In two dimensions the adapter's product adds onto the base's output, with no second [tokens, out].
        let x = x.reshape([-1, self.in_features()]); // [tokens, in]
        let mut y = x.linear(&self.weight, self.bias.as_ref()); // [tokens, out]
        for adapter in &self.adapters {
            let xa = x.mm(&adapter.lora_a.to_kind(x.kind()).tr()); // [tokens, r]
            y = y.addmm_(&xa, &adapter.scaled_b_t(x.kind()));
        }
        *shape.last_mut().expect("x is [.., in_features]") = self.out_features();
        y.reshape(shape)
    }
}
