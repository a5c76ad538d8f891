//! What a run needs beside its file, and how it ends.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::Result;
use tch::Device;
use vora_run::eval::EvalReport;
use vora_torch::dist::ProcessGroup;

/// What a run needs that its file does not say.
#[non_exhaustive]
pub struct Options<'a> {
    /// Where to train.
    pub device: Device,
    /// Whether to go on from the run folder's last checkpoint, where there is one.
    pub resume: bool,
    /// Finds the folder of a model by the name in the run file.
    pub resolve: &'a dyn Fn(&str) -> Result<PathBuf>,
    /// Set by a signal: the run then saves a checkpoint and stops.
    pub stop: Arc<AtomicBool>,
    /// Set by a signal: the run then saves a checkpoint, clears this and goes on.
    pub save: Arc<AtomicBool>,
    /// The processes that train this run together; none: this one alone.
    pub group: Option<Arc<ProcessGroup>>,
}

impl<'a> Options<'a> {
    /// A new run on `device` that nobody stops; `resolve` finds the folder of a model by the name in the run file.
    pub fn new(device: Device, resolve: &'a dyn Fn(&str) -> Result<PathBuf>) -> Self {
        Self { device, resume: false, resolve, stop: Arc::default(), save: Arc::default(), group: None }
    }
}

/// How a run came to its end.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps done, everything written.
    Finished(EvalReport),
    /// Asked to stop after this step; a checkpoint was written.
    Stopped {
        /// Steps done.
        step: u64,
    },
}
