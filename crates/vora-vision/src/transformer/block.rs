//! One block of a vision transformer: attention and a feed-forward layer, each after a norm and with a residual connection.

use tch::{Tensor, nn::Module};

use crate::transformer::attention::Attention;
use crate::transformer::norm::Norm;

use crate::transformer::mlp::Mlp;

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

impl Module for Block {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let h = add(x, self.attention.forward(&self.norm1.forward(x)), self.scale1.as_ref());
        add(&h, self.mlp.forward(&self.norm2.forward(&h)), self.scale2.as_ref())
    }
}

fn add(x: &Tensor, y: Tensor, scale: Option<&Tensor>) -> Tensor {
    match scale {
        Some(scale) => x.addcmul(&y, scale),
        None => y + x,
    }
}
