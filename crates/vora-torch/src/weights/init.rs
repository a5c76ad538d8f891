//! How tensors start that no checkpoint gives.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::ffi;

/// How a tensor starts when the source makes new weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// All the same.
    Const(f64),
    /// Normal with mean 0.
    Normal {
        /// Standard deviation.
        std: f64,
    },
    /// Uniform in ±1/sqrt(fan_in), fan_in over all but the first dimension: `kaiming_uniform_(a=sqrt(5))`,
    /// PyTorch's default for linear layers and LoRA's for `A`.
    KaimingUniform,
    /// A weight that a checkpoint gives; normal with mean 0 in a source of new weights, with the standard deviation of
    /// [`Weights::with_initializer_range`](super::Weights::with_initializer_range).
    Required,
}

/// A new f32 tensor on the CPU.
pub(super) fn new_tensor(seed: u64, name: &str, shape: &[i64], init: Init, initializer_range: f64) -> Result<Tensor> {
    let mut tensor = Tensor::empty(shape, (Kind::Float, Device::Cpu));
    // FNV-1a over the name, so that adding a layer changes no other layer's start.
    let seed =
        name.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let normal = |tensor: &mut Tensor, std| {
        // SAFETY: a live f32 CPU tensor.
        ffi::check(unsafe { ffi::vora_fill_normal(tensor.as_mut_ptr(), std, seed) })
    };
    match init {
        Init::Zeros => drop(tensor.zero_()),
        Init::Ones => drop(tensor.fill_(1.0)),
        Init::Const(value) => drop(tensor.fill_(value)),
        Init::Normal { std } => normal(&mut tensor, std)?,
        Init::Required => normal(&mut tensor, initializer_range)?,
        Init::KaimingUniform => {
            let fan_in: i64 = shape[1.min(shape.len())..].iter().product();
            let bound = 1.0 / (fan_in as f64).sqrt();
            // SAFETY: a live f32 CPU tensor.
            ffi::check(unsafe { ffi::vora_fill_uniform(tensor.as_mut_ptr(), bound, seed) })?;
        }
    }
    Ok(tensor)
}
