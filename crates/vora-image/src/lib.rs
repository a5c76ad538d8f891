//! From the bytes of a picture to the pixels that a model takes: decoding with orientation and limits, and Hugging Face's
//! image processors, to the last bit. It knows no model and no text, and links no libtorch; pixels are plain memory.
//!
//! ```
//! use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, RgbImage};
//!
//! # fn main() -> anyhow::Result<()> {
//! let picture = RgbImage::from_fn(90, 60, |x, y| [x as u8, y as u8, 128].into()); // or decode_image(&bytes)?
//! let (mean, std) = IMAGENET_DEFAULT;
//! let pixels = ImageProcessor::square(56, mean, std, Resample::Bicubic).preprocess(&picture)?;
//! assert_eq!((pixels.height, pixels.width, pixels.data.len()), (56, 56, 3 * 56 * 56));
//! # Ok(())
//! # }
//! ```

mod bounding_box;
mod budget;
mod decode;
mod pixels;
mod processor;
mod processor_config;
mod resample;

pub use self::bounding_box::BoundingBox;
pub use self::budget::TokenBudget;
pub use self::decode::{ImageError, MAX_FILE, MAX_PIXELS, decode_image, dimensions, is_image, open_image, read_image};
pub use self::pixels::Pixels;
pub use self::processor::{Aspect, IMAGENET_DEFAULT, IMAGENET_STANDARD, ImageProcessor, OPENAI_CLIP, Size};
pub use self::processor_config::chameleon_processor;
pub use self::resample::{Backend, Resample};
pub use image::RgbImage;
