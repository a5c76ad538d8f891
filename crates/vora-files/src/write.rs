//! Files and folders that are written whole or not at all.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::error::FilesError;

/// [`write_atomically`] of bytes that are at hand.
///
/// # Errors
/// See [`write_atomically`].
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file| Ok(file.write_all(bytes)?))
}

/// Writes a file so that a crash at any moment leaves either the old one or the new one: written beside its place,
/// synced, renamed, and the folder synced.
///
/// # Errors
/// Names the file, where it cannot be written or `write` fails; the old one is left as it was.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let what = || format!("cannot write {}", path.display());
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".tmp-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)
        .with_context(what)?;
    write(file.as_file_mut()).with_context(what)?;
    file.as_file().sync_all().with_context(what)?;
    file.persist(path).map_err(|e| e.error).with_context(what)?;
    File::open(folder).and_then(|f| f.sync_all()).with_context(what)
}

/// Writes a folder that is there whole or not at all: `write` fills another one beside its place, which is then renamed.
///
/// # Errors
/// Where there is something at `path` already, other than an empty folder.
pub fn write_folder_atomically<T>(path: &Path, write: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    ensure_vacant(path)?;
    let what = || format!("cannot write {}", path.display());
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    fs::create_dir_all(parent).with_context(what)?;
    let folder = tempfile::Builder::new()
        .prefix(".tmp-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir_in(parent)
        .with_context(what)?;
    let written = write(folder.path()).with_context(what)?;
    // An empty folder in its place gives way.
    fs::rename(folder.path(), path).with_context(what)?;
    let _ = folder.keep(); // there is nothing left to remove
    File::open(parent).and_then(|f| f.sync_all()).with_context(what)?;
    Ok(written)
}

/// Checks that a new folder can take the place `path`.
///
/// # Errors
/// [`FilesError::NotEmpty`] where a folder is there that is not empty; where a file is, what the disk says.
pub fn ensure_vacant(path: &Path) -> Result<()> {
    match fs::read_dir(path) {
        Ok(mut entries) => {
            ensure!(entries.next().is_none(), FilesError::NotEmpty(path.to_owned()));
            Ok(())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("{} cannot be a new folder", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_folder_is_written_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("deep/new");
        let write = |folder: &Path| write_bytes(&folder.join("a"), b"1");
        let failing = |folder: &Path| -> Result<()> { write(folder).and_then(|()| bail!("no more")) };
        let error = write_folder_atomically(&path, failing).unwrap_err();
        let error = format!("{error:#}: {}", write_folder_atomically::<()>(&path, |_| bail!("again")).unwrap_err());
        assert!(error.contains("new: no more"), "{error}");
        assert_eq!(fs::read_dir(root.path().join("deep")).unwrap().count(), 0);
        fs::create_dir(&path).unwrap();
        write_folder_atomically(&path, write).unwrap();
        assert_eq!(fs::read(path.join("a")).unwrap(), b"1");
        let error = write_folder_atomically(&path, write).unwrap_err();
        assert!(error.to_string().contains("deep/new is not empty: choose another folder"), "{error}");
        assert_eq!(error.downcast_ref(), Some(&FilesError::NotEmpty(path.clone())));
        let error = format!("{:#}", write_folder_atomically(&path.join("a"), write).unwrap_err());
        assert!(error.contains("a cannot be a new folder"), "{error}");
        assert_eq!(fs::read_dir(root.path().join("deep")).unwrap().count(), 1);
    }
}
