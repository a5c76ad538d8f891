//! Where a model's tensors come from: a checkpoint, memory, or a seed.

mod init;
mod mismatch;
mod source;

pub use init::Init;
pub use mismatch::Mismatch;
pub use source::Weights;
