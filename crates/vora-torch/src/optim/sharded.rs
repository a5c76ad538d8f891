//! What processes with a share each of an optimizer's state tell each other.

use anyhow::Result;
use tch::Tensor;

use super::optimizer::Optimizer;
use crate::dist::ProcessGroup;

/// Bytes of weights that are sent together; more only where one tensor has more.
pub const BROADCAST_BYTES: u64 = 64 << 20;

impl Optimizer {
    /// After [`Self::step`]: takes over what the other processes made of their parameters.
    ///
    /// # Errors
    /// Where one of them is gone.
    pub fn gather_parameters(&self, group: &ProcessGroup) -> Result<()> {
        for rank in 0..group.world_size() {
            broadcast(group, &self.owned_by(rank), rank)?;
        }
        Ok(())
    }

    fn owned_by(&self, rank: usize) -> Vec<Tensor> {
        let owned = self.parameters().iter().zip(&self.owners).filter(|(_, owner)| **owner == rank);
        owned.map(|((_, tensor), _)| tensor.detach()).collect()
    }
}

/// Makes `tensors`, f32, those of `root` in every process.
///
/// # Errors
/// Where one of the processes is gone.
pub fn broadcast(group: &ProcessGroup, tensors: &[Tensor], root: usize) -> Result<()> {
    let mut rest = tensors;
    while !rest.is_empty() {
        let (mut len, mut bytes) = (0, 0);
        while len < rest.len() && (len == 0 || bytes + 4 * rest[len].numel() as u64 <= BROADCAST_BYTES) {
            bytes += 4 * rest[len].numel() as u64;
            len += 1;
        }
        let (chunk, after) = rest.split_at(len);
        let flat = Tensor::cat(&chunk.iter().map(|tensor| tensor.flatten(0, -1)).collect::<Vec<_>>(), 0);
        group.broadcast(&flat, root)?;
        if group.rank() != root {
            let sizes: Vec<i64> = chunk.iter().map(|tensor| tensor.numel() as i64).collect();
            for (tensor, part) in chunk.iter().zip(flat.split_with_sizes(sizes.as_slice(), 0)) {
                tch::no_grad(|| tensor.shallow_clone().copy_(&part.view_as(tensor)));
            }
        }
        rest = after;
    }
    Ok(())
}
