//! Gradients summed over all processes, while the backward pass goes on.

use std::ffi::c_void;
use std::sync::Arc;

use anyhow::Result;
use tch::Tensor;

use super::group::ProcessGroup;
use crate::ffi::{self, dist};

/// Bytes of gradients that go over the network together: DDP's `bucket_cap_mb` of 25.
pub const BUCKET_BYTES: u64 = 25 << 20;

/// The gradients of some parameters, through c10d's Reducer: those of one backward pass, and what passes before it left,
/// are summed over all processes in buckets, each as soon as it is whole.
///
/// A parameter that the pass does not reach takes part with what it has. One that gets its gradient in two parts, from two
/// backward passes after [`Self::sync_next`], is an error.
#[derive(Debug)]
pub struct Gradients {
    reducer: *mut c_void,
    group: Arc<ProcessGroup>,
}

// SAFETY: the Reducer locks around what its hooks do, and nothing else of it is called from two threads.
unsafe impl Send for Gradients {}

impl Gradients {
    /// Of `parameters`, f32 leaves, the same in the same order in every process, whose gradients are views into the buckets
    /// from now on; those of the last ones go first. Their gradients are to be undefined or 0.
    ///
    /// # Errors
    /// Where the processes' parameters differ, and where one of the processes is gone.
    pub fn new(group: &Arc<ProcessGroup>, parameters: &[Tensor]) -> Result<Self> {
        let pointers = ffi::pointers(parameters);
        let made = || {
            // SAFETY: a live group and a list of live tensors.
            let reducer = unsafe {
                dist::vora_gradients_new(group.as_ptr(), pointers.as_ptr(), pointers.len(), BUCKET_BYTES as i64)
            };
            if reducer.is_null() { Err(ffi::last_error()) } else { Ok(reducer) }
        };
        Ok(Self { reducer: group.explained(made())?, group: Arc::clone(group) })
    }

    /// The next backward pass ends with sums. Passes without it before them only add to what this process has.
    ///
    /// # Errors
    /// Where the pass before was not [finished](Self::finish).
    pub fn sync_next(&self) -> Result<()> {
        self.group.count_collective();
        // SAFETY: a live reducer.
        let armed = ffi::check(unsafe { dist::vora_gradients_arm(self.reducer) });
        self.group.explained(armed)
    }

    /// Waits for what is left of the sums, after the pass.
    ///
    /// # Errors
    /// Where one of the processes is gone.
    pub fn finish(&self) -> Result<()> {
        // SAFETY: a live reducer.
        self.group.timed(|| ffi::check(unsafe { dist::vora_gradients_finish(self.reducer) }))
    }
}

impl Drop for Gradients {
    fn drop(&mut self) {
        if !self.group.is_over() {
            // SAFETY: made by `vora_gradients_new`, freed once.
            unsafe { dist::vora_gradients_free(self.reducer) };
        }
    }
}
