//! Pictures as Chameleon's tokenizer takes and gives them.

use anyhow::{Context, Result, ensure};
use image::RgbImage;
use serde_json::json;
use tch::{Kind, Tensor};

use crate::preprocess::ImageProcessor;

/// Hugging Face's `ChameleonImageProcessor` for pictures of `image_size` x `image_size` pixels; Chameleon's are 512.
///
/// The shorter side is resized to `image_size` by Lanczos, the middle cut out, and a byte becomes `0.0078 byte - 1`
/// (the public code of Chameleon has `byte / 127.5 - 1`, which is at most 0.011 more). Of Pillow's resizing, which
/// Hugging Face's slow processor has, less than one sample in a hundred differs, by one or two steps of a byte.
///
/// # Errors
/// Where `image_size` is 0.
pub fn chameleon_processor(image_size: u32) -> Result<ImageProcessor> {
    ImageProcessor::from_json(json!({
        "image_processor_type": "ChameleonImageProcessor",
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
    }))
}

/// Pictures from what [`super::VqModel::decode`] gives: `[batch, 3, height, width]` in [-1, 1], what lies outside is
/// clamped. Rounds to the nearest byte, where the public code of Chameleon rounds down.
///
/// # Errors
/// Where the shape is another.
pub fn to_images(pixel_values: &Tensor) -> Result<Vec<RgbImage>> {
    let size = pixel_values.size();
    let [batch, 3, height, width] = size[..] else {
        anyhow::bail!("pixel values are {size:?}, pictures are [batch, 3, height, width]");
    };
    ensure!(height > 0 && width > 0, "pictures of {width} x {height} pixels cannot be made");
    let bytes = (pixel_values.detach().to_kind(Kind::Float).clamp(-1.0, 1.0) + 1.0) * 127.5;
    let bytes = bytes.round().to_kind(Kind::Uint8).permute([0, 2, 3, 1]).contiguous(); // [batch, height, width, 3]
    (0..batch)
        .map(|i| {
            let bytes = Vec::<u8>::try_from(bytes.get(i).flatten(0, -1))?;
            RgbImage::from_raw(u32::try_from(width)?, u32::try_from(height)?, bytes).context("a picture of other size")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn equals_hugging_face_on_the_same_bytes() {
        let golden = fixtures::open("vq");
        for (name, image_size) in [("shrunk", 32), ("enlarged", 64)] {
            let decoded = &golden[&format!("processor.{name}.bytes")]; // [height, width, 3], as Pillow decodes it
            let (height, width, _) = decoded.size3().unwrap();
            let bytes = Vec::<u8>::try_from(decoded.flatten(0, -1)).unwrap();
            let image = RgbImage::from_raw(width as u32, height as u32, bytes).unwrap();
            let found = chameleon_processor(image_size).unwrap().preprocess(&image).unwrap().to_tensor();
            let expected = &golden[&format!("processor.{name}.pixel_values")];
            // Two steps of a byte: Pillow's weights have more bits.
            fixtures::assert_close_to(&found, expected, 2.0 * 0.0078 + 1e-6);
            let others = (found - expected).abs().gt(1e-6).to_kind(Kind::Float).mean(Kind::Float).double_value(&[]);
            assert!(others < 0.01, "{name}: {others} of the samples differ");
        }
        assert!(chameleon_processor(0).is_err());
    }

    #[test]
    fn pictures_come_back() {
        let image = RgbImage::from_fn(5, 3, |x, y| [x as u8 * 50, y as u8 * 100, 255].into());
        let bytes = Tensor::from_slice(image.as_raw()).view([3, 5, 3]).permute([2, 0, 1]).to_kind(Kind::Float);
        let pixel_values = Tensor::stack(&[bytes.shallow_clone() / 127.5 - 1.0, bytes / 127.5], 0);
        let images = to_images(&pixel_values).unwrap();
        assert_eq!(images[0], image);
        assert_eq!((images[1].get_pixel(0, 0).0, images[1].get_pixel(4, 2).0), ([128, 128, 255], [255; 3]));
        let error = to_images(&Tensor::zeros([3, 4, 4], (Kind::Float, Device::Cpu))).unwrap_err().to_string();
        assert_eq!(error, "pixel values are [3, 4, 4], pictures are [batch, 3, height, width]");
    }
}
