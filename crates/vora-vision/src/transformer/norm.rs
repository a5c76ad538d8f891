//! One type for the norms of all families.

use tch::nn::Module;

/// A layer norm, or an RMS norm.
pub(crate) type Norm = Box<dyn Module>;
