//! From the bytes of a picture to vectors of a language model's width: decoding, preprocessing as Hugging Face's
//! processors do it, the trained [`PatchEmbed`], frozen vision transformers as [`Teacher`]s, and [`VqModel`], which turns
//! pictures into the codes of a codebook and back. It knows no language model, no text and no dataset, and trains nothing
//! by itself.
//!
//! ```
//! use tch::{Device, Kind, nn::Module};
//! use vora_torch::Weights;
//! use vora_vision::{IMAGENET_DEFAULT, ImageProcessor, PatchEmbed, PatchEmbedConfig, Resample, RgbImage, stack};
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

mod dinov2;
mod image;
mod layers;
mod patch_embed;
mod patchify;
mod positions;
mod preprocess;
mod teacher;
mod vq;

pub use self::dinov2::{Dinov2, Dinov2Config};
pub use self::image::{ImageError, MAX_PIXELS, decode_image, open_image};
pub use self::patch_embed::{PatchEmbed, PatchEmbedConfig, PositionTable};
pub use self::preprocess::{IMAGENET_DEFAULT, ImageProcessor, Pixels, Resample, Size, stack};
pub use self::teacher::{Patchifier, Teacher};
pub use self::vq::{VqConfig, VqLosses, VqModel, chameleon_processor, to_images};
pub use ::image::RgbImage;
