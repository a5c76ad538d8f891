//! What libtorch has and `tch` lacks, for every crate of this workspace: choosing device and dtype at run time with
//! one program for CPU and CUDA machines, strict reading and atomic writing of safetensors, reading of GGUF, a fused
//! AdamW, and error text without C++ frames. It knows no model, no adapter and no image, and trains nothing by itself.
//!
//! # In a project of your own
//!
//! ```toml
//! [dependencies]
//! vora-torch = { git = "…", rev = "…" } # or any crate above it: vora-lora, vora-llm, …
//! ```
//!
//! Take [`tch`] from here or from the crate above it, as `vora_torch::tch`: it is pinned to the release that pairs with
//! libtorch 2.11, and one more in your `Cargo.toml` would be another crate with other tensors, of which cargo links one only.
//!
//! libtorch 2.11 has to lie somewhere. `LIBTORCH=/path/to/libtorch` names the folder that holds `lib` and `include`: a download from
//! PyTorch, the folder of the package `torch` in a Python environment, or what `cargo xtask setup` links at `.libtorch`. Another
//! version ends the build with one line.
//! `cargo run` and `cargo test` then find it. A program that is started by itself finds it by a path that is linked into it,
//! from the `main` of a `build.rs` beside your `Cargo.toml`, or else by `LD_LIBRARY_PATH`:
//!
//! ```no_run
//! println!("cargo:rerun-if-env-changed=LIBTORCH");
//! if let Ok(libtorch) = std::env::var("LIBTORCH") {
//!     println!("cargo:rustc-link-arg=-Wl,-rpath,{libtorch}/lib");
//! }
//! ```
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
pub mod dist;
pub mod error;
mod ffi;
mod map;
pub mod nn;
pub mod optim;
mod packed;
pub mod runtime;
pub mod weights;

pub use tch;
