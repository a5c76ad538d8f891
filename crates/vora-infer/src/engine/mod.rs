//! Many requests answered together by one model, each as if it were alone.

mod answer;
mod config;
mod event;
mod handle;
mod logprobs;
mod pool;
mod prefix;
mod scheduler;
mod steps;
mod stop;
#[cfg(test)]
mod tests;

pub use config::EngineConfig;
pub use event::{Event, TokenLogprob};
pub use handle::{Engine, EngineStats, Ticket};
