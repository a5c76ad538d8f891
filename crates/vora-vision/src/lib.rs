//! From a picture's pixels to vectors of a language model's width: the trained [`PatchEmbed`], Gemma 4's
//! [`Gemma4VisionEmbedder`], frozen vision transformers as [`Encoder`]s, and [`VqModel`], which turns pictures into the codes of a codebook and back. It knows no language model, no text and no
//! dataset, and trains nothing by itself.
//!
//! What libtorch needs in a project of your own: [`vora_torch`].
//!
//! ```
//! use tch::{Device, Kind, nn::Module};
//! use vora_torch::weights::Weights;
//! use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, RgbImage};
//! use vora_vision::{PatchEmbed, PatchEmbedConfig, stack};
//!
//! # fn main() -> anyhow::Result<()> {
//! let picture = RgbImage::from_fn(90, 60, |x, y| [x as u8, y as u8, 128].into()); // or decode_image(&bytes)?
//! let (mean, std) = IMAGENET_DEFAULT;
//! let pixels = ImageProcessor::square(56, mean, std, Resample::Bicubic).preprocess(&picture)?;
//!
//! let config = PatchEmbedConfig { patch_size: 14, image_size: 56, embed_dim: 32, hidden_size: 64 };
//! let patch_embed = PatchEmbed::load(&config, &Weights::random(0, Device::Cpu, Kind::Float))?;
//! assert_eq!(patch_embed.forward(&stack(&[pixels])?).size(), [1, 16, 64]); // 4 x 4 patches
//! # Ok(())
//! # }
//! ```

mod encoder;
mod encoders;
mod features;
mod gemma4;
#[cfg(test)]
mod golden;
mod patch_embed;
mod pixels;
mod transformer;
mod vq;

pub use encoder::{Encoder, EncoderConfig};
pub use encoders::{
    Aimv2VisionConfig, ClipVisionConfig, Dinov2Config, Siglip2VisionConfig, SiglipVisionConfig, VitConfig,
};
pub use features::{FeatureSelection, VisionFeatureLayer, VisionFeatureSelectStrategy};
pub use gemma4::{Gemma4VisionConfig, Gemma4VisionEmbedder};
pub use patch_embed::{PatchEmbed, PatchEmbedConfig, PositionTable};
pub use pixels::{pixel_values, stack};
pub use tch;
pub use transformer::{Patchifier, VisionTransformer};
pub use vora_image::RgbImage;
pub use vora_torch::weights::Weights;
pub use vq::{VqConfig, VqLosses, VqModel, to_images};
