//! Picture -> one vector a patch: a convolution whose kernel is its stride, as one matrix product.

use anyhow::{Result, ensure};
use tch::Tensor;

/// Rows and columns of patches in a picture.
///
/// # Errors
/// Where a side is not a positive multiple of the patch.
pub(crate) fn grid(height: i64, width: i64, patch_size: i64) -> Result<(i64, i64)> {
    ensure!(
        height > 0 && width > 0 && height % patch_size == 0 && width % patch_size == 0,
        "a picture of {width} x {height} pixels does not divide into patches of {patch_size} x {patch_size}"
    );
    Ok((height / patch_size, width / patch_size))
}

/// `[batch, 3, height, width]` -> `[batch, patches, dim]`, patches row by row; `weight` is `[dim, 3, patch, patch]`.
/// Pixels at the right and the bottom that fill no patch are left out, as a convolution without padding leaves them.
pub(crate) fn patchify(pixel_values: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    let (batch, channels, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
    let patch = weight.size()[3];
    let (rows, columns) = (height / patch, width / patch);
    pixel_values
        .narrow(2, 0, rows * patch)
        .narrow(3, 0, columns * patch)
        .reshape([batch, channels, rows, patch, columns, patch])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([batch, rows * columns, channels * patch * patch])
        .linear(&weight.flatten(1, -1), bias)
}
