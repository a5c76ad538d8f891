//! Frozen weights of which each process keeps a share: a block gathers its own for as long as it computes with them, as
//! ZeRO's third stage does (Rajbhandari et al. 2020).

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::group::ProcessGroup;

/// The processes among which weights are shared out. Whoever gathers one gathers it together with all others: as long as
/// all make the same passes through the model, each in its own time, nothing more is needed. Where one makes passes that
/// others do not, it says so: [`Self::part`], [`Self::meet`].
#[derive(Debug)]
pub struct Shards {
    group: Arc<ProcessGroup>,
    are_apart: AtomicBool,
}

impl Shards {
    /// Among the processes of this group.
    pub fn new(group: &Arc<ProcessGroup>) -> Arc<Self> {
        Arc::new(Self { group: Arc::clone(group), are_apart: AtomicBool::new(false) })
    }

    /// How many shares there are.
    pub fn world_size(&self) -> usize {
        self.group.world_size()
    }

    /// From here on processes may make passes that others do not make, forward alone. All call it, and [`Self::meet`]
    /// where they are through.
    pub fn part(&self) {
        self.are_apart.store(true, Ordering::Relaxed);
    }

    /// A pass through all blocks, first to last, begins.
    pub fn begin_pass(&self) {
        if self.are_apart.load(Ordering::Relaxed) {
            // Where a process is gone the weights that are gathered next are zeros, and the next collective tells.
            let _ = self.group.any(true);
        }
    }

    /// Waits for the others after [`Self::part`]: as long as one of them still makes a pass, `gather` brings together what it
    /// needs, block for block.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn meet(&self, gather: impl Fn()) -> Result<()> {
        while self.group.any(false)? {
            gather();
        }
        self.are_apart.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Weights of which each process brings its share, whole.
    fn gathered(&self, weights: &[&ShardedWeight]) -> Vec<Tensor> {
        let shares: Vec<Tensor> = weights.iter().map(|weight| weight.share.shallow_clone()).collect();
        tch::no_grad(|| match self.group.all_gather_each(&shares) {
            Ok(all) => weights.iter().zip(all).map(|(weight, shares)| weight.of_shares(&shares)).collect(),
            Err(error) => {
                self.group.fail(&error);
                weights.iter().map(|weight| Tensor::zeros(weight.size, (weight.kind(), weight.device()))).collect()
            }
        })
    }
}

/// A frozen weight `[out, in]`, of which this process keeps a share in memory of its own.
#[derive(Debug)]
pub struct ShardedWeight {
    share: Tensor, // [elements / processes, rounded up], zeros after the last element
    size: [i64; 2],
    whole: RefCell<Option<Tensor>>, // [out, in], while a block computes
    shards: Arc<Shards>,
}

impl ShardedWeight {
    /// Copies this process's share of `weight`, `[out, in]`.
    pub fn new(weight: &Tensor, shards: &Arc<Shards>) -> Self {
        let (rank, world_size) = (shards.group.rank() as i64, shards.world_size() as i64);
        let (out_features, in_features) = weight.size2().expect("W is [out, in]");
        let share = tch::no_grad(|| share(weight, rank, world_size));
        Self { share, size: [out_features, in_features], whole: RefCell::default(), shards: Arc::clone(shards) }
    }

    /// `[out, in]`
    pub fn size(&self) -> [i64; 2] {
        self.size
    }

    /// The dtype.
    pub fn kind(&self) -> Kind {
        self.share.kind()
    }

    /// Where it is.
    pub fn device(&self) -> Device {
        self.share.device()
    }

    /// Bytes of the share.
    pub fn num_bytes(&self) -> u64 {
        (self.share.numel() * self.kind().elt_size_in_bytes()) as u64
    }

    /// Brings these weights together, which all processes do at once, side by side, and keeps them until [`Self::release`].
    pub fn gather_all<'a>(weights: impl Iterator<Item = &'a Self>) {
        let weights: Vec<&Self> = weights.collect();
        let Some(first) = weights.first() else { return };
        for (weight, whole) in weights.iter().zip(first.shards.gathered(&weights)) {
            *weight.whole.borrow_mut() = Some(whole);
        }
    }

    /// `[processes, elements of a share]` -> `[out, in]`
    fn of_shares(&self, shares: &Tensor) -> Tensor {
        shares.flatten(0, -1).narrow(0, 0, self.size[0] * self.size[1]).view(self.size)
    }

    /// Lets go of the gathered weight; a graph that needs it for its backward pass has its own hold on it.
    pub fn release(&self) {
        *self.whole.borrow_mut() = None;
    }

    /// The weight, `[out, in]`: as it was gathered, or gathered for this once. Where a process is gone it is zeros: the group
    /// is over then, and whatever collective comes next tells why.
    pub fn whole(&self) -> Tensor {
        let whole = self.whole.borrow().as_ref().map(Tensor::shallow_clone);
        whole.unwrap_or_else(|| self.shards.gathered(&[self]).swap_remove(0))
    }
}

/// A copy of the part of `weight` that falls to `rank`, with zeros where that ends beyond it.
fn share(weight: &Tensor, rank: i64, world_size: i64) -> Tensor {
    let elements = weight.numel() as i64;
    let len = (elements + world_size - 1) / world_size;
    let start = (rank * len).min(elements);
    let own = len.min(elements - start);
    let share = Tensor::zeros([len], (weight.kind(), weight.device()));
    share.narrow(0, 0, own).copy_(&weight.contiguous().view(-1).narrow(0, start, own));
    share
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_equal_in_length_and_make_the_whole() {
        let weight = fixtures::Random::new(1).normal([3, 5]);
        for world_size in [1, 2, 4, 7, 16] {
            let shares: Vec<Tensor> = (0..world_size).map(|rank| share(&weight, rank, world_size)).collect();
            assert!(shares.iter().all(|share| share.size() == shares[0].size()));
            let all = Tensor::cat(&shares, 0);
            assert!(all.narrow(0, 0, 15).view([3, 5]).equal(&weight), "{world_size}");
            assert_eq!(all.narrow(0, 15, all.size()[0] - 15).abs().sum(Kind::Float).double_value(&[]), 0.0);
            assert_ne!(shares[0].data_ptr(), weight.data_ptr());
        }
    }
}
