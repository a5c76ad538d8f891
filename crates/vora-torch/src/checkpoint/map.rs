//! Files in mapped memory, and tensors over them.

use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
#[cfg(target_os = "linux")]
use memmap2::UncheckedAdvice;
use memmap2::{MmapMut, MmapOptions};
use tch::Tensor;

use crate::checkpoint::entry::Entry;
use crate::{error, ffi};

/// The bytes of a mapped file.
#[derive(Debug, Clone)]
pub(super) struct Mapped(pub(super) Arc<MmapMut>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps a file into memory: privately and writable, so that a view which libtorch writes to by mistake never changes
/// the file.
pub(super) fn map(path: &Path) -> Result<Arc<MmapMut>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    // SAFETY: a private mapping; another process that truncates the file while we read it would end this one
    // with SIGBUS, as it would any program that maps its weights.
    let map = unsafe { MmapOptions::new().map_copy(&file) }
        .with_context(|| format!("cannot map {} into memory", path.display()))?;
    Ok(Arc::new(map))
}

/// A tensor over the bytes of a map, which lives as long as it does.
pub(super) fn view(map: &Arc<MmapMut>, range: Range<usize>, entry: &Entry) -> Result<Tensor> {
    let bytes = &map[range];
    if bytes.is_empty() || !(bytes.as_ptr() as usize).is_multiple_of(entry.kind.elt_size_in_bytes()) {
        // Nothing to view, or a file whose header is not padded: copied.
        return Tensor::f_from_data_size(bytes, &entry.shape, entry.kind).map_err(error::clean);
    }
    let owner = Arc::into_raw(Arc::clone(map)).cast_mut().cast::<c_void>();
    // SAFETY: the range lies inside the map, is aligned for its dtype, and the map lives until `release`.
    let tensor = ffi::tensor(unsafe {
        ffi::vora_from_blob(
            bytes.as_ptr().cast_mut().cast(),
            entry.shape.as_ptr(),
            entry.shape.len(),
            ffi::scalar_type(entry.kind),
            owner,
            release,
        )
    });
    if tensor.is_err() {
        release(owner);
    }
    tensor
}

/// Gives back the memory that these bytes were read into, where the system knows how. Nothing writes to a map, so that they
/// can only be read from the file again.
pub(super) fn forget(map: &MmapMut, range: Range<usize>) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: pages that nobody wrote to hold the same bytes after it.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        drop(advised); // else they stay
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (map, range);
}

/// Drops the reference that a view held on its map.
extern "C" fn release(owner: *mut c_void) {
    // SAFETY: `owner` came from `Arc::into_raw` of this type, once per view.
    drop(unsafe { Arc::from_raw(owner.cast_const().cast::<MmapMut>()) });
}
