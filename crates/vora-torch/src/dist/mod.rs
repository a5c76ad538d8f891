//! Processes that train together, over libtorch's c10d: rendezvous from the environment that `torchrun` sets, collectives
//! over Gloo, gradients through c10d's Reducer, frozen weights in shares. A process that dies, freezes or fails ends the others
//! within half a minute, and they say which it was.

mod gradients;
mod group;
mod handle;
mod shards;
mod store;
mod watch;
mod world;

pub use gradients::Gradients;
pub use group::{Op, ProcessGroup, Traffic};
pub use shards::{ShardedWeight, Shards};
pub use world::World;
