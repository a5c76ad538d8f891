//! The input of a vision transformer's first block: tokens that are no patch, then patches with their positions.

use std::cell::RefCell;

use tch::{Tensor, nn::Module};

use crate::transformer::norm::Norm;
use crate::transformer::patchify::patchify;
use crate::transformer::positions::Positions;

/// `[prefix | norm(patchify(pixels)) + positions]`
#[derive(Debug)]
pub(crate) struct Embeddings {
    weight: Tensor,         // [hidden, 3, patch, patch]
    bias: Option<Tensor>,   // [hidden]
    norm: Option<Norm>,     // of the patches alone
    prefix: Option<Tensor>, // [1, prefix, hidden]: the class token with its position, then registers
    positions: Positions,
    last: RefCell<Option<(i64, i64, Tensor)>>, // the positions of the last grid
}

impl Embeddings {
    /// `weight` is `[hidden, 3, patch, patch]`, `bias` `[hidden]`.
    pub(crate) fn new(weight: Tensor, bias: Option<Tensor>, positions: Positions) -> Self {
        Self { weight, bias, norm: None, prefix: None, positions, last: RefCell::new(None) }
    }

    /// The same with a norm between the convolution and the positions.
    pub(crate) fn with_norm(self, norm: Norm) -> Self {
        Self { norm: Some(norm), ..self }
    }

    /// The same with tokens `[1, prefix, hidden]` before the patches, which have their positions already.
    pub(crate) fn with_prefix(self, prefix: Tensor) -> Self {
        Self { prefix: Some(prefix), ..self }
    }

    /// `[hidden, 3, patch, patch]`
    pub(crate) fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[hidden]`
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Tokens before the patches.
    pub(crate) fn num_prefix_tokens(&self) -> i64 {
        self.prefix.as_ref().map_or(0, |prefix| prefix.size()[1])
    }

    /// `[rows * columns, hidden]`, kept until another grid is asked for
    pub(crate) fn positions(&self, rows: i64, columns: i64) -> Tensor {
        if let Some((r, c, positions)) = &*self.last.borrow()
            && (*r, *c) == (rows, columns)
        {
            return positions.shallow_clone();
        }
        let positions = self.positions.at(rows, columns);
        *self.last.borrow_mut() = Some((rows, columns, positions.shallow_clone()));
        positions
    }
}

impl Module for Embeddings {
    /// `[batch, 3, height, width]` -> `[batch, prefix + patches, hidden]`
    fn forward(&self, pixel_values: &Tensor) -> Tensor {
        let (batch, _, height, width) = pixel_values.size4().expect("pixel_values is [batch, 3, height, width]");
        let patch = self.weight.size()[3];
        let mut patches = patchify(&pixel_values.to_kind(self.weight.kind()), &self.weight, self.bias.as_ref());
        if let Some(norm) = &self.norm {
            patches = norm.forward(&patches);
        }
        let patches = patches + self.positions(height / patch, width / patch); // [batch, patches, hidden]
        match &self.prefix {
            Some(prefix) => Tensor::cat(&[prefix.expand([batch, -1, -1], false), patches], 1),
            None => patches,
        }
    }
}
