//! A table of learned 2-D positions, at another grid than the one it was learned for.

use tch::{Kind, Tensor};

/// How positions between the learned ones are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interpolation {
    /// As DINOv2 does.
    Bicubic,
    /// Widened where the new grid is coarser, as DINOv2 with registers does.
    BicubicAntialias,
    /// As the published VoRA code does for grids larger than its own.
    Bilinear,
}

/// `[side * side, dim]` -> `[rows * columns, dim]`; computed in f32, corners not aligned
pub(crate) fn interpolate(table: &Tensor, rows: i64, columns: i64, how: Interpolation) -> Tensor {
    let (positions, dim) = table.size2().expect("table is [positions, dim]");
    let side = positions.isqrt();
    if (rows, columns) == (side, side) {
        return table.shallow_clone();
    }
    let grid = table.to_kind(Kind::Float).view([1, side, side, dim]).permute([0, 3, 1, 2]);
    let size = [rows, columns];
    let grid = match how {
        Interpolation::Bicubic => grid.upsample_bicubic2d(size, false, None, None),
        Interpolation::BicubicAntialias => grid.internal_upsample_bicubic2d_aa(size, false, None, None),
        Interpolation::Bilinear => grid.upsample_bilinear2d(size, false, None, None),
    }; // [1, dim, rows, columns]
    grid.permute([0, 2, 3, 1]).reshape([rows * columns, dim]).to_kind(table.kind())
}
