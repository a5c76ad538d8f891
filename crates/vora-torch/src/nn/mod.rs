//! Layers and losses of every model, and the kernels that they run through.

pub mod attention;
pub mod decode;
pub mod fused;
mod layer_norm;
mod linear;
pub mod loss;
pub mod preference;
mod rms_norm;

pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use rms_norm::RmsNorm;
