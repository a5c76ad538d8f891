//! AdamW over f32 masters, in fused calls.

mod adamw;
mod gradients;
mod optimizer;
mod sharded;

pub use adamw::{AdamW, fused_adamw};
pub use gradients::{grad_norm, scale};
pub use optimizer::{Optimizer, OptimizerConfig, Parameter};
pub use sharded::{BROADCAST_BYTES, broadcast};
