//! One block of a vision transformer: attention and a feed-forward layer, each after a norm and with a residual connection.

use tch::{Tensor, nn::Module};

use crate::transformer::attention::Attention;
use crate::transformer::linear::Linear;
use crate::transformer::mlp::Mlp;
use crate::transformer::norm::Norm;

/// `h = x + scale1 * attention(norm1(x))`, `y = h + scale2 * mlp(norm2(h))`
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) norm1: Norm,
    pub(crate) attention: Attention,
    pub(crate) scale1: Option<Tensor>, // [hidden]; none: 1
    pub(crate) norm2: Norm,
    pub(crate) mlp: Mlp,
    pub(crate) scale2: Option<Tensor>, // [hidden]; none: 1
}

impl Block {
    /// Its linears, each of which is one layer of Hugging Face's class.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attention.linears().chain(self.mlp.linears())
    }

    /// The same, to change them.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.attention.linears_mut().chain(self.mlp.linears_mut())
    }
}

impl Module for Block {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let h = add(x, self.attention.forward(&self.norm1.forward(x)), self.scale1.as_ref());
        add(&h, self.mlp.forward(&self.norm2.forward(&h)), self.scale2.as_ref())
    }
}

fn add(x: &Tensor, y: Tensor, scale: Option<&Tensor>) -> Tensor {
    match scale {
        Some(scale) => x.addcmul(&y, &scale.to_kind(x.kind())),
        None => y + x,
    }
}
