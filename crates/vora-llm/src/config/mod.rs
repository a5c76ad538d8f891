//! A decoder's `config.json`: its keys, what each layer is by them, and what of them is refused.

mod layers;
mod llm_config;
mod validate;

#[cfg(test)]
mod tests;

pub use layers::{KeyValues, LayerSizes};
pub use llm_config::{LayerOverrides, LlmConfig, TokenIds};
