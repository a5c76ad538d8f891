//! `DecoderShape`: what is the same for all layers.

/// Sizes and constants of a [`Decoder`](super::Decoder).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DecoderShape {
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width inside the MLP.
    pub intermediate_size: i64,
    /// Query heads.
    pub num_heads: i64,
    /// Key and value heads.
    pub num_kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// The same in the norms of heads.
    pub head_norm_eps: f64,
    /// What `q k^T` is multiplied with.
    pub scale: f64,
    /// Whether norms come after attention and MLP, not before.
    pub norms_after: bool,
}
