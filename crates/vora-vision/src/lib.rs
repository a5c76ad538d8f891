//! From the bytes of a picture to vectors of a language model's width: decoding, preprocessing as Hugging Face's
//! processors do it, the trained [`PatchEmbed`], frozen vision transformers as [`Encoder`]s and [`Teacher`]s, and
//! [`VqModel`], which turns pictures into the codes of a codebook and back. It knows no language model, no text and no
//! dataset, and trains nothing by itself.
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

mod pixels;

mod patch_embed;
mod patchify;
mod positions;

mod encoder;
mod encoder_config;
mod features;
#[cfg(test)]
mod golden;
mod vision_transformer;

mod aimv2;
mod clip;
mod dinov2;
mod siglip;
mod siglip2;
mod vit;

mod activation;
mod attention;
mod block;
mod embeddings;
mod mlp;
mod norm;
mod sizes;

mod vq;

pub use self::aimv2::Aimv2VisionConfig;
pub use self::clip::ClipVisionConfig;
pub use self::dinov2::Dinov2Config;
pub use self::encoder::{Encoder, Teacher};
pub use self::encoder_config::EncoderConfig;
pub use self::features::{FeatureSelection, VisionFeatureLayer, VisionFeatureSelectStrategy};
pub use self::patch_embed::{PatchEmbed, PatchEmbedConfig, PositionTable};
pub use self::pixels::{pixel_values, stack};
pub use self::siglip::SiglipVisionConfig;
pub use self::siglip2::Siglip2VisionConfig;
pub use self::vision_transformer::{Patchifier, VisionTransformer};
pub use self::vit::VitConfig;
pub use self::vq::{VqConfig, VqLosses, VqModel, to_images};
