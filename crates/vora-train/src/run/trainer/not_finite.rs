//! A step that changed no weight.

use thiserror::Error;

/// A step that changed no weight. One is skipped; a run of them is the error that ends the training.
#[derive(Debug, Clone, Error, PartialEq)]
#[error(
    "step {step} is not finite (language loss {loss_lm}, distillation loss {loss_distill}, {}gradient norm {grad_norm}) \
     on {}; no weight was changed",
    loss_anchor.map_or(String::new(), |loss| format!("text anchor {loss}, ")),
    samples.join(", ")
)]
#[non_exhaustive]
pub struct NotFinite {
    /// The step, counted from 1.
    pub step: u64,
    /// Cross-entropy per token.
    pub loss_lm: f64,
    /// Cosine loss.
    pub loss_distill: f64,
    /// Divergence on the anchor's texts, where the step took some.
    pub loss_anchor: Option<f64>,
    /// Norm of the gradient.
    pub grad_norm: f64,
    /// The samples whose hidden states are not finite; all of the step's where no single one is to blame.
    pub samples: Vec<String>,
}
