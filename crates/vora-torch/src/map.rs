//! Mapped memory, and tensors over it: files, and what may never be filled.

use std::ffi::c_void;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use anyhow::{Context, Result};
#[cfg(target_os = "linux")]
use memmap2::UncheckedAdvice;
use memmap2::{MmapMut, MmapOptions};
use tch::{Device, Kind, Tensor};

use crate::{error, ffi};

/// Every map that may be alive.
static MAPS: Mutex<Vec<Weak<MmapMut>>> = Mutex::new(Vec::new());

/// The bytes of a mapped file.
#[derive(Debug, Clone)]
pub(crate) struct Mapped(pub(crate) Arc<MmapMut>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Maps a file into memory: privately and writable, so that a view which libtorch writes to by mistake never changes
/// the file.
pub(crate) fn map(path: &Path) -> Result<Arc<MmapMut>> {
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    // SAFETY: a private mapping; another process that truncates the file while we read it would end this one
    // with SIGBUS, as it would any program that maps its weights.
    let map = unsafe { MmapOptions::new().map_copy(&file) }
        .with_context(|| format!("cannot map {} into memory", path.display()))?;
    let map = Arc::new(map);
    let mut maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
    maps.retain(|map| map.strong_count() > 0);
    maps.push(Arc::downgrade(&map));
    Ok(map)
}

/// A tensor over bytes of a map, which lives as long as it does.
pub(crate) fn view(map: &Arc<MmapMut>, range: Range<usize>, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let bytes = &map[range.clone()];
    if bytes.is_empty() || !(bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) {
        // Nothing to view, or a file whose header is not padded: copied.
        return Tensor::f_from_data_size(bytes, shape, kind).map_err(error::clean);
    }
    over(map, range.start, shape, kind)
}

/// A tensor of this shape over a map's memory from a byte on, which is aligned for its dtype; it keeps the map.
fn over(map: &Arc<MmapMut>, start: usize, shape: &[i64], kind: Kind) -> Result<Tensor> {
    let bytes = usize::try_from(shape.iter().product::<i64>())? * kind.elt_size_in_bytes();
    let data = &map[start..start + bytes];
    let owner = Arc::into_raw(Arc::clone(map)).cast_mut().cast::<c_void>();
    // SAFETY: the range lies inside the map, is aligned for its dtype, and the map lives until `release`.
    let tensor = ffi::tensor(unsafe {
        ffi::vora_from_blob(
            data.as_ptr().cast_mut().cast(),
            shape.as_ptr(),
            shape.len(),
            ffi::scalar_type(kind),
            owner,
            release,
        )
    });
    if tensor.is_err() {
        release(owner);
    }
    tensor
}

/// Zeros on the CPU whose memory is taken piece by piece as they are written to, for what may never be filled.
///
/// # Errors
/// Where the system has no room of this size.
pub fn reserved_zeros(shape: &[i64], kind: Kind) -> Result<Tensor> {
    let bytes = usize::try_from(shape.iter().product::<i64>())? * kind.elt_size_in_bytes();
    if bytes == 0 {
        return Tensor::f_zeros(shape, (kind, Device::Cpu)).map_err(error::clean);
    }
    let map = MmapOptions::new().len(bytes).map_anon().with_context(|| format!("no room for {bytes} bytes"))?;
    over(&Arc::new(map), 0, shape, kind)
}

/// Gives back the memory that these bytes were read into, where the system knows how. Nothing writes to a map, so that they
/// can only be read from the file again.
pub(crate) fn forget(map: &MmapMut, range: Range<usize>) {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: pages that nobody wrote to hold the same bytes after it.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        drop(advised); // else they stay
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (map, range);
}

/// Gives back the memory that a tensor's bytes were read into, where it is a view of a file that was opened here; any other
/// tensor is left alone. Its values stay: whoever asks for them has the file read again.
pub fn forget_view(tensor: &Tensor) {
    let start = tensor.data_ptr() as usize;
    let end = start + tensor.numel() * tensor.kind().elt_size_in_bytes();
    let maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
    for map in maps.iter().filter_map(Weak::upgrade) {
        let from = map.as_ptr() as usize;
        if from <= start && end <= from + map.len() && tensor.is_contiguous() {
            forget(&map, start - from..end - from);
        }
    }
}

/// Gives back the memory that every file was read into which was opened here: for a program whose weights are copies by now.
/// Values of views stay, as in [`forget_view`].
pub fn forget_files() {
    let maps = MAPS.lock().unwrap_or_else(PoisonError::into_inner);
    for map in maps.iter().filter_map(Weak::upgrade) {
        forget(&map, 0..map.len());
    }
}

/// Drops the reference that a view held on its map.
extern "C" fn release(owner: *mut c_void) {
    // SAFETY: `owner` came from `Arc::into_raw` of this type, once per view.
    drop(unsafe { Arc::from_raw(owner.cast_const().cast::<MmapMut>()) });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, save};
    #[cfg(target_os = "linux")]
    use crate::runtime::process_size;

    /// What is given back is read again, and what is no view of a file is left alone.
    #[test]
    fn a_view_is_forgotten_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let value = fixtures::Random::new(1).normal([256, 256]);
        save(&path, &[("w".into(), value.shallow_clone())], &[]).unwrap();
        let view = Checkpoint::open(&path).unwrap().tensor("w").unwrap();
        for tensor in [&view, &view.narrow(0, 3, 100), &view.transpose(0, 1), &value] {
            forget_view(tensor);
            assert!(view.equal(&value));
        }
        forget_files();
        assert!(view.equal(&value));
    }

    #[test]
    fn what_is_reserved_is_zeros_that_take_no_memory() {
        #[cfg(target_os = "linux")]
        let before = process_size("RssAnon:").unwrap();
        let zeros = reserved_zeros(&[64, 1 << 20], Kind::Float).unwrap(); // 256 MiB
        #[cfg(target_os = "linux")]
        assert!(process_size("RssAnon:").unwrap() < before + (64 << 20));
        let _ = zeros.get(63).fill_(2.0);
        assert_eq!(zeros.get(63).sum(Kind::Float).double_value(&[]), f64::from(2 << 20));
        assert_eq!(zeros.get(0).abs().max().double_value(&[]), 0.0);
        assert_eq!(reserved_zeros(&[0, 3], Kind::BFloat16).unwrap().size(), [0, 3]);
        assert!(reserved_zeros(&[1 << 40, 1 << 10], Kind::Float).is_err());
    }
}
