//! What a linear multiplies with: a plain tensor, one that is kept in few bits, or one that several processes share.

use anyhow::{Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use vora_torch::dist::ShardedWeight;
use vora_torch::weights::{Init, Quantization, QuantizedWeight, Weights};

/// A weight `[out, in]`.
#[derive(Debug)]
pub(crate) enum Weight {
    Plain(Tensor), // frozen, or a trained f32 master
    Quantized(Box<QuantizedWeight>),
    Sharded(Box<ShardedWeight>), // frozen
}

impl Weight {
    /// Takes `weight`, in few bits where the source stores it in groups of them, or says so and it is frozen. What is stored
    /// in groups is made whole elsewhere than on the CPU.
    pub(crate) fn load(weights: &Weights, in_features: i64, out_features: i64) -> Result<Self> {
        if let Some(packed) = weights.packed("weight", [out_features, in_features])? {
            let (kind, device) = (weights.kind(), weights.device());
            ensure!(
                weights.quantization().is_none(),
                "{}.weight is in {} already: take the folder that it was quantized from",
                weights.path(),
                packed.width()
            );
            ensure!(
                weights.shards().is_none(),
                "{}.weight is in {} already, and zero_stage 3 shares out plain weights: take the folder that it was quantized \
                 from",
                weights.path(),
                packed.width()
            );
            if device != Device::Cpu {
                let own = if kind == Kind::BFloat16 { kind } else { Kind::Float };
                return Ok(Self::Plain(packed.dequantise(0..out_features, own)?.to_kind(kind).to_device(device)));
            }
            if let Some(quantized) = QuantizedWeight::from_packed(packed, kind) {
                return Ok(Self::Quantized(Box::new(quantized)));
            }
        }
        let weight = weights.get("weight", &[out_features, in_features], Init::Required)?;
        if let Some(shards) = weights.shards().filter(|_| !weight.requires_grad()) {
            let sharded = ShardedWeight::new(&weight, shards);
            weights.forget("weight");
            return Ok(Self::Sharded(Box::new(sharded)));
        }
        Ok(match weights.quantization().filter(|_| !weight.requires_grad()) {
            Some(quantization) => {
                let quantized = QuantizedWeight::new(&weight, quantization)?;
                weights.forget("weight");
                Self::Quantized(Box::new(quantized))
            }
            None => Self::Plain(weight),
        })
    }

    /// Brings a plain, frozen one into few bits.
    ///
    /// # Errors
    /// Where it is in few bits already, trained, or shared; what [`QuantizedWeight::new`] refuses.
    pub(crate) fn quantize(&mut self, quantization: Quantization) -> Result<()> {
        match self {
            Self::Plain(weight) => {
                ensure!(!weight.requires_grad(), "it is trained");
                *self = Self::Quantized(Box::new(QuantizedWeight::new(weight, quantization)?));
                Ok(())
            }
            Self::Quantized(weight) => {
                ensure!(weight.quantization() == quantization, "it is in few bits already, of another kind");
                Ok(())
            }
            Self::Sharded(_) => bail!("several processes have a share of it each"),
        }
    }

    /// `[out, in]`
    pub(crate) fn size(&self) -> [i64; 2] {
        match self {
            Self::Plain(weight) => {
                let (out_features, in_features) = weight.size2().expect("W is [out, in]");
                [out_features, in_features]
            }
            Self::Quantized(weight) => weight.size(),
            Self::Sharded(weight) => weight.size(),
        }
    }

    /// The tensor itself, or a new one that the bits stand for; see [`ShardedWeight::whole`].
    pub(crate) fn whole(&self) -> Tensor {
        match self {
            Self::Plain(weight) => weight.shallow_clone(),
            Self::Quantized(weight) => weight.dequantized(weight.kind()),
            Self::Sharded(weight) => weight.whole(),
        }
    }

    /// `x W^T + b` in the dtype of `x`: `[.., in]` -> `[.., out]`
    pub(crate) fn linear(&self, x: &Tensor, bias: Option<&Tensor>) -> Tensor {
        match self {
            Self::Plain(weight) => x.linear(&weight.to_kind(x.kind()), bias),
            Self::Sharded(weight) => x.linear(&weight.whole().to_kind(x.kind()), bias),
            Self::Quantized(weight) => weight.linear(x, bias),
        }
    }
}
