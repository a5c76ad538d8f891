//! Who is told how a run goes, as it goes.

use std::path::Path;

use vora_run::language::Language;
use vora_run::metrics::{EvalMetrics, StepMetrics};

/// Told how a run goes, as it goes; the library itself prints nothing.
pub trait Progress {
    /// Before the first step of a Chameleon: a step of its image tokenizer is done, with this mean squared error.
    fn tokenizer_step(&mut self, step: u64, steps: u64, reconstruction: f64);
    /// The run goes from `step` to `max_steps`.
    fn begin(&mut self, step: u64, max_steps: u64);
    /// A step is done.
    fn step(&mut self, metrics: &StepMetrics);
    /// `done` of `total` batches are evaluated.
    fn evaluating(&mut self, done: usize, total: usize);
    /// An evaluation is done.
    fn evaluated(&mut self, metrics: &EvalMetrics);
    /// The run is at its end, and this is what seeing cost in text.
    fn compared(&mut self, language: &Language);
    /// A checkpoint was written.
    fn saved(&mut self, folder: &Path);
}

/// Tells nobody.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Progress for Silent {
    fn tokenizer_step(&mut self, _: u64, _: u64, _: f64) {}
    fn begin(&mut self, _: u64, _: u64) {}
    fn step(&mut self, _: &StepMetrics) {}
    fn evaluating(&mut self, _: usize, _: usize) {}
    fn evaluated(&mut self, _: &EvalMetrics) {}
    fn compared(&mut self, _: &Language) {}
    fn saved(&mut self, _: &Path) {}
}
