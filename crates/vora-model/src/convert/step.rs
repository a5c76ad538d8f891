//! One tensor of a conversion: what it comes from, and what becomes of it.

use tch::{Kind, Tensor};
use vora_torch::checkpoint::TensorInfo;

use super::report::{Change, TensorReport};
use super::source::Part;
use crate::files::dtype;

/// One tensor to write, or to drop.
#[derive(Debug)]
pub(super) struct Step {
    /// What it comes from: one tensor, or a weight and the parts of its adapter.
    pub(super) from: Vec<Part>,
    pub(super) to: Option<String>,
    pub(super) change: Change,
    pub(super) why: Option<&'static str>,
    pub(super) stored_kind: Kind,
    pub(super) kind: Kind,
    pub(super) shape: Vec<i64>,
    pub(super) scaling: f64, // what it is multiplied with
}

impl Step {
    /// What its file says of it; none where it is dropped.
    pub(super) fn info(&self) -> Option<TensorInfo> {
        self.to.as_ref().map(|name| TensorInfo { name: name.clone(), kind: self.kind, shape: self.shape.clone() })
    }

    pub(super) fn report(&self) -> TensorReport {
        TensorReport {
            from: self.from.iter().map(|part| part.stored.clone()).collect(),
            to: self.to.clone(),
            change: self.change,
            why: self.why,
            stored_dtype: dtype(self.stored_kind),
            dtype: dtype(self.kind),
            shape: self.shape.clone(),
        }
    }

    /// A tensor that is read, and not written.
    pub(super) fn dropped(part: Part, why: &'static str, kind: Kind, shape: Vec<i64>) -> Self {
        let (from, change) = (vec![part], Change::Dropped);
        Self { from, to: None, change, why: Some(why), stored_kind: kind, kind, shape, scaling: 1.0 }
    }

    /// A new tensor of zeros.
    pub(super) fn zeros(name: String, kind: Kind, shape: Vec<i64>) -> Self {
        let change = Change::Made;
        Self { from: Vec::new(), to: Some(name), change, why: None, stored_kind: kind, kind, shape, scaling: 1.0 }
    }

    /// Multiplies it, and makes it `len` long in one of its dimensions.
    pub(super) fn fit(&mut self, scaling: f64, dim: usize, len: i64) {
        if scaling != 1.0 || self.shape[dim] != len {
            (self.scaling, self.shape[dim], self.change) = (scaling, len, Change::Made);
        }
    }

    /// What was read, multiplied and filled up with zeros.
    pub(super) fn fitted(&self, tensor: Tensor) -> Tensor {
        let tensor = if self.scaling == 1.0 { tensor } else { (tensor * self.scaling).to_kind(self.kind) };
        let size = tensor.size();
        if size == self.shape {
            return tensor;
        }
        // From the last dimension to the first: nothing before it, the rest after it.
        let padding = size.iter().zip(&self.shape).rev().flat_map(|(from, to)| [0, to - from]);
        tensor.constant_pad_nd(padding.collect::<Vec<_>>())
    }
}
