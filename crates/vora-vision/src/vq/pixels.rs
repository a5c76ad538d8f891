//! Pictures as Chameleon's tokenizer gives them.

use anyhow::{Context, Result, ensure};
use image::RgbImage;
use tch::{Kind, Tensor};

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
