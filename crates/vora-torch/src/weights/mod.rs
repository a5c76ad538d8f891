//! Where a model's tensors come from: a checkpoint, memory, or a seed.

mod init;
mod mismatch;
mod pack_quantized;
mod quantized;
mod source;

pub use init::Init;
pub use mismatch::Mismatch;
pub use quantized::{Quantization, QuantizedWeight};
pub use source::Weights;
