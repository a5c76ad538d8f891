//! The C++ side of a group, which the thread that watches can end.

use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::ffi::dist;

/// The C++ side, shared with the thread that watches.
#[derive(Debug)]
pub(super) struct Handle {
    pub(super) group: *mut c_void,
    collectives: AtomicU64, // begun
    step: AtomicU64,
    is_over: AtomicBool,
    reason: Mutex<Option<String>>,
}

// SAFETY: the group's waits are locked on the C++ side; the rest are atomics.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// Of a group that `vora_group_new` made.
    pub(super) fn new(group: *mut c_void) -> Self {
        let (collectives, step, is_over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self { group, collectives, step, is_over, reason: Mutex::new(None) }
    }

    /// Ends whatever is waited for, now and later.
    pub(super) fn abort(&self, reason: &str) {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| reason.to_owned());
        self.is_over.store(true, Ordering::Relaxed);
        if let Ok(reason) = CString::new(reason.replace('\0', " ")) {
            // SAFETY: a live group and a string.
            unsafe { dist::vora_group_abort(self.group, reason.as_ptr()) };
        }
    }

    /// For how long the oldest collective has been waited for.
    pub(super) fn waiting(&self) -> Duration {
        // SAFETY: a live group.
        Duration::from_secs_f64(unsafe { dist::vora_group_waiting(self.group) }.max(0.0))
    }

    /// Whether NCCL has found its connections broken.
    pub(super) fn is_broken(&self) -> bool {
        // SAFETY: a live group.
        unsafe { dist::vora_group_is_broken(self.group) == 1 }
    }

    /// Collectives begun, and the step of the run.
    pub(super) fn progress(&self) -> (u64, u64) {
        (self.collectives.load(Ordering::Relaxed), self.step.load(Ordering::Relaxed))
    }

    /// Whether it was ended.
    pub(super) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Notes that another collective begins.
    pub(super) fn count_collective(&self) {
        self.collectives.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes the step of the run.
    pub(super) fn note_step(&self, step: u64) {
        self.step.store(step, Ordering::Relaxed);
    }

    /// Why it is over, where it is.
    pub(super) fn reason(&self) -> Option<String> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `vora_group_new`, freed once: the watch has ended.
        unsafe { dist::vora_group_free(self.group) };
    }
}
