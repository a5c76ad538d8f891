//! Chameleon's image tokenizer: a VQGAN that turns pictures into the codes of a codebook and back.

mod blocks;
mod config;
mod decoder;
mod encoder;
mod model;
mod params;
mod pixels;
mod quantizer;

pub use config::VqConfig;
pub use model::{VqLosses, VqModel};
pub use pixels::to_images;
