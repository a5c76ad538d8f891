//! A run folder as files, for whoever writes one and whoever reads it: `metrics.jsonl`, `eval.json`,
//! `train_results.json`, samples, block maps, and, with the feature `drawn`, TensorBoard's events, plots, and all of it as
//! one HTML page; with `compared`, several runs side by side. It trains nothing and links no libtorch.
//!
//! ```
//! use vora_run::metrics::{Line, MetricsLog};
//!
//! # fn main() -> anyhow::Result<()> {
//! let folder = tempfile::tempdir()?;
//! let path = folder.path().join("metrics.jsonl");
//! std::fs::write(&path, r#"{"step": 3, "eval": {}}"#)?;
//! assert!(matches!(MetricsLog::read(&path)?[..], [Line::Eval(_)]));
//! # Ok(())
//! # }
//! ```

pub mod block_maps;
pub mod checkpoint;
pub mod eval;
pub mod interval;
pub mod language;
pub mod metrics;
#[cfg(feature = "drawn")]
pub mod plot;
#[cfg(feature = "drawn")]
pub mod report;
pub mod results;
pub mod samples;
#[cfg(feature = "compared")]
pub mod side_by_side;
#[cfg(feature = "drawn")]
pub mod tensorboard;
