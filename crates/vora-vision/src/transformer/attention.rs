//! Multi-head attention of a vision transformer, from every token to every token.

use tch::{Tensor, nn::Module};

use vora_torch::nn::Linear;
use vora_torch::nn::attention::{Bands, attention, has_attention};

/// `output(softmax(q k^T / sqrt(head_dim)) v)`, head by head (Vaswani et al. 2017).
#[derive(Debug)]
pub(crate) struct Attention {
    pub(crate) query: Linear,
    pub(crate) key: Linear,
    pub(crate) value: Linear,
    pub(crate) output: Linear,
    pub(crate) num_heads: i64,
}

impl Module for Attention {
    /// `[batch, tokens, hidden]` -> `[batch, tokens, hidden]`
    fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, tokens, hidden) = x.size3().expect("x is [batch, tokens, hidden]");
        let heads = |linear: &Linear| linear.forward(x).view([batch, tokens, self.num_heads, -1]).transpose(1, 2);
        let [q, k, v] = [&self.query, &self.key, &self.value].map(heads); // [batch, heads, tokens, head_dim]
        let mixed = if has_attention(q.device(), q.kind()) {
            attention(&q, &k, &v, &Bands::all(batch, tokens))
        } else {
            Tensor::scaled_dot_product_attention(&q, &k, &v, None::<&Tensor>, 0.0, false, None, false)
        };
        self.output.forward(&mixed.transpose(1, 2).reshape([batch, tokens, hidden]))
    }
}
