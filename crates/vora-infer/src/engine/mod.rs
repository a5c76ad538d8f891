//! Many requests answered together by one model, each as if it were alone.

mod answer;
#[cfg(test)]
mod by_name;
mod config;
mod event;
mod handle;
mod job;
mod loaded;
mod logprobs;
mod pool;
mod prefix;
mod scheduler;
mod stats;
mod steps;
mod stop;
#[cfg(test)]
mod tests;

pub use config::EngineConfig;
pub use event::{Event, TokenLogprob};
pub use handle::{Engine, Ticket};
pub use stats::EngineStats;
