//! What vision transformers of every family are made of, and the whole of one.

mod activation;
mod attention;
mod block;
mod embeddings;
mod linear;
mod mlp;
mod norm;
mod patchify;
mod positions;
mod vision_transformer;

pub(crate) use activation::Activation;
pub(crate) use attention::{Attention, Projections};
pub(crate) use block::Block;
pub(crate) use embeddings::{Embeddings, Layout};
pub(crate) use linear::Linear;
pub(crate) use mlp::{Gates, Mlp};
pub(crate) use norm::Norm;
pub(crate) use patchify::{grid, patchify};
pub(crate) use positions::{Interpolation, Positions, interpolate};
pub use vision_transformer::{Patchifier, VisionTransformer};
