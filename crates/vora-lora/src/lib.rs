//! Low-rank adapters (LoRA, Hu et al. 2021): a frozen linear layer that can carry named ones, attaching them over a
//! model, merging them into the weights, and PEFT's files. It knows no model, which hands it its linears, no
//! optimizer, which finds the trained tensors in the source of weights, and no variant that is more than
//! `W + scaling * B A` but DoRA, whose adapters it reads and merges. Adapters may act on some of a batch's tokens and
//! leave the others to the frozen weights ([`ActsOn`], [`Active`]).
//!
//! What libtorch needs in a project of your own: [`vora_torch`].
//!
//! ```
//! use vora_lora::optim::{Optimizer, OptimizerConfig};
//! use vora_lora::tch::{Device, Kind, Tensor, nn::Module};
//! use vora_lora::{BaseModel, Linear, LoraConfig, Weights, attach_all, save_adapter};
//!
//! # fn main() -> anyhow::Result<()> {
//! // A model of one's own: two frozen linears.
//! let base = Weights::random(42, Device::Cpu, Kind::Float); // or Weights::open(a folder of safetensors, ...)
//! let mut fc1 = Linear::load(&base.pp("fc1"), 16, 64, true)?;
//! let mut fc2 = Linear::load(&base.pp("fc2"), 64, 16, true)?;
//!
//! // Adapters of rank 4 on both; B is zero at the start, so that nothing changes yet.
//! let config = LoraConfig::of_modules(4, ["fc1", "fc2"]);
//! let adapters = Weights::random(7, Device::Cpu, Kind::Float);
//! attach_all("mine", &config, &adapters, |visit| {
//!     visit("fc1", &mut fc1)?;
//!     visit("fc2", &mut fc2)
//! })?;
//!
//! // Training: only the adapters learn.
//! let mut optimizer = Optimizer::adamw(adapters.parameters(), 1e-2, OptimizerConfig::default())?;
//! let (x, y) = (Tensor::ones([8, 16], (Kind::Float, Device::Cpu)), Tensor::zeros([8, 16], (Kind::Float, Device::Cpu)));
//! let loss = |fc1: &Linear, fc2: &Linear| (fc2.forward(&fc1.forward(&x).relu()) - &y).square().mean(Kind::Float);
//! let before = loss(&fc1, &fc2).double_value(&[]);
//! for _ in 0..5 {
//!     optimizer.zero_grad()?;
//!     loss(&fc1, &fc2).backward();
//!     let norm = optimizer.grad_norm()?.double_value(&[]);
//!     optimizer.step(1.0, norm)?; // 1.0: the schedule's factor
//! }
//! let trained = loss(&fc1, &fc2).double_value(&[]);
//! assert!(trained < before);
//!
//! // A folder that PEFT reads, and weights with nothing left to pay for.
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! save_adapter(folder, &config, BaseModel::new("me/my-model"), &adapters.parameters())?;
//! fc1.merge();
//! fc2.merge();
//! assert!((loss(&fc1, &fc2).double_value(&[]) - trained).abs() < 1e-5);
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
mod weight;

pub use acts_on::{Active, ActsOn};
pub use adapter::{Adapter, EMBEDDING_HALVES, LINEAR_HALVES, adapted_module};
pub use attach::{Visit, attach_all};
pub use config::{ALL_LAYERS, LoraConfig, Rank, in_layer};
pub use linear::Linear;
pub use peft::{ADAPTER_TENSORS, AdapterError, AdapterFolder, BaseModel, PEFT_PREFIX, save_adapter};
pub use state_dict::merge_state_dict;
pub use tch;
pub use vora_torch::{optim, weights::Weights};
