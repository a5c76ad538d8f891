//! A file on its way from the hub: what came so far, the hash of it, and the check at its end.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
};

use anyhow::{Context, Result, bail};
use sha1::Sha1;
use sha2::{Digest, Sha256};

use crate::Progress;

/// What the hub says about one file.
#[derive(Debug)]
pub(crate) struct FileInfo {
    pub(crate) etag: String, // sha256, or git's sha1 of a small file; names the blob in the cache
    pub(crate) size: u64,
}

/// A file that is being filled, with the hash of what it has so far.
pub(crate) struct Partial<'a> {
    path: &'a Path,
    file: File,
    hash: Hash,
    pub(crate) len: u64,
    progress: &'a mut dyn Progress,
}

impl<'a> Partial<'a> {
    /// Opens the file at `path` and takes up what an earlier try left in it.
    pub(crate) fn open(path: &'a Path, info: &FileInfo, progress: &'a mut dyn Progress) -> Result<Self> {
        let opened = path
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .and_then(|()| File::options().create(true).truncate(false).read(true).write(true).open(path));
        let file = opened.with_context(|| format!("cannot open {}", path.display()))?;
        let mut partial = Self { path, file, hash: Hash::new(info), len: 0, progress };
        let mut buffer = vec![0; 1 << 16];
        loop {
            let count = partial.file.read(&mut buffer).with_context(|| format!("reading {}", path.display()))?;
            if count == 0 {
                break;
            }
            partial.hash.update(&buffer[..count]);
            partial.len += count as u64;
        }
        if partial.len > info.size {
            partial.hash = Hash::new(info);
            partial.restart()?;
        }
        partial.progress.advance(partial.len);
        Ok(partial)
    }

    /// Empties the file: what comes next is its beginning.
    pub(crate) fn restart(&mut self) -> Result<()> {
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.with_context(|| format!("cannot empty {}", self.path.display()))?;
        self.hash.reset();
        self.len = 0;
        Ok(())
    }

    /// Adds what came.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).with_context(|| format!("writing {}", self.path.display()))?;
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        self.progress.advance(self.len);
        Ok(())
    }

    /// Checks the whole file; one with a wrong hash is deleted.
    pub(crate) fn finish(self, info: &FileInfo) -> Result<()> {
        self.progress.end();
        let found = self.hash.finish();
        if self.len != info.size || found != info.etag {
            fs::remove_file(self.path).with_context(|| format!("cannot delete {}", self.path.display()))?;
            bail!(
                "its {} bytes have the hash {found}, the hub says {} bytes with {}; they were deleted, try again",
                self.len,
                info.size,
                info.etag
            );
        }
        self.file.sync_all().with_context(|| format!("writing {}", self.path.display()))
    }
}

/// The hash that an etag states: sha256 of the bytes, or git's sha1, which hashes a header with the size first.
enum Hash {
    Sha256(Sha256),
    Git { sha1: Sha1, size: u64 },
}

impl Hash {
    fn new(info: &FileInfo) -> Self {
        let mut hash = match info.etag.len() {
            64 => Self::Sha256(Sha256::new()),
            _ => Self::Git { sha1: Sha1::new(), size: info.size },
        };
        hash.reset();
        hash
    }

    fn reset(&mut self) {
        match self {
            Self::Sha256(hash) => Digest::reset(hash),
            Self::Git { sha1, size } => *sha1 = Sha1::new_with_prefix(format!("blob {size}\0")),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Git { sha1, .. } => sha1.update(bytes),
        }
    }

    fn finish(self) -> String {
        match self {
            Self::Sha256(hash) => format!("{:x}", hash.finalize()),
            Self::Git { sha1, .. } => format!("{:x}", sha1.finalize()),
        }
    }
}
