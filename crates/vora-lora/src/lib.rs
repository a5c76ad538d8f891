//! A linear layer that can carry low-rank adapters: attach, merge, unmerge.

mod config;
mod linear;

pub use config::LoraConfig;
pub use linear::{Adapter, Linear};
