//! What libtorch has and `tch` lacks, for every crate of this workspace: choosing device and dtype at run time with
//! one program for CPU and CUDA machines, strict reading and atomic writing of safetensors, reading of GGUF, a fused
//! AdamW, and error text without C++ frames. It knows no model, no adapter and no image, and trains nothing by itself.
//!
//! A program that links it should start with the variables of [`runtime::missing_environment`], which libraries read when they
//! are loaded: beside other processes a step is else many times as slow, and alone by a tenth. The program `vora` starts
//! itself again with them.
//!
//! ```
//! use tch::{Device, Kind};
//! use vora_torch::weights::{Init, Weights};
//!
//! # fn main() -> anyhow::Result<()> {
//! // A source of weights walks the names of a checkpoint; this one makes new ones from a seed.
//! let weights = Weights::random(42, Device::Cpu, Kind::Float);
//! let proj = weights.pp("model.layers.0").pp("q_proj").get("weight", &[8, 4], Init::Normal { std: 0.02 })?;
//! assert_eq!(proj.size(), [8, 4]);
//! weights.finish()
//! # }
//! ```

pub mod autograd;
pub mod checkpoint;
pub mod error;
mod ffi;
pub mod nn;
pub mod optim;
pub mod runtime;
pub mod weights;
