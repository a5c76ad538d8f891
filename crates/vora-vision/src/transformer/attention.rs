//! Multi-head attention of a vision transformer, from every token to every token.

use tch::{Tensor, nn::Module};

use vora_torch::nn::attention::{Bands, attention, has_attention};

use crate::transformer::linear::Linear;

/// `output(softmax(q k^T / sqrt(head_dim)) v)`, head by head (Vaswani et al. 2017).
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) projections: Projections,
    pub(crate) output: Linear,
    pub(crate) num_heads: i64,
}

/// Query, key and value in three layers or in one.
#[derive(Debug)]
pub(crate) enum Projections {
    Apart(Box<[Linear; 3]>),
    Together(Linear),
}

impl Attention {
    /// Its linears, but for one that is three.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let projections = match &self.projections {
            Projections::Apart(layers) => layers.as_slice(),
            Projections::Together(_) => &[],
        };
        projections.iter().chain([&self.output])
    }

    /// The same, to change them.
    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let projections = match &mut self.projections {
            Projections::Apart(layers) => layers.as_mut_slice(),
            Projections::Together(_) => &mut [],
        };
        projections.iter_mut().chain([&mut self.output])
    }
}

impl Module for Attention {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, tokens, hidden) = x.size3().expect("x is [batch, tokens, hidden]");
        let heads = |x: Tensor| x.view([batch, tokens, self.num_heads, -1]).transpose(1, 2);
        let [q, k, v] = match &self.projections {
            Projections::Apart(layers) => layers.each_ref().map(|layer| heads(layer.forward(x))),
            Projections::Together(layer) => {
                let all = layer.forward(x); // [batch, tokens, 3 * hidden]
                [0, 1, 2].map(|i| heads(all.narrow(2, i * hidden, hidden)))
            }
        }; // [batch, heads, tokens, head_dim]
        let mixed = if has_attention(q.device(), q.kind()) {
            attention(&q, &k, &v, &Bands::all(batch, tokens))
        } else {
            Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false)
        };
        self.output.forward(&mixed.transpose(1, 2).reshape([batch, tokens, hidden]))
    }
}
