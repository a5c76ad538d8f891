//! A server for a model that sees: OpenAI's chat completions over HTTP, streamed or whole, a page to chat on, and metrics.
//! It takes nothing on trust: keys, hosts, sizes, numbers and times are checked before the model hears of a request. It
//! computes nothing, which is the engine's, and opens no model. Adapters that were added to the assistant
//! ([`Assistant::add_adapter`](vora_infer::Assistant::add_adapter)) answer by names of their own.
//!
//! ```no_run
//! use vora_infer::tch::{Device, Kind};
//! use vora_infer::{Assistant, EngineConfig};
//! use vora_serve::{ServeConfig, Server};
//!
//! # fn main() -> anyhow::Result<()> {
//! let server = Server::bind(ServeConfig::new("scenes"))?; // answers /health from here on
//! let folder = std::path::Path::new("runs/scenes/merged");
//! let assistant = Assistant::open(folder, Device::Cpu, Kind::Float, &|name| Ok(name.into()))?;
//! server.answer_with(assistant, EngineConfig::default())?;
//! println!("http://{}", server.address());
//! # Ok(())
//! # }
//! ```

mod body;
mod chat;
mod config;
mod connection;
mod error;
mod fetch;
mod guard;
mod metrics;
mod models;
mod page;
mod places;
mod router;
mod served;
mod server;
mod state;

pub use config::ServeConfig;
pub use server::Server;
