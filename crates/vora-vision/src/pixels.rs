//! Prepared pictures as tensors.

use anyhow::{Result, bail, ensure};
use tch::Tensor;
use vora_image::Pixels;

/// `[3, height, width]`, f32 on the CPU.
pub fn pixel_values(pixels: &Pixels) -> Tensor {
    Tensor::from_slice(&pixels.data).view([3, pixels.height as i64, pixels.width as i64])
}

/// `[pictures, 3, height, width]`, f32 on the CPU.
///
/// # Errors
/// Where there is no picture, or where two differ in size.
pub fn stack(pixels: &[Pixels]) -> Result<Tensor> {
    let Some(first) = pixels.first() else { bail!("no pictures to stack") };
    for other in pixels {
        ensure!(
            (other.height, other.width) == (first.height, first.width),
            "pictures of {} x {} and {} x {} pixels do not stack",
            first.width,
            first.height,
            other.width,
            other.height
        );
    }
    Ok(Tensor::stack(&pixels.iter().map(pixel_values).collect::<Vec<_>>(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_of_one_size_stack() {
        let square = |side: usize| Pixels { data: vec![0.5; 3 * side * side], height: side, width: side };
        assert_eq!(stack(&[square(28), square(28)]).unwrap().size(), [2, 3, 28, 28]);
        let error = stack(&[square(28), square(14)]).unwrap_err().to_string();
        assert_eq!(error, "pictures of 28 x 28 and 14 x 14 pixels do not stack");
        assert!(stack(&[]).is_err());
    }
}
