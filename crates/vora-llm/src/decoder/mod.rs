//! The decoder: layers of attention and MLP around a residual stream, the head that turns it into logits, and the passes
//! that a training takes through it.

mod cached;
mod causal_lm;
mod dropout;
mod generate;
mod layer;
mod named;
mod packed;
mod pass;
mod recompute;
mod stack;

#[cfg(test)]
mod acts_on;
#[cfg(test)]
mod architectures;
#[cfg(test)]
mod packed_steps;
#[cfg(test)]
mod training;

pub use causal_lm::CausalLm;
pub use dropout::DropoutSeed;
pub use generate::{GenerationConfig, greedy};
pub use layer::DecoderLayer;
pub use packed::{PackedDecoder, PackedStep};
pub use pass::Pass;
pub use stack::{Decoder, Output};
