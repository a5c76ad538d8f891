//! Attention over spans: which tokens may attend to which, the plan that a batch's layers share, the kernels, the layer.

mod attend;
mod bands;
mod layer;
mod mask;
mod mode;
mod plan;
mod segments;

pub use attend::attend;
pub use layer::{Attention, SharedKeys};
pub use mode::VisionAttention;
pub use plan::{AttentionPlan, KernelChoice};
