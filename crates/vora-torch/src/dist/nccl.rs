//! NCCL, by which GPUs send each other tensors without the host: a library of its own, opened where there is a GPU.

use std::ffi::{CStr, CString, c_void};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::runtime;

/// The library's file, which `cargo xtask setup --cuda` builds from `csrc/dist/nccl.cpp`.
const LIBRARY: &str = "libvora_nccl.so";

/// What it exports, declared in `csrc/dist/nccl.h`.
const ATTACH: &CStr = c"vora_nccl_attach";

/// The opened library, for [`ProcessGroup::attach`](super::ProcessGroup::attach). It stays open as long as the process lives.
#[derive(Debug)]
pub struct Nccl {
    pub(super) attach: *mut c_void, // the function of that name
}

// SAFETY: a function of a library that is never closed.
unsafe impl Send for Nccl {}
// SAFETY: as above.
unsafe impl Sync for Nccl {}

impl Nccl {
    /// Opens `libvora_nccl.so`: beside the `libtorch_cpu.so` that is loaded (where the loader found it, then where its links
    /// lead), or beside the program.
    ///
    /// # Errors
    /// Names the folders where it is not, and says why one that is there does not open: it is another libtorch's, or CUDA's
    /// libraries are missing.
    pub fn open() -> Result<Self> {
        runtime::init();
        let folders = folders();
        let library = folders.iter().map(|folder| folder.join(LIBRARY)).find(|path| path.exists());
        let library = library.with_context(|| {
            let folders = folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(", ");
            format!("{LIBRARY} is not in {folders}; `cargo xtask setup --cuda` builds it")
        })?;
        open(&library).with_context(|| format!("cannot open {}", library.display()))
    }
}

#[cfg(target_os = "linux")]
fn folders() -> Vec<PathBuf> {
    let libtorch = runtime::loaded_libtorch();
    let linked = libtorch.as_ref().and_then(|path| path.canonicalize().ok());
    let files = [libtorch, linked, std::env::current_exe().ok()];
    let mut folders: Vec<PathBuf> = files.into_iter().flatten().map(|file| file.with_file_name("")).collect();
    folders.dedup();
    folders
}

#[cfg(not(target_os = "linux"))]
fn folders() -> Vec<PathBuf> {
    Vec::new()
}

#[cfg(unix)]
fn open(library: &Path) -> Result<Nccl> {
    let path = CString::new(library.as_os_str().as_encoded_bytes())?;
    // SAFETY: a path; what the library does as it is loaded is C++'s own beginning.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if handle.is_null() {
        // SAFETY: dlopen failed, so there is a text, which lives until the next call of dl*.
        let said = unsafe { CStr::from_ptr(libc::dlerror()) }.to_string_lossy().into_owned();
        bail!("{said}; it has to be of the same libtorch as the program, with CUDA's libraries beside that");
    }
    // SAFETY: an open library and a name.
    let attach = unsafe { libc::dlsym(handle, ATTACH.as_ptr()) };
    ensure!(!attach.is_null(), "it is of another version; `cargo xtask setup --cuda` builds it anew");
    Ok(Nccl { attach })
}

#[cfg(not(unix))]
fn open(_: &Path) -> Result<Nccl> {
    bail!("NCCL is for Linux")
}
