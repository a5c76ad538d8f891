//! The norms of all families behind one type.

use tch::nn::Module;

/// A layer norm, or an RMS norm.
pub(crate) type Norm = Box<dyn Module>;
