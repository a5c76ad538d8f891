//! The run file's `model`: which way a language model gets to see, and what it is made of.

mod config;
mod model_type;
mod validate;
mod vq;
mod way;

pub use config::{ImageAspectRatio, ModelConfig, TeacherStart};
pub use model_type::ModelType;
pub use vq::VqTraining;
pub use way::Way;
