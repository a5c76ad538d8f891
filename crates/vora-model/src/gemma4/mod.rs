//! Gemma 4 Unified: the decoder takes pictures by one matrix, without an encoder.

mod config;
mod model;
#[cfg(test)]
mod training;

pub use config::Gemma4UnifiedConfig;
pub use model::Gemma4Unified;
