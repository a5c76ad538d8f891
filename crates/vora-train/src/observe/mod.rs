//! What a run shows of itself on the way: answers to held-out pictures, block maps, TensorBoard.

pub mod block_maps;
pub(crate) mod board;
pub mod samples;
