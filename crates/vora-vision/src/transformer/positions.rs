//! The positions of patches: a learned table, resampled for other grids than its own, or sines and cosines.

use tch::{Device, Kind, Tensor};

/// Where the positions of a grid come from.
#[derive(Debug)]
pub(crate) enum Positions {
    /// A table whose last two dimensions are `[before + side * side, dim]`, the rows of tokens before the patches among
    /// them, and how positions between the learned ones are found.
    Learned { table: Tensor, before: i64, interpolation: Interpolation },
    /// Computed for any grid; see [`sin_cos`].
    SinCos { dim: i64, kind: Kind, device: Device },
}

impl Positions {
    /// `[rows * columns, dim]`, row by row
    pub(crate) fn at(&self, rows: i64, columns: i64) -> Tensor {
        match self {
            Self::Learned { table, before, interpolation } => {
                let table = flat(table);
                let table = table.narrow(0, *before, table.size()[0] - before);
                interpolate(&table, rows, columns, *interpolation)
            }
            Self::SinCos { dim, kind, device } => sin_cos(rows, columns, *dim).to_kind(*kind).to_device(*device),
        }
    }

    /// `[1, before, dim]`: the positions of tokens before the patches; none where those have none.
    pub(super) fn before(&self) -> Option<Tensor> {
        match self {
            Self::Learned { table, before, .. } if *before > 0 => Some(flat(table).narrow(0, 0, *before).unsqueeze(0)),
            _ => None,
        }
    }

    /// Whether they are trained.
    pub(super) fn learn(&self) -> bool {
        matches!(self, Self::Learned { table, .. } if table.requires_grad())
    }
}

/// `[.., positions, dim]` -> `[positions, dim]`. A table that learns is turned anew in each pass, so that the gradient
/// finds it.
fn flat(table: &Tensor) -> Tensor {
    table.view([-1, table.size()[table.dim() - 1]])
}

/// How positions between the learned ones are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interpolation {
    /// As DINOv2 does, and with it most.
    Bicubic,
    /// Widened where the new grid is coarser, as DINOv2 with registers does.
    BicubicAntialias,
    /// As the published VoRA code does for grids larger than its own.
    Bilinear,
    /// Widened where the new grid is coarser, as SigLIP 2 does.
    BilinearAntialias,
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
        Interpolation::BilinearAntialias => grid.internal_upsample_bilinear2d_aa(size, false, None, None),
    }; // [1, dim, rows, columns]
    grid.permute([0, 2, 3, 1]).reshape([rows * columns, dim]).to_kind(table.kind())
}

/// `[rows * columns, dim]` in f64: for column x and row y, `[sin xw | cos xw | sin yw | cos yw]` over the frequencies
/// `w = 10000^(-4 i / dim)`, as AIMv2 has them (`build_2d_sinusoidal_position_embedding`, its halves exchanged).
fn sin_cos(rows: i64, columns: i64, dim: i64) -> Tensor {
    let options = (Kind::Double, Device::Cpu);
    let quarter = dim / 4;
    let frequencies = (Tensor::arange(quarter, options) * (-(10_000f64.ln()) / quarter as f64)).exp(); // [quarter]
    let angles = |places: Tensor| places.flatten(0, -1).outer(&frequencies); // [rows * columns, quarter]
    let x = angles(Tensor::arange(columns, options).view([1, -1]).repeat([rows, 1]));
    let y = angles(Tensor::arange(rows, options).view([-1, 1]).repeat([1, columns]));
    Tensor::cat(&[x.sin(), x.cos(), y.sin(), y.cos()], 1)
}
