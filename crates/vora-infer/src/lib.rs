//! Generation: a prompt with pictures goes through the decoder once, then one token at a time comes out, from a KV
//! cache, greedy or sampled, streamed as text; what a Chameleon writes can be kept to words, to a picture, or to whole
//! pictures among words. An [`Engine`] answers many requests at once, each as if it were alone and each by the adapter that it
//! names ([`Assistant::add_adapter`]), over one copy of the weights. It cannot train, knows no HTTP,
//! and loads nothing but model folders, merged or a run's.
//!
//! ```no_run
//! use std::path::{Path, PathBuf};
//!
//! use vora_infer::tch::{Device, Kind};
//! use vora_infer::{Assistant, Engine, EngineConfig, Event, Request};
//!
//! # fn main() -> anyhow::Result<()> {
//! let resolve = |name: &str| Ok(PathBuf::from(name)); // where the models lie that a run started from
//! let assistant = Assistant::open(Path::new("runs/scenes/merged"), Device::Cpu, Kind::BFloat16, &resolve)?;
//! let engine = Engine::start(assistant, EngineConfig::default())?;
//! let pictures = vec![vora_image::open_image(Path::new("picture.png"))?];
//! for event in engine.stream(Request::question(pictures, "What color is the ring?").with_max_new_tokens(64))? {
//!     match event {
//!         Event::Text { text, .. } => print!("{text}"),
//!         Event::Failed(error) => return Err(error),
//!         _ => {}
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! What libtorch needs in a project of your own stands in the docs of `vora-torch`.
//!
//! ```
//! use tch::Tensor;
//! use vora_infer::{Sampler, SamplingParams};
//!
//! # fn main() -> anyhow::Result<()> {
//! let params = SamplingParams::default().with_temperature(0.7).with_top_p(0.9).with_seed(1);
//! let mut sampler = Sampler::new(params, &[])?;
//! let token = sampler.next_token(&Tensor::from_slice(&[0.1f32, 9.0, 0.2]))?;
//! assert_eq!(token, 1);
//! # Ok(())
//! # }
//! ```

mod adapters;
mod assistant;
mod constraint;
mod engine;
mod error;
mod finite;
mod generate;
mod generated;
mod generation_config;
mod grammar;
mod passages;
mod prompter;
mod request;
mod sampling;
mod sequence;

pub use assistant::{Answer, Assistant};
pub use constraint::{Constraint, OutputModality};
pub use engine::{Engine, EngineConfig, EngineStats, Event, Ticket, TokenLogprob};
pub use error::InferError;
pub use finite::not_finite;
pub use generate::{generate, generate_batch, generate_within};
pub use generated::{FinishReason, Generated};
pub use passages::{Passage, passages};
pub use request::{Request, ResponseFormat};
pub use sampling::{Sampler, SamplingParams};
pub use tch;
pub use vora_image::RgbImage;
pub use vora_text::{Message, Tokenizer};
pub use vora_torch::nn::decode::Width;
