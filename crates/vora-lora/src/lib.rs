//! Low-rank adapters (LoRA, Hu et al. 2021): a frozen linear layer that can carry named ones, attaching them over a
//! model, merging them into the weights, and PEFT's files. It knows no model, which hands it its linears, no
//! optimizer, which finds the trained tensors in the source of weights, and no variant that is more than
//! `W + scaling * B A` but DoRA, whose adapters it reads and merges. Adapters may act on some of a batch's tokens and
//! leave the others to the frozen weights ([`ActsOn`], [`Active`]).
//!
//! ```
//! use tch::{Device, Kind, Tensor, nn::Module};
//! use vora_lora::{Linear, LoraConfig};
//! use vora_torch::weights::Weights;
//!
//! # fn main() -> anyhow::Result<()> {
//! let weights = Weights::random(42, Device::Cpu, Kind::Float);
//! let mut q_proj = Linear::load(&weights.pp("q_proj"), 64, 64, false)?;
//! let x = Tensor::ones([2, 5, 64], (Kind::Float, Device::Cpu)); // [batch, seq, hidden]
//! let before = q_proj.forward(&x);
//!
//! let config = LoraConfig::new(8, 1); // rank 8, the first layer, scaling 1
//! q_proj.attach("sight", &config, &weights.pp("q_proj"))?;
//! assert_eq!(q_proj.num_adapter_parameters(), 2 * 8 * 64);
//! assert_eq!(weights.parameters()[1].0, "q_proj.lora_B.weight"); // what an optimizer trains
//! assert!(q_proj.forward(&x).equal(&before)); // B is zero at the start
//!
//! tch::no_grad(|| weights.parameters()[1].1.shallow_clone().fill_(0.1)); // somebody trains
//! let trained = q_proj.forward(&x);
//! q_proj.merge(); // nothing is left to pay for
//! assert!(q_proj.forward(&x).allclose(&trained, 1e-4, 1e-4, false));
//! # Ok(())
//! # }
//! ```

mod acts_on;
mod adapter;
mod attach;
mod config;
mod linear;
mod pattern;
mod peft;
mod state_dict;

pub use acts_on::{Active, ActsOn};
pub use adapter::{Adapter, EMBEDDING_HALVES, LINEAR_HALVES, adapted_module};
pub use attach::{Visit, attach_all};
pub use config::{ALL_LAYERS, LoraConfig, Rank};
pub use linear::Linear;
pub use peft::{ADAPTER_TENSORS, AdapterError, AdapterFolder, PEFT_PREFIX, save_adapter};
pub use state_dict::merge_state_dict;
