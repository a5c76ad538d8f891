//! Where a tensor lies in a checkpoint.

use std::ops::Range;

use anyhow::{Context, Result};
use tch::Kind;

/// Where a tensor lies: a file of the checkpoint, and there its bytes, or none where it has to be dequantised.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) file_idx: usize,
    pub(super) range: Option<Range<usize>>,
    pub(super) kind: Kind,
    pub(super) shape: Vec<i64>,
}

/// A shape as libtorch has it: it computes strides even where a dimension is 0.
pub(super) fn dims(shape: &[usize]) -> Result<Vec<i64>> {
    let dims: Option<Vec<i64>> = shape.iter().map(|&dim| i64::try_from(dim).ok()).collect();
    let dims = dims.filter(|dims| dims.iter().try_fold(1i64, |size, &dim| size.checked_mul(dim.max(1))).is_some());
    dims.with_context(|| format!("its shape {shape:?} overflows"))
}
