//! What vision transformers of every family are made of, and the whole of one.

mod activation;
mod attention;
mod block;
mod embeddings;
mod mlp;
mod norm;
mod patchify;
mod positions;
mod vision_transformer;

pub(crate) use activation::Activation;
pub(crate) use attention::Attention;
pub(crate) use block::Block;
pub(crate) use embeddings::Embeddings;
pub(crate) use mlp::Mlp;
pub(crate) use norm::Norm;
pub(crate) use patchify::{grid, patchify};
pub(crate) use positions::{Interpolation, Positions, interpolate};
pub use vision_transformer::{Patchifier, VisionTransformer};
