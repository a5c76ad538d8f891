//! Processes that train together, over libtorch's c10d: rendezvous from the environment that `torchrun` sets, collectives
//! over Gloo and NCCL, gradients through c10d's Reducer, frozen weights in shares. A process that dies, freezes or fails ends the others
//! within half a minute, and they say which it was.

mod gradients;
mod group;
mod handle;
mod meeting;
mod nccl;
mod shards;
mod store;
mod watch;
mod world;

pub use gradients::{BUCKET_BYTES, Gradients};
pub use group::{Op, ProcessGroup, Traffic};
pub use nccl::Nccl;
pub use shards::{ShardedWeight, Shards};
pub use world::World;
