//! Steps as a run: the trainer, checkpoints that survive a crash, evaluation, the best so far, and what it will take.

pub(crate) mod batch_shape;
mod best;
pub(crate) mod blocks;
mod dtype;
mod evaluate;
mod max_steps;
pub(crate) mod parameters;
pub(crate) mod plan;
pub(crate) mod progress;
pub(crate) mod ranks;
pub(crate) mod scale;
pub(crate) mod size;
pub mod snapshot;
mod spikes;
pub(crate) mod state;
mod table;
pub(crate) mod trainer;
mod vq;
mod work;
